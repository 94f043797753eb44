"""Training a released model on clips that are encoded here: it goes on bit for bit, and trains what it should."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from experiments import clip_task, train, validation
from experiments.clip_config import PUBLISHED, ClipFiles, ClipTrainConfig, GramTerms, PMRLTerms
from experiments.config import ConfigError, TrainConfig
from experiments.usage import Usage, read_usage
from gramjax.checkpoints import (
    export_torch,
    load_loss_parameters,
    load_model,
    load_torch,
    resize_frames,
    save_model,
)
from gramjax.data.clips import ClipConfig
from gramjax.models import gram_tiny, to_json
from gramjax.training import MetricWriter, by_name, data_mesh, parameter_shardings, shard_batch, warmup_linear
from tests.experiments.conftest import TRAINED_ON, WORDS


def make_config(root, run_dir, **changes):
    config = ClipTrainConfig(
        run_dir=run_dir,
        initialize=root / "model",
        vocabulary=root / "vocab.txt",
        files=ClipFiles(root / "train.json", videos=root / "videos"),
        validation=ClipFiles(root / "held_out.json"),
        clips=ClipConfig(
            "tiny",
            ("caption", "vision", "audio", "subtitle"),
            train_frames=2,
            eval_frames=3,
            caption_length=8,
            subtitle_length=8,
            image_size=42,
            slice_frames=32,
            mel_bins=32,
        ),
        objective=GramTerms(),
        steps=4,
        batch_size=4,
        dtype="float32",
        remat=False,
        optimizer=replace(PUBLISHED["gram_msrvtt"][1].optimizer, learning_rate=1e-3, vision_learning_rate=1e-4),
        log_every=1,
        validate_every=2,
        checkpoint_every=3,
    )
    return replace(config, **changes)


def set_up(patch, devices=1):
    patch.setattr(clip_task, "data_mesh", lambda: data_mesh(jax.devices()[:devices]))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    set_up(monkeypatch)


@pytest.fixture(scope="module")
def root(training_clips):
    return training_clips


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch)
        assert clip_task.train_on_clips(make_config(root, run_dir)) is None
    return run_dir


def metrics_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_what_is_logged(uninterrupted):
    lines = metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    named = {"loss", "loss/volume", "loss/matching", "accuracy/matching", "temperature", "grad_norm", "learning_rate"}
    assert all(named <= set(line) for line in lines)
    assert [line["step"] for line in lines if "validation/recall" in line] == [2, 4]
    rate = warmup_linear(1e-3, steps=4)
    np.testing.assert_allclose([line["learning_rate"] for line in lines], [rate(count) for count in range(4)])
    for line in lines:
        np.testing.assert_allclose(line["loss"], line["loss/volume"] + 0.1 * line["loss/matching"], rtol=1e-5)


def test_what_clips_lack_is_named(uninterrupted):
    said = json.loads((uninterrupted / "train_clips.json").read_text())
    assert (said["rows"], said["clips"], said["dropped"]) == (6, 6, [])
    every = list(TRAINED_ON)
    assert said["missing"] == {"caption": [], "vision": [], "audio": [], "subtitle": every, "depth": every}
    assert list(said["unreadable"]) == ["audio"]  # which was found while it was trained
    assert list(said["unreadable"]["audio"]) == ["mute"]
    assert json.loads((uninterrupted / "validation_clips.json").read_text())["clips"] == 3


def test_the_exported_model_is_trained_where_it_should_be(root, uninterrupted, tmp_path):
    """And its frames have embeddings of their own, two of the four there were."""
    before = resize_frames(load_model(root / "model"), {"vision": 2, "audio": 1})
    after = load_model(uninterrupted / "model")
    assert after.config == before.config
    trained_on = make_config(root, tmp_path).clips
    kept = replace(trained_on, modalities=("caption", "vision", "audio"))  # no clip has subtitles
    assert read_usage(uninterrupted / "model") == Usage(kept, ("vision", "audio"))
    changes = {}
    names = jax.tree.leaves(by_name(nnx.state(before), str))
    for name, old, new in zip(
        names, jax.tree.leaves(nnx.state(before)), jax.tree.leaves(nnx.state(after)), strict=True
    ):
        changes[name] = float(np.abs(new - old).max())
    untrained = ("heads.subtitle", "heads.depth", "joint_heads", "fusion.language_head", "fusion.projections.text")
    for name, change in changes.items():
        if name.startswith(untrained):
            assert change == 0, name
        elif not name.endswith("key.bias"):
            assert change > 0, name
    slow = max(change for name, change in changes.items() if name.startswith("towers.vision."))
    assert slow < 0.2 * changes["towers.text.layers.0.mlp.fc1.kernel"]

    kept = load_loss_parameters(uninterrupted / "model")
    started = load_loss_parameters(root / "model")
    assert 0 < abs(float(kept.temperature) - float(started.temperature)) < 0.01
    export_torch(after, tmp_path / "model.pt", loss_parameters=kept)
    again = load_torch(tmp_path / "model.pt", after.config)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(after))


def test_an_exported_model_is_replaced_by_another_alone(root, uninterrupted, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / "model" / "notes.txt").write_text("")
    plan = clip_task.make_plan(make_config(root, run_dir), 1)
    clip_task.export(plan, clip_task.data_mesh())
    assert (run_dir / "model" / "notes.txt").exists()
    assert "as it was written before" in capsys.readouterr().out
    whole = (run_dir / "model" / "loss.json").read_text()
    save_model(run_dir / "model", load_model(root / "model"), overwrite=True)
    clip_task.export(plan, clip_task.data_mesh())
    assert (run_dir / "model" / "loss.json").read_text() == whole
    chex.assert_trees_all_equal(
        nnx.state(load_model(run_dir / "model")), nnx.state(load_model(uninterrupted / "model"))
    )
    # Of other parameters alone.
    other, scalars = load_model(uninterrupted / "model"), load_loss_parameters(uninterrupted / "model")
    kernel = other.heads["caption"].linear.kernel
    kernel[...] = kernel[...] + 1
    save_model(run_dir / "model", other, loss_parameters=scalars, overwrite=True)
    clip_task.export(plan, clip_task.data_mesh())
    chex.assert_trees_all_equal(
        nnx.state(load_model(run_dir / "model")), nnx.state(load_model(uninterrupted / "model"))
    )


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(root, uninterrupted, tmp_path, monkeypatch):
    write = MetricWriter.write

    def interrupt(writer, step, numbers):
        write(writer, step, numbers)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", interrupt)
        assert clip_task.train_on_clips(make_config(root, tmp_path)) == "SIGTERM"
    assert not (tmp_path / "model").exists()
    assert clip_task.train_on_clips(make_config(root, tmp_path, threads=1)) is None
    assert (tmp_path / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(
        nnx.state(load_model(tmp_path / "model")), nnx.state(load_model(uninterrupted / "model"))
    )


LARGE = functools.partial(parameter_shardings, min_size=64)  # as if the small model were large


@pytest.mark.slow
def test_divided_parameters_and_batches_do_not_change_a_run(root, uninterrupted, tmp_path, monkeypatch):
    """From the file to the exported model, with its checkpoints."""
    monkeypatch.setattr(clip_task, "parameter_shardings", LARGE)
    set_up(monkeypatch, devices=4)
    assert clip_task.train_on_clips(make_config(root, tmp_path, shard_parameters=True, remat=True)) is None
    for ours, theirs in zip(metrics_of(tmp_path), metrics_of(uninterrupted), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    models = (load_model(run_dir / "model") for run_dir in (tmp_path, uninterrupted))
    chex.assert_trees_all_close(*map(nnx.state, models), atol=1e-3)


def assert_divided(tree, mesh):
    """What counts as large is in eight parts, one a device, and that is nearly everything."""
    for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(LARGE(tree, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
        parts = {shard.data.size for shard in leaf.addressable_shards}
        assert parts == {leaf.size if place.is_fully_replicated else leaf.size // 8}
    sizes = dict.fromkeys((True, False), 0)
    for leaf in jax.tree.leaves(tree):
        sizes[leaf.sharding.is_fully_replicated] += leaf.size
    assert sizes[True] < 0.05 * sizes[False]


def test_no_device_ever_holds_a_whole_parameter(root, tmp_path, monkeypatch):
    """On the way from the file to the state at step 0, and of that neither parameters nor the optimizer's moments."""
    monkeypatch.setattr(clip_task, "parameter_shardings", LARGE)
    mesh, loaded = data_mesh(), []

    def load(path, **options):
        loaded.append(load_model(path, **options))
        return loaded[0]

    with monkeypatch.context() as patch:
        patch.setattr(clip_task, "load_model", load)
        plan = clip_task.make_plan(make_config(root, tmp_path, shard_parameters=True), 4)
        _, target, start, _ = clip_task.build(plan, mesh)
        state = start()
    assert_divided(nnx.state(loaded[0]), mesh)
    assert_divided(state, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, target) == jax.tree.map(lambda leaf: leaf.sharding, state)
    plan = clip_task.make_plan(make_config(root, tmp_path), 1)
    _, _, start, _ = clip_task.build(plan, data_mesh(jax.devices()[:1]))
    chex.assert_trees_all_equal(*(jax.device_get(dataclasses.replace(one, rng=0)) for one in (state, start())))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [GramTerms(), PMRLTerms()])
