"""Runs eSpeak NG in a process of its own; `speech.synthesize` starts it. Needs nothing but the standard library.

Reads a JSON request from standard input, writes to standard output a JSON line with the sample rate and the number of
samples of each text, then the samples (16 bits, native order). A request it cannot fulfil gives `{"error": ...}`.
"""

import ctypes
import json
import sys

# Constants of espeak-ng/speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2  # samples go to the callback, not to a device; espeak_Synth returns when all is said
INITIALIZE_DONT_EXIT = 0x8000
RATE = 1
POS_CHARACTER, CHARS_UTF8 = 1, 1
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(library_path: str, data_path: str, voice: str, words_per_minute: int, texts: list[str]) -> tuple[dict, bytes]:
    """The header and the samples."""
    library = ctypes.CDLL(library_path)
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    position = [ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
    library.espeak_Synth.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *position, ctypes.c_void_p, ctypes.c_void_p]
    rate = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), INITIALIZE_DONT_EXIT)
    if rate <= 0:
        return {"error": f"eSpeak NG did not start (status {rate})"}, b""
    chunks = []

    def receive(samples, count, events):
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = Callback(receive)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        return {"error": f"eSpeak NG has no voice {voice!r}"}, b""
    library.espeak_SetParameter(RATE, words_per_minute, 0)
    spoken = []
    for text in texts:
        chunks.clear()
        encoded = text.encode()
        status = library.espeak_Synth(encoded, len(encoded) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
        spoken.append(b"".join(chunks))
        # Of a text without a letter or digit it makes a click of a few milliseconds.
        if status != 0 or len(spoken[-1]) // 2 < rate // 20:
            return {"error": f"eSpeak NG made no sound of {text!r} (status {status})"}, b""
    return {"rate": rate, "lengths": [len(samples) // 2 for samples in spoken]}, b"".join(spoken)


if __name__ == "__main__":
    header, samples = speak(**json.load(sys.stdin.buffer))
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + samples)
