"""Preparing and reading the emoji set."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gramjax.data import audio, emoji
from gramjax.data.emoji import assets, speech
from tests.damage import cut, flip


@pytest.mark.slow
def test_a_killed_preparation_is_redone_and_two_at_once_are_safe(preparation):
    assert preparation.remains, "the killed preparation left nothing: it was not killed half-way"
    assert preparation.printed == ["321", "321"]
    assert [path.name for path in sorted((preparation.data_dir / "emoji").iterdir())] == [".lock", "1.1.0"]


def test_splits_partition_the_set(splits):
    indices = {name: [split[i]["index"] for i in range(len(split))] for name, split in splits.items()}
    assert sorted(itertools.chain.from_iterable(indices.values())) == list(range(1572))
    for name, members in indices.items():
        assert members == [i for i, record in enumerate(assets.load_records()) if record["split"] == name]


def test_raw_examples(splits):
    split, pictures = splits["test"], {artist: assets.load_pictures(artist) for artist in emoji.PICTURES}
    for position in (0, 5, -1):
        example = split[position]
        record = assets.load_records()[example["index"]]
        for field in ("id", "label", "subcategory", "family", "flip", *emoji.LANGUAGES):
            assert example[field] == record[field]
        for artist in emoji.PICTURES:
            drawn = pictures[artist][example["index"]]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(example[artist]))), drawn)
            np.testing.assert_array_equal(emoji.decode_picture(example[artist]), assets.on_white(drawn).round())
        assert set(example["speech"]) == set(emoji.VOICES)
        for waveform in example["speech"].values():
            assert waveform.dtype == np.int16
            assert 0.25 < len(waveform) / speech.SAMPLE_RATE < 2.1
    names = [record["english"]["name"] for record in assets.load_records() if record["split"] == "validation"]
    spoken = speech.synthesize(names, emoji.VALIDATION_VOICE)
    for position in (0, 100, 160):
        np.testing.assert_array_equal(
            splits["validation"][position]["speech"][emoji.VALIDATION_VOICE], spoken[position]
        )


def test_bad_arguments(splits, tmp_path):
    with pytest.raises(ValueError, match=r"split must be one of .* got 'valid'"):
        emoji.load_split(tmp_path, "valid")
    with pytest.raises(IndexError, match="got 321"):
        splits["test"][321]


def test_voices_are_clearly_different():
    spoken = {voice: speech.synthesize(["grinning cat with smiling eyes"], voice)[0] for voice in emoji.VOICES}
    spectra = {voice: audio.kaldi_fbank(wave).mean(axis=0) for voice, wave in spoken.items()}
    assert len(emoji.TRAIN_VOICES) >= 3
    assert len(set(emoji.VOICES)) == 6
    voices = list(spectra)
    for i, first in enumerate(voices):
        for second in voices[:i]:
            assert np.abs(spectra[first] - spectra[second]).mean() > 0.3


def test_synthesis_is_sound_and_repeatable():
    first = speech.synthesize(["cat", "red heart"], "en-us")
    assert all(np.abs(wave.astype(int)).max() > 3000 for wave in first)
    second = speech.synthesize(["cat", "red heart"], "en-us")
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert speech.synthesize([], "en-us") == []


@pytest.mark.parametrize("voice", emoji.VOICES)
def test_no_voice_depends_on_the_environment_of_the_process(voice, monkeypatch):
    names = [record["english"]["name"] for record in assets.load_records()[:200]]
    first = np.concatenate(speech.synthesize(names, voice))
    for size in (2000, 50000):
        monkeypatch.setenv("GRAMJAX_TEST_PADDING", "x" * size)
        np.testing.assert_array_equal(np.concatenate(speech.synthesize(names, voice)), first)


def test_synthesis_says_what_it_cannot_do():
    with pytest.raises(speech.SynthesisError, match="no voice 'en-atlantis'"):
        speech.synthesize(["cat"], "en-atlantis")
    with pytest.raises(speech.SynthesisError, match="no sound of ''"):
        speech.synthesize(["cat", ""], "en-us")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("emoji-test.array_record-00000-of-00001", flip),
        ("emoji-test.array_record-00000-of-00001", cut),
        ("emoji-test.array_record-00000-of-00001", Path.unlink),
        ("dataset_info.json", cut),
    ],
)
def test_a_prepared_set_that_is_damaged_says_what_to_do(data_dir, tmp_path, name, harm):
    folder = tmp_path / "emoji" / str(emoji.EmojiBuilder.VERSION)
    folder.mkdir(parents=True)
    for path in (data_dir / "emoji" / folder.name).iterdir():
        os.link(path, folder / path.name)
    data = (folder / name).read_bytes()
    (folder / name).unlink()  # the link
    (folder / name).write_bytes(data)
    harm(folder / name)

    def read():
        split = emoji.load_split(tmp_path, "test")
        return [split[position]["index"] for position in range(len(split))]

    with pytest.raises(OSError, match=rf"{folder} is damaged \(.*\); delete that folder, and it will be made again"):
        read()


def test_data_dir_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"data_dir must be a folder to write to, got {tmp_path / 'file'}: Not a dir"):
        emoji.load_split(tmp_path / "file", "test")