def test_divided_steps_are_the_whole_ones_and_stay_divided(root, tmp_path, monkeypatch, objective):
    """Over eight devices, parameters and the optimizer's moments in parts, against one device."""
    monkeypatch.setattr(clip_task, "parameter_shardings", LARGE)
    clips = iter(clip_task.make_loader(clip_task.make_plan(make_config(root, tmp_path), 1), train=True))
    batches = [jax.tree.map(lambda *rows: np.concatenate(rows), next(clips), next(clips)) for _ in range(3)]

    def train(devices, **changes):
        mesh, logged = data_mesh(devices), []
        plan = clip_task.make_plan(make_config(root, tmp_path, objective=objective, **changes), 1)
        task = clip_task.make_task(plan, mesh)
        state = task.start()
        for batch in batches:
            state, metrics = task.step(state, shard_batch(batch, mesh))
            logged.append({name: float(value) for name, value in metrics.items()})
            if changes:
                assert_divided(state, mesh)
        return state, logged

    state, logged = train(jax.devices(), shard_parameters=True, remat=True)
    whole, expected = train(jax.devices()[:1])
    assert len({line["loss"] for line in expected}) == 3  # it was trained
    for ours, theirs in zip(logged, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    chex.assert_trees_all_close(*jax.device_get((state.opt_state, whole.opt_state)), rtol=1e-3, atol=1e-6)


def test_other_clips_in_the_same_directory_are_refused(root, uninterrupted, tmp_path):
    rows = json.loads((root / "train.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(rows[:5]))
    other = make_config(root, uninterrupted, files=ClipFiles(tmp_path / "other.json", videos=root / "videos"))
    with pytest.raises(ConfigError, match=r"(?s)holds a run of another configuration.*clips_digest"):
        clip_task.train_on_clips(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size must not exceed the 6 training clips, got 8"),
        ({"initialize": "nowhere"}, "nowhere"),
        ({"vocabulary": "nowhere"}, "path must be a vocab.txt"),
        ({"vocabulary": "few.txt"}, "vocabulary must have the 97 tokens of the model, got 12 in .*few.txt"),
        ({"clips.image_size": 28}, "clips.image_size must be the model's 42, got 28"),
        ({"clips.caption_length": 70}, "clips.caption_length must be at most the model's 64, got 70"),
        ({"clips.modalities": ("caption", "subtitle"), "condition": ("subtitle",)}, "caption and another of"),
        ({"clips.modalities": ("caption", "vision", "subtitle"), "condition": ("subtitle",)}, "condition .'subtitle'"),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, change, message):
    own = {name.removeprefix("clips."): value for name, value in change.items() if name.startswith("clips.")}
    rest = {name: value for name, value in change.items() if "." not in name}
    rest |= {name: tmp_path / value for name, value in rest.items() if isinstance(value, str)}
    (tmp_path / "few.txt").write_text("\n".join(WORDS))
    config = make_config(root, tmp_path, **rest, clips=replace(make_config(root, tmp_path).clips, **own))
    with pytest.raises(ConfigError, match=message):
        clip_task.make_plan(config, 1)
    with pytest.raises(ConfigError, match="batch_size must divide over 3 devices, got 4"):
        clip_task.make_plan(make_config(root, tmp_path), 3)


def test_a_damaged_model_is_refused(root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "model")
    plan = clip_task.make_plan(make_config(root, tmp_path / "run", initialize=tmp_path / "model"), 1)
    _, _, start, _ = clip_task.build(plan, clip_task.data_mesh())
    (tmp_path / "model" / "parameters" / "_METADATA").unlink()
    with pytest.raises(ConfigError, match=rf"initialize must hold a whole model: {tmp_path}/model/parameters"):
        start()
    (tmp_path / "model" / "loss.json").write_text("{")
    with pytest.raises(ConfigError, match=rf"initialize must hold a whole model: {tmp_path}/model/loss\.json"):
        clip_task.build(plan, clip_task.data_mesh())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0.0}, "epochs must be positive and finite, got 0.0"),
        ({"condition": ("depth",)}, "condition must be out of clips.modalities"),
        ({"objective": GramTerms(label_smoothing=1.0)}, "objective.label_smoothing must not be negative"),
        ({"objective": PMRLTerms(alignment_temperature=0.0)}, "objective.alignment_temperature must be positive"),
    ],
)
def test_impossible_options_are_refused(root, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_config(root, tmp_path, **change)


def test_clips_without_sound_may_be_dropped_and_steps_follow_from_epochs(root, tmp_path):
    config = make_config(root, tmp_path, steps=None, epochs=2.5, batch_size=2)
    assert clip_task.make_plan(config, 1).steps == 7  # 2.5 * 6 / 2
    plan = clip_task.make_plan(replace(config, require=("vision",), captions="all"), 1)
    assert len(plan.train) == 6
    assert plan.train.annotations[0].captions == ("red beep", "talk")
    assert plan.clips.modalities == ("caption", "vision", "audio")  # none has subtitles
    assert dict(plan.model.condition_frames) == {"vision": 2, "audio": 1, "text": 0}


def test_what_is_left_out_is_said(root, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    modalities = {name: tower for name, tower in gram_tiny().modalities.items() if name != "depth"}
    model = replace(gram_tiny(), modalities=modalities, joint_heads={})
    (tmp_path / "model" / "config.json").write_text(json.dumps(to_json(model)))
    (tmp_path / "depths").mkdir()
    np.save(tmp_path / "depths" / "red.npy", np.zeros((4, 6, 5, 3), np.uint8))

    def said(folder, names):
        config = make_config(root, tmp_path / "run", initialize=folder)
        files = replace(config.files, depths=tmp_path / "depths")
        config = replace(config, files=files, clips=replace(config.clips, modalities=names))
        return clip_task.make_plan(config, 1).clips.modalities, capsys.readouterr().out

    every = ("caption", "vision", "audio", "subtitle", "depth")
    assert said(tmp_path / "model", every) == (
        ("caption", "vision", "audio"),
        "left out: subtitle (no training clip has it), depth (the model does not have it)\n",
    )
    assert said(root / "model", every[:3]) == (every[:3], "left out: depth (not in clips.modalities)\n")
    assert said(root / "model", (*every[:3], "depth")) == ((*every[:3], "depth"), "")


PLACES = "--run-dir run --initialize model --vocabulary v --annotations a.json --validation.annotations b.json"
PLACES = PLACES.split(" ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gram_pretraining", (2e-5, 128, 5.0, 2, 8, "crop_flip", None)),
        ("gram_msrvtt", (2e-5, 64, 4.0, 8, 8, "crop_flip", None)),
        ("gram_didemo", (2e-5, 64, 40.0, 8, 8, "none", None)),
        ("gram_activitynet", (2e-5, 64, 20.0, 8, 8, "none", None)),
        ("gram_vatex", (2e-5, 64, 2.5, 8, 16, "none", None)),
        ("gram_audiocaps", (2e-5, 64, 10.0, 8, 8, "none", None)),
        ("pmrl_pretraining", (1e-5, 64, 5.0, 2, 8, "crop_flip", 0.01)),
        ("pmrl_msrvtt", (2e-5, 64, 3.6, 8, 16, "crop_flip", 0.05)),
        ("pmrl_didemo", (2e-5, 64, 40.0, 8, 32, "none", 0.05)),
        ("pmrl_activitynet", (2e-5, 64, 20.0, 8, 32, "none", 0.05)),
        ("pmrl_vatex", (2e-5, 64, 2.5, 8, 16, "none", 0.05)),
        ("pmrl_audiocaps", (2e-5, 64, 10.0, 8, 8, "none", 0.05)),
    ],
)
def test_published_runs_on_the_command_line(name, expected):
    config, _ = train.read_options(["--config", name, *PLACES, "--videos", "videos"])
    objective, sizes = config.objective, config.clips
    alignment = objective.alignment_temperature if isinstance(objective, PMRLTerms) else None
    assert expected == (
        *(config.optimizer.learning_rate, config.batch_size, config.epochs),
        *(sizes.train_frames, sizes.eval_frames, sizes.transform, alignment),
    )
    assert (config.optimizer.vision_learning_rate, config.optimizer.warmup_ratio) == (5e-7, 0.1)
    assert objective.matching_weight == 0.1
    assert str(config.files.videos) == "videos"


