"""What one asks is prepared as the examples of a split are."""

import io

import numpy as np
import pytest
from PIL import Image

from gramjax.data import emoji, pipeline, queries, tokenizer


@pytest.fixture(scope="module")
def evaluated(data_dir):
    """The test split, and its first batch."""
    split = emoji.load_split(data_dir, "test")
    modalities = ("english", "twitter", "speech")
    loader = pipeline.make_loader(split, modalities=modalities, batch_size=4, seed=0, train=False)
    return split, next(iter(loader))


def test_a_drawing_and_an_utterance_are_those_of_the_loader(evaluated):
    split, batch = evaluated
    for row in range(4):
        picture = Image.open(io.BytesIO(split[row]["twitter"]))
        np.testing.assert_allclose(queries.encode_picture(picture)[0], batch["twitter"][row], atol=1e-6)
        waveform = split[row]["speech"][emoji.TEST_VOICE]
        # As the data has it, and as files give it.
        for sound, tolerance in ((waveform, 1e-5), ((waveform / 2**15).astype(np.float32), 1e-4)):
            speech = queries.encode_speech(sound, 16000)
            np.testing.assert_allclose(speech["fbank"][0], batch["speech"]["fbank"][row], atol=tolerance)
            np.testing.assert_array_equal(speech["mask"][0], batch["speech"]["mask"][row])


def test_words_are_a_name_without_keywords(evaluated):
    split, batch = evaluated
    for row in range(4):
        words = queries.encode_words(split[row]["english"]["name"])
        length = words["mask"].sum()
        np.testing.assert_array_equal(words["ids"][0, :length], batch["english"]["ids"][row, :length])
        assert words["ids"][0, 0] == tokenizer.CLS
        assert not words["mask"][0, length:].any()
        assert (words["ids"][0, length:] == tokenizer.PAD).all()


def test_what_is_too_long_loses_its_end():
    assert queries.encode_words("cat " * 40)["mask"].all()
    speech = queries.encode_speech(np.ones(16000 * 5, np.int16), 16000)
    assert speech["fbank"].shape == (1, 208, 64)
    assert speech["mask"].all()


def test_a_text_without_words_is_one_unknown_word():
    words = queries.encode_words("  ")
    assert words["ids"][0, :2].tolist() == [tokenizer.CLS, tokenizer.UNK]
    assert words["mask"].sum() == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_samples_of_an_unknown_range_are_refused(dtype):
    with pytest.raises(TypeError, match=f"waveform must be .* floats, got dtype {dtype.__name__}"):
        queries.encode_speech(np.zeros(8000, dtype), 16000)


def test_pictures_of_any_size_and_mode_lie_on_white():
    white = queries.encode_picture(Image.new("RGB", (7, 90), "white"))
    np.testing.assert_array_equal(queries.encode_picture(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), white)
    np.testing.assert_array_equal(queries.encode_picture(Image.new("L", (32, 32), 255)), white)
