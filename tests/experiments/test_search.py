"""What a sentence, a sound and a clip find in an index."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import embed, galleries, runs, search
from experiments.config import TrainConfig
from gramjax.checkpoints import load_model
from gramjax.data import audio, emoji, media, pipeline, vision
from gramjax.data.emoji import assets
from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.encoders import BEATsConfig, BERTConfig, VisionConfig
from gramjax.models import to_json
from tests.data import media_files

SENTENCE = "A red square moves."


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.float32) / 255


@pytest.fixture(scope="module")
def model(clip_index):
    return load_model(clip_index.model)


@pytest.fixture(scope="module")
def opened(clip_index):
    return embed.read_index(clip_index.index)


@pytest.fixture
def loaded(monkeypatch, model):
    """Every search would read the model again."""
    monkeypatch.setattr(galleries.ClipGallery, "load", staticmethod(lambda path: model))


@pytest.fixture(scope="module")
def embedded(clip_index, model):
    """The sentence and what the clips have, read and embedded without galleries and batches of clips."""
    names = {"vision": ("red", "blue", "green"), "audio": ("red", "green", "short", "beep")}
    files = {path.stem: path for path in clip_index.clips.iterdir()}
    tokenizer = WordPieceTokenizer(clip_index.vocabulary)
    frames = [vision.preprocess_frames(media.read_frames(files[name], 4), size=42) for name in names["vision"]]
    sounds = [
        audio.log_mel_slices(*media.read_audio(files[name]), slice_frames=64, num_mel_bins=32)
        for name in names["audio"]
    ]
    # Of the shapes of the batches that made the index, and so compiled already.
    batch = {
        "vision": np.stack([*frames, frames[0]]),
        "audio": np.stack(sounds),
        "subtitle": tokenizer(["talks"] * 4, 64),
    }
    graphdef, variables = nnx.split(model)
    run = jax.jit(lambda variables, batch: nnx.merge(graphdef, variables).embed(batch))
    vectors = jax.device_get(run(variables, batch) | run(variables, {"caption": tokenizer([SENTENCE], 40)}))
    items = {
        name: {kind: vectors[kind][found.index(name)] for kind, found in names.items() if name in found}
        for name in ("red", "blue", "green", "short", "beep")
    }
    items["green"]["subtitle"] = vectors["subtitle"][0]
    return vectors["caption"][0], items


def test_a_sentence_ranks_clips_as_numpy_does(opened, loaded, embedded):
    sentence, items = embedded
    expected = {}
    for name, vectors in items.items():
        basis = np.linalg.qr(np.stack(list(vectors.values())).astype(np.float64).T)[0]
        expected[name] = np.linalg.norm(sentence - basis @ (basis.T @ sentence.astype(np.float64)))
    found = search.find(*opened, SENTENCE, 10)
    assert [one.item.name for one in found] == sorted(expected, key=expected.__getitem__)
    np.testing.assert_allclose([one.score for one in found], sorted(expected.values()), atol=1e-5)
    assert [opened[1].items[one.position] for one in found] == [one.item for one in found]
    assert [one.item for one in search.find(*opened, SENTENCE, 2)] == [one.item for one in found[:2]]


@pytest.mark.parametrize("name", ["red.mp4", "blue.mp4", "green.mkv", "beep.wav"])
def test_a_clip_and_a_sound_find_themselves_first(clip_index, opened, loaded, name):
    best, second, *_ = search.find(*opened, str(clip_index.clips / name), 5)
    assert best.item.name == name.split(".")[0]
    assert best.score < 1e-4 < second.score


def test_the_table_and_the_contact_sheet(clip_index, loaded, tmp_path, capsys):
    search.main(search.Search(clip_index.index, SENTENCE, k=5, picture=tmp_path / "new" / "sheet.png"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["rank", "residual", "(lower", "is", "better)", "name", "file", "or", "caption"]
    assert [line.split()[0] for line in printed[1:6]] == list("12345")
    assert ["red", "a", "red", "square"] in [line.split()[2:] for line in printed[1:6]]
    picture = read(tmp_path / "new" / "sheet.png")
    for colour in ((1, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0)):
        assert (np.abs(picture - colour).max(axis=-1) < 0.2).sum() > 500, f"the square of {colour}"
    assert (np.abs(picture - 1 / 3).max(axis=-1) < 0.05).sum() > 500, "the waveform of the beep"
    assert not (clip_index.index / "search.png").exists()


def test_items_without_a_picture_are_drawn(clip_index, opened):
    gone = galleries.Item("gone", video="nowhere.mp4")
    audible = galleries.Item("audible", video=str(clip_index.clips / "broken.mp4"), audio=opened[1].items[4].audio)
    looks = opened[1].gallery.pictures([(0, gone), (1, audible)])
    assert looks[0] is None
    assert looks[1].ndim == 1


def test_queries_that_cannot_be_asked(clip_index, opened, loaded, model, monkeypatch, tmp_path):
    index, contents = opened

    def fails(message, query=SENTENCE, contents=contents, k=3):
        with pytest.raises(ValueError, match=message):
            search.find(index, contents, query, k)

    fails("k must be positive, got 0", k=0)
    fails("query must be a sentence or a file, got ' '", " ")
    fails(r"query must be a sentence or a file, got nowhere\.mp4, which does not exist", "nowhere.mp4")
    fails(r"query must be a sentence or a file of \.mp4, .* got .*notes\.txt", str(clip_index.clips / "notes.txt"))
    fails(r"query cannot be read: .*broken\.mp4", str(clip_index.clips / "broken.mp4"))
    wordless = dataclasses.replace(contents.gallery, vocabulary=None)
    fails("query must be a file", contents=dataclasses.replace(contents, gallery=wordless))
    fails("model must be the one that the index was made with", contents=dataclasses.replace(contents, digest="0"))
    with pytest.raises(ValueError, match="index must be a folder"):
        search.main(search.Search(tmp_path, SENTENCE))


def test_what_lies_elsewhere_now_is_asked_for(clip_index, loaded, model, tmp_path):
    index, contents = embed.read_index(clip_index.index)
    moved = tmp_path / "moved.txt"
    contents = dataclasses.replace(
        contents, model="gone", gallery=dataclasses.replace(contents.gallery, vocabulary=str(tmp_path / "gone.txt"))
    )
    embed.write_index(tmp_path / "index", index, contents)
    options = search.Search(tmp_path / "index", SENTENCE, vocabulary=clip_index.vocabulary)
    with pytest.raises(ValueError, match=r"model must be where .* it is now \(--model\), got gone"):
        search.main(options)
    options = dataclasses.replace(options, model=clip_index.model)
    with pytest.raises(ValueError, match=r"vocabulary must be where .* it is now \(--vocabulary\), got .*moved\.txt"):
        search.main(dataclasses.replace(options, vocabulary=moved))
    with pytest.raises(ValueError, match=r"vocabulary must be where .* it is now \(--vocabulary\), got .*gone\.txt"):
        search.main(dataclasses.replace(options, vocabulary=None))
    search.main(options)
    wordless = dataclasses.replace(contents, gallery=dataclasses.replace(contents.gallery, vocabulary=None))
    embed.write_index(tmp_path / "wordless", index, wordless)
    with pytest.raises(ValueError, match="vocabulary is for an index of clips that was made with one"):
        search.main(dataclasses.replace(options, index=tmp_path / "wordless"))


def test_what_is_a_sentence_and_what_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dogs").mkdir()
    (tmp_path / "cats").touch()
    for sentence in ("dogs", "cats", "A dog. It runs.", "a very long walk " * 100, "a / b"):
        assert galleries.query_file(sentence, (".mp4",)) is None
    (tmp_path / "A.MP4").touch()
    assert galleries.query_file("A.MP4", (".mp4",)).name == "A.MP4"


class Split(emoji.EmojiSplit):
    """Six pictographs of the test split, spoken as chirps."""

    name = "test"

    def __init__(self):
        records = assets.load_records()
        self.chosen = [number for number, record in enumerate(records) if record["split"] == "test"][::60]
        self.drawings = {artist: assets.load_pictures(artist) for artist in emoji.PICTURES}

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, position):
        number = self.chosen[position]
        record = assets.load_records()[number]
        chirp = media_files.tone(0.6, hertz=300 + 200 * position) * np.linspace(0.2, 1, 9600) * 2**15
        return {
            "index": number,
            "label": record["label"],
            "flip": record["flip"],
            "english": {"name": record["english"]["name"], "keywords": []},
            "twitter": emoji.builder._encode_png(self.drawings["twitter"][number]).getvalue(),
            "speech": dict.fromkeys(emoji.VOICES, chirp.astype(np.int16)),
        }


@pytest.fixture(scope="module")
def emoji_index(tmp_path_factory):
    """The index of a run that was stopped before its first step."""
    root = tmp_path_factory.mktemp("emoji_index")
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}
    config = TrainConfig(
        run_dir=root / "run",
        data_dir=root / "data",
        embed_dim=16,
        vision=VisionConfig(image_size=32, patch_size=8, **sizes),
        text=BERTConfig(vocab_size=3072, max_length=48, **sizes),
        audio=BEATsConfig(patch_dim=8, position_kernel=4, position_groups=1, num_buckets=8, max_distance=16, **sizes),
    )
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(json.dumps(to_json(config)))
    with runs.open_checkpoints(config.run_dir) as checkpoints:
        checkpoints.save(0, runs.build(config)[1], metrics={runs.BEST_METRIC: 0.0})
    with pytest.MonkeyPatch.context() as patch:
        split = functools.cache(Split)
        patch.setattr(emoji, "load_split", lambda data_dir, name: split())
        load_run = functools.cache(runs.load_run)
        patch.setattr(embed, "load_run", load_run)
        patch.setattr(galleries, "load_run", load_run)
        embed.main(embed.Embed(config.run_dir, root / "index", emoji=True, batch_size=4))
        yield split(), root / "index"


def test_pictographs_are_found_by_their_drawing_and_by_their_speech(emoji_index, tmp_path):
    split, path = emoji_index
    index, contents = embed.read_index(path)
    assert [item.name for item in contents.items] == [example["english"]["name"] for example in split]
    assert (contents.gallery.language, contents.gallery.modalities) == ("english", ("twitter", "speech"))
    (tmp_path / "drawing.png").write_bytes(split[3]["twitter"])
    speech = split[2]["speech"][emoji.TEST_VOICE] / np.float32(2**15)
    media_files.write_audio(tmp_path / "speech.wav", speech[None].astype(np.float32), 16000, "pcm_s16le")
    for file, right in (("drawing.png", 3), ("speech.wav", 2)):
        best, second, *_ = search.find(index, contents, str(tmp_path / file), 3)
        assert best.position == right
        assert best.score < 1e-3 < second.score


def test_a_name_is_written_as_it_is_for_evaluation(emoji_index):
    split, path = emoji_index
    gallery = embed.read_index(path)[1].gallery
    (batch,) = pipeline.make_loader(split, modalities=("english",), batch_size=len(split), seed=0, train=False)
    for row, example in enumerate(split):
        query = gallery.query(example["english"]["name"])["english"]
        for part in ("ids", "mask"):
            np.testing.assert_array_equal(query[part][0], batch["english"][part][row])


def test_pictographs_are_drawn(emoji_index, capsys):
    _, path = emoji_index
    search.main(search.Search(path, "red heart", k=3))
    assert len(capsys.readouterr().out.splitlines()) == 6
    assert read(path / "search.png").std() > 0.1
    with pytest.raises(ValueError, match=r"query must be a sentence or a file, got gone\.png"):
        search.main(search.Search(path, "gone.png"))
    assert jnp.isfinite(embed.read_index(path)[0].prepared.volume).all()