def test_all_published_runs_are_tested():
    assert len(PUBLISHED) == 12


def test_options_of_a_published_run_may_be_changed(capsys):
    config, processes = train.read_options(
        ["--config", "gram_msrvtt", *PLACES, "--batch-size", "4", "--clips.train-frames", "4", "--no-remat"]
    )
    assert (config.batch_size, config.clips.train_frames, config.remat) == (4, 4, False)
    assert not processes.distributed
    with pytest.raises(SystemExit):
        train.read_options(["--config", "gram_msrvtt"])
    assert "--annotations" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.read_options(["--config", "help"])
    assert "gram_didemo" in capsys.readouterr().err


def test_without_a_name_it_is_the_emoji_run():
    config, _ = train.read_options(["--steps", "60"])
    assert config == TrainConfig(steps=60)


def test_recalls_of_clips():
    """Two of three captions find their clips; a clip with nothing is never found, one without a caption not asked."""
    captions = np.eye(4, 5, dtype=np.float32)
    clips = captions.copy()
    clips[1] = captions[2]
    where = {name: np.ones(4, bool) for name in ("caption", "vision", "audio")}
    where["caption"][3] = False
    where["audio"][0] = False
    noise = np.full(5, 0.2, np.float32)
    audio = clips + noise
    audio /= np.linalg.norm(audio, axis=1, keepdims=True)
    recalls = validation.clip_recalls({"caption": captions, "vision": clips, "audio": audio}, where)
    assert recalls["validation/caption-clip/recall@1"] == pytest.approx(1 / 3)
    assert recalls["validation/clip-caption/recall@1"] == pytest.approx(2 / 3)
    assert recalls["validation/recall"] == pytest.approx(1 / 2)
    assert recalls["validation/caption-clip/recall@10"] == 1
    nothing = {name: np.zeros(4, bool) if name != "caption" else mask for name, mask in where.items()}
    recalls = validation.clip_recalls({"caption": captions, "vision": clips, "audio": audio}, nothing)
    assert recalls["validation/recall"] == 0


def test_a_config_is_json(root, tmp_path):
    record = clip_task.to_json(make_config(root, tmp_path))
    assert json.loads(json.dumps(record)) == record
    assert {field.name for field in dataclasses.fields(ClipTrainConfig)} <= set(record)
