"""A folder of clips, the small released model, and the index of the one by the other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from flax import nnx

from experiments import embed
from gramjax.checkpoints import load_torch, read_state_dict, save_model
from gramjax.models import GramModel, LossParameters, gram_tiny
from tests.data import media_files

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "moves", "beep", "talk", "##s")
# As many as the small model has.
VOCABULARY = (*WORDS, *(f"[unused{number}]" for number in range(97 - len(WORDS))))
SIZES = {"frames": 4, "slice_frames": 64, "mel_bins": 32, "batch_size": 4}
TRAINED_ON = ("red", "blue", "green", "grey", "white", "mute")


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


def shallow(model):
    """The first layer of every tower, without dropout: compilation is what takes time here."""
    off = {
        "vision": {"drop_path_rate": 0.0},
        "audio": {"dropout_rate": 0.0, "attention_dropout_rate": 0.0, "layer_drop_rate": 0.0},
        "text": {"dropout_rate": 0.0, "attention_dropout_rate": 0.0},
    }
    config = model.config
    config = replace(config, towers={name: replace(x, depth=1, **off[name]) for name, x in config.towers.items()})
    result = nnx.eval_shape(lambda: GramModel(config, rngs=nnx.Rngs(0)))
    kept = {path for path, _ in nnx.to_flat_state(nnx.state(result))}
    nnx.update(result, nnx.from_flat_state([item for item in nnx.to_flat_state(nnx.state(model)) if item[0] in kept]))
    return result


@pytest.fixture(scope="session")
def training_clips(tmp_path_factory) -> Path:
    """A folder with clips, annotations to train on and held out, a vocabulary, and a shallow model to start from."""
    root = tmp_path_factory.mktemp("clips")
    (root / "videos").mkdir()
    for number, name in enumerate(TRAINED_ON):
        colour = np.random.default_rng(number).integers(0, 256, 3)
        write_square(root / f"videos/{name}.mp4", colour, 4, hertz=None if name == "mute" else 300 + 200 * number)
    rows = [
        {"id": name, "desc": f"a {name} square" if number else ["red beep", "talk"]}
        for number, name in enumerate(TRAINED_ON)
    ]
    (root / "train.json").write_text(json.dumps(rows))
    (root / "held_out.json").write_text(json.dumps(rows[:3]))
    (root / "vocab.txt").write_text("\n".join([*VOCABULARY, ""]))
    golden = GOLDEN / "gram_tiny_ddp.pt"
    model = shallow(load_torch(golden, gram_tiny()))
    save_model(root / "model", model, loss_parameters=LossParameters.from_torch(read_state_dict(golden)))
    return root
