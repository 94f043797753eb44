"""A folder of clips, the small released model, and the index of the one by the other."""

import json
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from experiments import embed
from gramjax.checkpoints import load_torch, save_model
from gramjax.models import gram_tiny
from tests.data import media_files

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "moves", "beep", "talk", "##s")
# As many as the small model has.
VOCABULARY = (*WORDS, *(f"[unused{number}]" for number in range(97 - len(WORDS))))
SIZES = {"frames": 4, "slice_frames": 64, "mel_bins": 32, "batch_size": 4}


def write_square(path, colour, frames=8, hertz=None):
    """A square of a colour that moves over grey, and perhaps a tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        track = None if hertz is None else container.add_stream("aac", rate=16000, layout="mono")
        for number in range(frames):
            picture = np.full((48, 48, 3), 128, np.uint8)
            picture[16:32, 4 * number : 4 * number + 16] = colour
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            media_files.encode_sound(container, track, media_files.tone(0.8, hertz=hertz)[None], 16000)


class ClipIndex(NamedTuple):
    clips: Path
    model: Path
    vocabulary: Path
    index: Path
    options: embed.Embed


@pytest.fixture(scope="session")
def clip_index(tmp_path_factory) -> ClipIndex:
    root = tmp_path_factory.mktemp("clip_index")
    clips = root / "clips"
    clips.mkdir()
    write_square(clips / "red.mp4", (255, 0, 0), hertz=300)
    write_square(clips / "blue.mp4", (0, 0, 255))
    write_square(clips / "green.mkv", (0, 255, 0), hertz=2000)
    write_square(clips / "short.mp4", (255, 255, 0), frames=2, hertz=1200)
    (clips / "broken.mp4").write_text("this is no video\n" * 50)
    media_files.write_audio(clips / "beep.wav", media_files.tone(0.5, 8000, 700)[None], 8000, "pcm_s16le")
    (clips / "notes.txt").write_text("no clip")
    names = ("red", "blue", "green", "short", "broken", "beep")
    rows = [{"id": name, "desc": f"a {name} square"} for name in names]
    rows[2]["subtitle"] = "talks"
    (root / "annotations.json").write_text(json.dumps(rows))
    vocabulary = root / "vocab.txt"
    vocabulary.write_text("\n".join([*VOCABULARY, ""]))
    save_model(root / "model", load_torch(GOLDEN / "gram_tiny_ddp.pt", gram_tiny()))
    options = embed.Embed(
        root / "model",
        root / "index",
        clips,
        annotations=root / "annotations.json",
        audios=clips,
        vocabulary=vocabulary,
        **SIZES,
    )
    embed.main(options)
    return ClipIndex(clips, root / "model", vocabulary, root / "index", options)
