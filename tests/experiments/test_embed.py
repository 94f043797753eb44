"""From a folder of clips to an index."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import embed
from gramjax.checkpoints import load_model
from gramjax.encoders import BEATsConfig
from gramjax.models import to_json


def where_of(index):
    """Which modalities of each item are there: those of which the index has a basis vector."""
    return np.stack([np.any(np.asarray(vectors) != 0, axis=-1) for vectors in index.prepared.basis], axis=1)


def test_clips_are_indexed_with_what_they_have(clip_index):
    index, contents = embed.read_index(clip_index.index)
    assert [item.name for item in contents.items] == ["red", "blue", "green", "short", "beep"]
    assert contents.gallery.modalities == ("vision", "audio", "subtitle")
    expected = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 0]]
    np.testing.assert_array_equal(where_of(index), np.array(expected, bool))
    assert contents.left_out == ("broken",)
    assert {name: sorted(found) for name, found in contents.unreadable.items()} == {
        "vision": ["broken", "short"],
        "audio": ["blue", "broken"],
    }
    assert "2 frames, needed 4" in contents.unreadable["vision"]["short"]
    assert contents.items[0].video == str(clip_index.clips / "red.mp4")
    assert contents.items[4].audio == str(clip_index.clips / "beep.wav")
    config = contents.gallery.config
    assert (config.eval_frames, config.image_size, config.slice_frames, config.mel_bins) == (4, 42, 64, 32)
    # No longer than the text tower reads.
    assert (config.caption_length, config.subtitle_length) == (40, 64)
    assert contents.gallery.vocabulary == str(clip_index.vocabulary)
    assert contents.model == str(clip_index.model)
    report = json.loads((clip_index.index / "report.json").read_text())
    assert report["missing"]["vision"] == ["beep"]
    assert report["missing"]["subtitle"] == ["red", "blue", "short", "broken", "beep"]
    assert {name: sorted(found) for name, found in report["unreadable"].items()} == {
        name: sorted(found) for name, found in contents.unreadable.items()
    }


def test_a_folder_without_annotations_and_without_words(clip_index, tmp_path, capsys, monkeypatch):
    options = dataclasses.replace(
        clip_index.options, index=tmp_path / "index", annotations=None, audios=None, vocabulary=None, score="volume"
    )
    embed.main(options)
    printed = capsys.readouterr().out
    assert "5 of 6 items, by volume" in printed
    assert "vision: 3, 2 unreadable" in printed
    assert "nothing could be read of broken" in printed
    assert f"; named in {tmp_path / 'index' / 'report.json'}" in printed
    index, contents = embed.read_index(tmp_path / "index")
    assert [item.name for item in contents.items] == ["beep", "blue", "green", "red", "short"]
    assert contents.gallery.modalities == ("vision", "audio")
    assert index.score == embed.SCORES["volume"]
    # What is there is kept, or replaced on request; but not what is no index.
    with pytest.raises(ValueError, match="index must not exist unless --overwrite"):
        embed.main(options)
    with pytest.raises(ValueError, match="index must be one to be replaced"):
        embed.main(dataclasses.replace(options, index=clip_index.clips, overwrite=True))
    assert (clip_index.clips / "red.mp4").exists()
    # Said before any clip is read.
    monkeypatch.setattr(embed, "embed_items", None)
    with pytest.raises(ValueError, match=r"index must be where a folder can be made, got .*red\.mp4/index: "):
        embed.main(dataclasses.replace(options, index=clip_index.clips / "red.mp4" / "index"))
    embed.write_index(tmp_path / "index", index, dataclasses.replace(contents, model="elsewhere"))
    assert embed.read_index(tmp_path / "index")[1].model == "elsewhere"
    assert os.listdir(tmp_path) == ["index"]


def test_models_of_one_configuration_are_told_apart(clip_index):
    model = load_model(clip_index.model)
    digest = embed.model_digest(model)
    assert digest == embed.read_index(clip_index.index)[1].digest
    kernel = model.heads["audio"].linear.kernel
    kernel[...] = kernel[...].at[0, 0].add(1e-3)
    assert embed.model_digest(model) != digest


def test_what_cannot_be_indexed_leaves_nothing(clip_index, tmp_path):
    def fails(message, **changes):
        options = {"annotations": None, "audios": None, "index": tmp_path / "index"} | changes
        with pytest.raises((ValueError, OSError), match=message):
            embed.main(dataclasses.replace(clip_index.options, **options))

    broken = tmp_path / "broken"
    broken.mkdir()
    fails(r"media must be a folder of \.mp4, .* holds none", clips=broken)
    (broken / "a.mp4").write_text("no video")
    fails(r"none of 1 clips can be read; the first: .*a\.mp4", clips=broken)
    fails("media must be a folder, got .*nowhere", clips=tmp_path / "nowhere")
    fails(r"model must be a folder that .* wrote, got .*nowhere, which has no config\.json", model=tmp_path / "nowhere")
    words = clip_index.vocabulary.read_text().split()
    for tokens in (words[:-1], [*words, "more"]):
        (tmp_path / "other.txt").write_text("\n".join(tokens))
        message = rf"vocabulary must have the 97 tokens of the model, got {len(tokens)} in .*other\.txt"
        fails(message, vocabulary=tmp_path / "other.txt")
    fails("path must be a vocab.txt", vocabulary=tmp_path / "nothing.txt")
    fails("eval_frames must be positive", frames=0)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(json.dumps(to_json(BEATsConfig())))
    fails("model must be a whole model with a GramConfig, got BEATsConfig", model=tmp_path / "tower")
    for changes in ({"clips": None}, {"emoji": True}, {"clips": None, "emoji": True}, {"audios": broken}):
        fails("--", **changes)
    assert sorted(os.listdir(tmp_path)) == ["broken", "other.txt", "tower"]


def test_an_index_appears_whole_or_not_at_all(clip_index, tmp_path, monkeypatch):
    index, contents = embed.read_index(clip_index.index)
    embed.write_index(tmp_path / "index", index, contents)
    monkeypatch.setattr(embed, "to_json", lambda contents: {"not JSON": object()})
    for name in ("index", "new"):
        with pytest.raises(TypeError):
            embed.write_index(tmp_path / name, index, contents)
    assert os.listdir(tmp_path) == ["index"]
    assert len(embed.read_index(tmp_path / "index")[0]) == 5


def test_damaged_indices_are_refused(clip_index, tmp_path):
    index, contents = embed.read_index(clip_index.index)
    with pytest.raises(ValueError, match=r"index must be a folder that experiments\.embed wrote"):
        embed.read_index(tmp_path)
    embed.write_index(tmp_path / "index", index, dataclasses.replace(contents, items=contents.items[1:]))
    with pytest.raises(ValueError, match="are not of the same items"):
        embed.read_index(tmp_path / "index")
    (tmp_path / "index" / embed.CONTENTS).write_text('{"type": "Contents", "modle": 1}')
    with pytest.raises(ValueError, match="is damaged: Contents"):
        embed.read_index(tmp_path / "index")


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.embed", "nowhere", tmp_path / "index", "--clips", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
