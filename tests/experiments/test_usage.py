"""What a model's folder says of its use is the default of what uses it."""

import dataclasses
import json

import pytest

from experiments import embed, evaluate_clips, search
from experiments.usage import Usage, read_usage
from gramjax.data.clips import DIDEMO, MODALITIES, MSRVTT
from gramjax.models import to_json

USAGE = Usage(dataclasses.replace(MSRVTT, eval_frames=16, audio_slices=2, mel_bins=32), ("subtitle", "audio"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips.json").write_text(json.dumps(to_json(USAGE)))
    return tmp_path


def test_it_is_read_again(folder, tmp_path_factory):
    assert read_usage(folder) == USAGE
    assert read_usage(tmp_path_factory.mktemp("empty")).condition == ("vision", "audio")


def test_indexing(folder, tmp_path_factory):
    options = embed.Embed(folder, folder / "index", folder)
    wanted = embed._wanted(options)
    assert wanted == dataclasses.replace(USAGE.clips, name="index", modalities=MODALITIES)
    asked = embed._wanted(dataclasses.replace(options, frames=4, slices=1, slice_frames=64, mel_bins=16))
    assert asked == dataclasses.replace(wanted, eval_frames=4, audio_slices=1, slice_frames=64, mel_bins=16)
    nothing = embed._wanted(dataclasses.replace(options, model=tmp_path_factory.mktemp("empty")))
    assert (nothing.eval_frames, nothing.audio_slices, nothing.slice_frames, nothing.mel_bins) == (8, 1, 1024, 64)


def test_evaluation(folder, tmp_path_factory):
    options = evaluate_clips.EvaluateClips(folder, annotations=folder, vocabulary=folder)
    assert evaluate_clips._wanted(options) == USAGE.clips
    # Of another data set than it was trained on: the published frames and slices, of the model's sound.
    other = evaluate_clips._wanted(dataclasses.replace(options, config="didemo"))
    assert other == dataclasses.replace(DIDEMO, mel_bins=32)
    asked = evaluate_clips._wanted(dataclasses.replace(options, frames=3, mel_bins=16))
    assert asked == dataclasses.replace(USAGE.clips, eval_frames=3, mel_bins=16)
    with pytest.raises(ValueError, match=r"config must be .*, vast: .*empty.* does not say what it was trained on"):
        evaluate_clips._wanted(dataclasses.replace(options, model=tmp_path_factory.mktemp("empty")))


def test_what_a_sentence_is_matched_with(clip_index, monkeypatch):
    index, contents = embed.read_index(clip_index.index)
    seen = []

    def reranked(gallery, model, modalities, text, found):
        seen.append(modalities)
        return found

    monkeypatch.setattr(search, "_reranked", reranked)
    monkeypatch.setattr(search, "read_usage", lambda path: USAGE)
    search.find(index, contents, "a red square", 3, rerank=3)
    assert seen == [("subtitle", "audio")]
