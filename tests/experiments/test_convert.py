"""Converting from the command line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiments.cli import interrupts_end_at_once
from experiments.convert import BEATsFile, Convert, GramFile, JSONFile, main
from experiments.usage import Usage, read_usage, save_with_usage
from gramjax.checkpoints import load_loss_parameters, load_model, load_torch, read_beats_config
from gramjax.data.clips import MSRVTT
from gramjax.models import gram_tiny, to_json

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_file_that_says_what_it_holds_and_a_configuration_of_ones_own(tmp_path):
    main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "beats", BEATsFile()))
    model = load_model(tmp_path / "beats")
    expected = load_torch(GOLDEN / "beats_tiny.pt", read_beats_config(GOLDEN / "beats_tiny.pt"))
    for (path, ours), (_, theirs) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (model, expected)), strict=True):
        np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))
    # The same tower, out of the whole model's file.
    main(Convert(GOLDEN / "gram_tiny_ddp.pt", tmp_path / "tower", JSONFile(tmp_path / "beats" / "config.json")))
    assert load_model(tmp_path / "tower").config == model.config


def test_a_whole_model(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(to_json(gram_tiny())))
    options = Convert(GOLDEN / "gram_tiny_ddp.pt", tmp_path / "model", JSONFile(tmp_path / "tiny.json"))
    main(dataclasses.replace(options, published="pmrl_msrvtt"))
    usage = read_usage(tmp_path / "model")
    assert usage == Usage(dataclasses.replace(MSRVTT, eval_frames=16), ("vision", "audio", "subtitle"))
    model = load_model(tmp_path / "model")
    assert model.config == gram_tiny()
    published = np.load(GOLDEN / "gram_tiny.npz")["sd/contra_head_d.linear.weight"]
    np.testing.assert_array_equal(model.heads["depth"].linear.kernel[...], published.T)
    temperature = np.load(GOLDEN / "gram_tiny.npz")["sd/contra_temp"]
    np.testing.assert_allclose(load_loss_parameters(tmp_path / "model").temperature, temperature, rtol=1e-6)
    with pytest.raises(ValueError, match=r"published must be one of gram_pretraining, .*, got gram"):
        dataclasses.replace(options, published="gram")
    (tmp_path / "model" / "clips.json").write_text('{"type": "Usage", "clips": 3}')
    with pytest.raises(ValueError, match=r"clips.json does not say how a model reads clips: .* got 3"):
        read_usage(tmp_path / "model")


@pytest.mark.slow
def test_a_file_of_other_sizes_than_the_released_ones_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"wrong shape: vision_encoder.visual.cls_token \(1, 1, 48\)"):
        main(Convert(GOLDEN / "gram_tiny_ddp.pt", tmp_path / "large", GramFile()))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("published", [None, "gram_didemo"])
def test_ctrl_c_leaves_nothing_half_written(tmp_path, monkeypatch, published):
    (tmp_path / "tiny.json").write_text(json.dumps(to_json(gram_tiny())))

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status, os.listdir(tmp_path))

    def save(folder, parameters):
        folder.mkdir()
        assert len(os.listdir(tmp_path)) == (2 if published is None else 3)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("gramjax.checkpoints.models.save", save)
    options = Convert(
        GOLDEN / "gram_tiny_ddp.pt", tmp_path / "model", JSONFile(tmp_path / "tiny.json"), published=published
    )
    with pytest.raises(Ended) as ended, interrupts_end_at_once("interrupted"):
        main(options)
    assert ended.value.args == (130, ["tiny.json"])


def test_a_file_of_other_sizes_is_told_how_to_be_described(tmp_path):
    config = dataclasses.replace(read_beats_config(GOLDEN / "beats_tiny.pt"), mlp_dim=3)
    (tmp_path / "other.json").write_text(json.dumps(to_json(config)))
    with pytest.raises(
        ValueError, match=r"wrong shape: (.|\n)*\nThe file has other sizes than this BEATsConfig; .* json"
    ):
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "model", JSONFile(tmp_path / "other.json")))


def test_errors_leave_the_destination_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="destination must not exist unless --overwrite"):
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "there", BEATsFile()))
    with pytest.raises(ValueError, match="destination must be one to be replaced"):
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "there", BEATsFile(), overwrite=True))
    with pytest.raises(ValueError, match="destination must be where a folder can be made"):  # before anything is read
        main(Convert(GOLDEN / "none.pt", tmp_path / "there" / "mine.txt" / "new", BEATsFile()))
    with pytest.raises(ValueError, match="path must be one to be replaced"):
        save_with_usage(tmp_path / "there", None, Usage())
    with pytest.raises(ValueError, match="published is of a whole model, got it for a BEATsConfig"):
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "new", BEATsFile(), published="gram_msrvtt"))
    with pytest.raises(ValueError, match="no configuration of BEATs"):
        main(Convert(GOLDEN / "eva_tiny_fp16.pt", tmp_path / "new", BEATsFile()))
    (tmp_path / "wrong.json").write_text(json.dumps({"type": "BERTConfig", "widht": 3}))
    with pytest.raises(ValueError, match="BERTConfig has no widht"):
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "new", JSONFile(tmp_path / "wrong.json")))
    (tmp_path / "wrong.json").write_text(json.dumps([{"id": 1, "caption": "a dog"}] * 100))
    with pytest.raises(ValueError, match=r"wrong.json does not describe a model: .* got \[\{") as error:
        main(Convert(GOLDEN / "beats_tiny.pt", tmp_path / "new", JSONFile(tmp_path / "wrong.json")))
    assert len(str(error.value)) < 500
    assert sorted(os.listdir(tmp_path)) == ["there", "wrong.json"]
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"


def test_the_command_line(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "experiments.convert", GOLDEN / "eva_tiny_fp16.pt", tmp_path / "eva", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])

    sizes = {"image-size": 42, "patch-size": 14, "width": 48, "num-heads": 3, "mlp-dim": 209}
    options = ["vision", *(f"--{name}={size}" for name, size in sizes.items())]
    wrong = run(*options, "--depth=2")
    assert wrong.returncode == 1
    assert "unexpected: blocks.2.norm1.weight" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert not list(tmp_path.iterdir())
    right = run(*options, "--depth=3")
    assert right.returncode == 0, right.stderr
    assert load_model(tmp_path / "eva").config.mlp_dim == 209
