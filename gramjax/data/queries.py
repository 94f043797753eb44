"""Words, drawings and sounds of one's own, as `pipeline.make_loader` has those of the emoji set for evaluation.

Each function makes a batch of one, for `gramjax.models.GramModel.embed`: `{"english": encode_words("red heart")}`.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int32, Num
from PIL import Image

from gramjax.data import audio, pipeline, tokenizer
from gramjax.data.emoji import assets


def encode_words(text: str) -> dict[str, Int32[np.ndarray, "1 48"] | Bool[np.ndarray, "1 48"]]:
    """A text as the names of pictographs are written: each word, if it is known, and its letters.

    Args:
      text: in English or Spanish (Chinese names are not spelt); what is longer than 48 tokens loses its end.

    Returns:
      `{"ids": int32 [1, 48], "mask": bool [1, 48]}`.

    >>> encode_words("red heart")["mask"].sum()
    np.int64(13)
    """
    tokens = [tokenizer.CLS, *(tokenizer.spelt_words(text) or [tokenizer.UNK])][: pipeline.TEXT_LENGTH]
    ids = np.full((1, pipeline.TEXT_LENGTH), tokenizer.PAD, np.int32)
    ids[0, : len(tokens)] = tokens
    return {"ids": ids, "mask": np.arange(pipeline.TEXT_LENGTH)[None] < len(tokens)}


def encode_picture(picture: Image.Image) -> Float32[np.ndarray, "1 32 32 3"]:
    """A picture as the drawings of pictographs are: 32 pixels wide and high, on white.

    Args:
      picture: of any size and mode.

    Returns:
      float32 `[1, 32, 32, 3]`.

    >>> encode_picture(Image.new("RGB", (72, 72), "red")).shape
    (1, 32, 32, 3)
    """
    side = assets.PICTURE_SIZE
    pixels = np.asarray(picture.convert("RGBA").resize((side, side), Image.Resampling.BOX))
    intensity = assets.on_white(pixels).round() / np.float32(255)
    return ((intensity - np.float32(pipeline.PICTURE_MEAN)) / np.float32(pipeline.PICTURE_STD))[None]


def encode_speech(
    waveform: Num[np.ndarray, " sample"], sample_rate: int
) -> dict[str, Float32[np.ndarray, "1 208 64"] | Bool[np.ndarray, "1 208"]]:
    """A recording as the utterances of names are.

    Args:
      waveform: one channel: 16-bit integers, or floats in [-1, 1].
      sample_rate: in hertz.

    Returns:
      `{"fbank": float32 [1, 208, 64], "mask": bool [1, 208]}`; of what is longer than two seconds, the beginning.

    Raises:
      TypeError: if the samples are other integers, whose range would have to be guessed.
      ValueError: if the waveform is not one channel or shorter than 25 ms.

    >>> encode_speech(np.zeros(8000, np.int16), 16000)["fbank"].shape
    (1, 208, 64)
    """
    if waveform.dtype != np.int16 and not np.issubdtype(waveform.dtype, np.floating):
        raise TypeError(f"waveform must be of 16-bit integers or of floats, got dtype {waveform.dtype}")
    scale = 1.0 if np.issubdtype(waveform.dtype, np.integer) else audio.INT16_SCALE
    resampled = audio.resample(waveform.astype(np.float32), sample_rate, audio.SAMPLE_RATE) * np.float32(scale)
    fbank = audio.normalize_fbank(audio.kaldi_fbank(resampled, num_mel_bins=pipeline.MEL_BINS))
    fbank = fbank[: pipeline.SPEECH_FRAMES]
    padding = ((0, pipeline.SPEECH_FRAMES - len(fbank)), (0, 0))
    return {"fbank": np.pad(fbank, padding)[None], "mask": np.arange(pipeline.SPEECH_FRAMES)[None] < len(fbank)}
