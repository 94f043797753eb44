"""Synthetic speech: eSpeak NG through its C interface, without touching any audio device.

eSpeak NG (GPL-3.0) is not part of gramjax: the optional package `espeakng-loader` brings the shared library and its
voices. The speech is synthetic, by formant synthesis; a model that has heard it alone knows nothing of human voices.
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16

from gramjax.data import audio

SAMPLE_RATE = 16000
# Accent (eSpeak language) + timbre. Whole voices are held out: none of the last two is ever heard in training.
TRAIN_VOICES = ("en-us", "en-us+f2", "en-gb-x-rp+m3", "en-gb-scotland+f4")
VALIDATION_VOICE = "en-us-nyc+m7"
TEST_VOICE = "en-gb-x-gbclan+Andrea"
VOICES = (*TRAIN_VOICES, VALIDATION_VOICE, TEST_VOICE)
WORDS_PER_MINUTE = 210

# Constants of espeak-ng/speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # samples go to the callback, not to a device; Synth returns when done
_INITIALIZE_DONT_EXIT = 0x8000
_RATE, _PITCH = 1, 3
_POS_CHARACTER, _CHARS_UTF8 = 1, 1

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
# The library holds one synthesizer in global state.
_LOCK = threading.Lock()


class SynthesisError(RuntimeError):
    """eSpeak NG refused a request."""


def synthesize(texts: Sequence[str], voice: str) -> list[Int16[np.ndarray, " sample"]]:
    """Speaks English texts.

    Args:
      texts: what to say, each at least one letter or digit.
      voice: an eSpeak NG language, optionally with "+" and a variant (one of `VOICES`, say).

    Returns:
      One mono waveform a text, 16 bits at 16,000 Hz. The same text and voice give the same samples every time.

    Raises:
      SynthesisError: if the voice is unknown or a text yields no sound.
      ImportError: if `espeakng-loader` is not installed.
    """
    with _LOCK:
        library, rate, chunks, _ = _library()
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SynthesisError(f"eSpeak NG has no voice {voice!r}")
        library.espeak_SetParameter(_RATE, WORDS_PER_MINUTE, 0)
        library.espeak_SetParameter(_PITCH, 50, 0)
        waveforms = []
        for text in texts:
            # A pause at every comma and colon would make up much of the longest names.
            encoded = text.translate({ord(mark): " " for mark in ",:()“”"}).encode()
            chunks.clear()
            status = library.espeak_Synth(encoded, len(encoded) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
            if status != 0 or not chunks:
                raise SynthesisError(f"eSpeak NG made no sound of {text!r} (status {status})")
            waveforms.append(np.concatenate(chunks))
    return [wave for start in range(0, len(waveforms), 64) for wave in _resample(waveforms[start : start + 64], rate)]


def _resample(waveforms: Sequence[Int16[np.ndarray, " _"]], rate: int) -> list[Int16[np.ndarray, " _"]]:
    """Several waveforms at `SAMPLE_RATE`: together, because many small matrix products are slow on a busy machine."""
    padded = np.zeros((len(waveforms), max(map(len, waveforms))), np.float32)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    resampled = np.clip(np.round(audio.resample(padded, rate, SAMPLE_RATE)), -32768, 32767).astype(np.int16)
    return [
        row[: -(-len(waveform) * SAMPLE_RATE // rate)].copy()
        for row, waveform in zip(resampled, waveforms, strict=True)
    ]


@functools.cache
def _library() -> tuple[ctypes.CDLL, int, list[np.ndarray], Any]:
    """The initialised library, its sample rate, its callback's list, and the callback itself, to be kept alive."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("speech is synthesised by eSpeak NG: pip install 'gramjax[media]'") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _INITIALIZE_DONT_EXIT)
    if rate <= 0:
        raise SynthesisError(f"eSpeak NG did not start (status {rate})")
    chunks: list[np.ndarray] = []

    @_CALLBACK
    def receive(samples, count, events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    return library, rate, chunks, receive
