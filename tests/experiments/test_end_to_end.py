"""From a released file and a folder of clips to every result, and back to a file that PyTorch loads."""

import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import clip_task, convert, embed, evaluate_clips, galleries, search, train
from gramjax._locks import exclusive
from gramjax.checkpoints import export_torch, load_loss_parameters, load_model, load_torch, read_state_dict
from gramjax.data import audio, clips, media, vision
from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.models import gram_tiny, to_json
from gramjax.training import data_mesh

GOLDEN = Path(__file__).parents[1] / "golden"
ROWS = [
    {"id": "red", "desc": ["a red square", "red moves"], "label": "red square", "subtitle": "talk"},
    {"id": "blue", "desc": "a blue square moves", "label": "blue square"},
    {"id": "green", "desc": ["square talks", "square", "a square beeps"]},
    {"id": "short", "desc": "beep"},
    {"id": "broken", "desc": "a talk"},
    {"id": "beep", "desc": "talk moves", "label": "beep"},
    {"id": "nowhere", "desc": "moves"},
    {"id": "red2", "video_id": "red"},
]
# What can be read of them; the last row has nothing to say and is dropped.
PRESENT = {"red": "va", "blue": "v", "green": "va", "short": "a", "broken": "", "beep": "a", "nowhere": ""}
CLASSES = ("beep", "blue square", "red square")
MODALITIES = ("caption", "vision", "audio")
SIZES = {"frames": 4, "slice_frames": 64, "mel_bins": 32}


class Converted(NamedTuple):
    model: Path
    annotations: Path
    options: evaluate_clips.EvaluateClips


@pytest.fixture(scope="module")
def converted(clip_index, tmp_path_factory) -> Converted:
    root = tmp_path_factory.mktemp("end_to_end")
    (root / "tiny.json").write_text(json.dumps(to_json(gram_tiny())))
    tiny = convert.JSONFile(root / "tiny.json")
    convert.main(convert.Convert(GOLDEN / "gram_tiny_ddp.pt", root / "model", tiny, published="gram_didemo"))
    (root / "annotations.json").write_text(json.dumps(ROWS[:-1]))
    options = evaluate_clips.EvaluateClips(
        root / "model",
        annotations=root / "annotations.json",
        vocabulary=clip_index.vocabulary,
        videos=clip_index.clips,
        audios=clip_index.clips,
        slices=1,
        batch_size=4,
        **SIZES,
    )
    return Converted(root / "model", root / "annotations.json", options)


@pytest.fixture(scope="module")
def results(converted):
    evaluate_clips.main(converted.options)
    # Not in the model's folder, which is replaced as a whole.
    names = ["clips.json", "config.json", "loss.json", "parameters"]
    assert sorted(path.name for path in converted.model.iterdir()) == names
    return json.loads((converted.model.parent / "model-evaluation-didemo" / "results.json").read_text())


@pytest.fixture(scope="module")
def silence_results(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("silence")
    evaluate_clips.main(dataclasses.replace(converted.options, absent="silence", output=folder))
    assert "silence in the place of absent sound" in (folder / "results.md").read_text()
    return json.loads((folder / "results.json").read_text())


class Truth(NamedTuple):
    """Every caption, and the name of every class, against every clip, one clip at a time and without caches."""

    captions: list
    owner: np.ndarray
    volumes: np.ndarray  # NaN where a clip has nothing
    matches: np.ndarray  # yes - no; -inf where a clip has nothing


@pytest.fixture(scope="module")
def model(converted):
    return load_model(converted.model)


@pytest.fixture(scope="module")
def truths(clip_index, converted, model) -> dict[str, Truth]:
    """With clips as they are, and with silence for those that have frames and no sound."""
    tokenizer = WordPieceTokenizer(clip_index.vocabulary)
    captions = [(text, i) for i, row in enumerate(ROWS[:-1]) for text in np.atleast_1d(row["desc"]).tolist()]
    texts = tokenizer([*(text for text, _ in captions), *CLASSES], 64)
    graphdef, variables = nnx.split(model)
    files = {path.stem: path for path in clip_index.clips.iterdir()}

    @jax.jit
    def compare(variables, texts, clip):
        model = nnx.merge(graphdef, variables)
        embedded = model.embed({"caption": texts} | clip)
        condition = model.condition(model.encode(clip), [name for name in ("vision", "audio") if name in clip])
        logits = model.match(texts, jnp.repeat(condition, len(texts["ids"]), axis=0))
        return embedded, logits[:, 1] - logits[:, 0]

    def truth(absent) -> Truth:
        volumes, matches = np.full((2, len(texts["ids"]), len(PRESENT)), [[[np.nan]], [[-np.inf]]])
        for number, (name, letters) in enumerate(PRESENT.items()):
            clip = {}
            if "v" in letters:
                clip["vision"] = vision.preprocess_frames(media.read_frames(files[name], 4), size=42)[None]
            if "a" in letters:
                sound = media.read_audio(files[name])
                clip["audio"] = audio.log_mel_slices(*sound, slice_frames=64, num_mel_bins=32)[None]
            elif clip and absent == "silence":
                clip["audio"] = np.zeros((1, 1, 64, 32), np.float32)
            if not clip:
                continue
            embedded, matches[:, number] = jax.device_get(compare(variables, texts, clip))
            vectors = np.stack([np.broadcast_to(embedded[m], embedded["caption"].shape) for m in ("caption", *clip)], 1)
            gram = np.einsum("tid,tjd->tij", *[vectors.astype(np.float64)] * 2)
            volumes[:, number] = np.sqrt(np.abs(np.linalg.det(gram)))
        return Truth([text for text, _ in captions], np.array([i for _, i in captions]), volumes, matches)

    return {absent: truth(absent) for absent in ("masked", "silence")}


@pytest.fixture(scope="module")
def truth(truths) -> Truth:
    return truths["masked"]


def figures(ranks):
    ranks = np.array(ranks)
    return {f"recall@{k}": (ranks < k).mean() for k in (1, 5, 10)} | {"median rank": np.median(ranks) + 1}


def rank(goodness, right):
    """Of the best right one; what is not there (-inf) finds nothing and is never found."""
    if not np.isfinite(goodness[right]).any():
        return len(goodness)
    return int((~right & (goodness >= goodness[right].max())).sum())


def second_rank(goodness, matches, right, k):
    """The same among the best k in the order of matching, if a right one is among them."""
    candidates = np.argsort(-goodness, kind="stable")[:k]
    candidates = candidates[np.isfinite(goodness[candidates])]
    return rank(matches[candidates], right[candidates]) if right[candidates].any() else rank(goodness, right)


@pytest.mark.parametrize("absent", ["masked", "silence"])
@pytest.mark.parametrize(("way", "queries", "gallery"), [("text_to_item", 10, 7), ("item_to_text", 7, 10)])
def test_the_evaluation_is_that_of_every_pair_alone(results, silence_results, truths, way, queries, gallery, absent):
    truth, found = truths[absent], (results if absent == "masked" else silence_results)["retrieval"][way]
    goodness = np.where(np.isnan(truth.volumes), -np.inf, -truth.volumes)
    tables = [goodness[:10], truth.matches[:10], truth.owner[:, None] == np.arange(7)]
    goodness, matches, right = tables if way == "text_to_item" else [table.T for table in tables]
    assert goodness.shape == (queries, gallery)
    first = [rank(*row) for row in zip(goodness, right)]
    second = [second_rank(*row, k=50) for row in zip(goodness, matches, right)]
    assert found["first stage"] == pytest.approx(figures(first), abs=1e-6)
    assert found["second stage"] == pytest.approx(figures(second), abs=1e-6)
    assert first != second


def test_silence_stands_for_absent_sound_and_subtitles(results, silence_results, truths, clip_index):
    """It changes what is found, and neither clips that have all nor those that have nothing."""
    assert silence_results["retrieval"] != results["retrieval"]
    assert (results["absent"], silence_results["absent"]) == ("masked", "silence")
    assert silence_results["present"] == results["present"]
    changed = [
        name
        for name, *tables in zip(PRESENT, *(truth.volumes.T for truth in truths.values()))
        if not np.array_equal(*tables, equal_nan=True)
    ]
    assert changed == ["blue"]
    contents = embed.read_index(clip_index.index)[1]
    folder = embed._folder(clip_index.options)
    ((batch, before),) = contents.gallery.batches(folder, 6)
    ((silenced, after),) = evaluate_clips._silenced([(batch, before)])
    assert silenced is batch
    names = [clip.id for clip in folder.annotations]
    present = {name: [one for one, there in zip(names, mask) if there] for name, mask in after.items()}
    anything = [name for name in names if name != "broken"]
    assert present == {"vision": ["red", "blue", "green"], "audio": anything, "subtitle": anything}
    assert not batch["audio"][names.index("blue")].any()
    for clip, count in (("blue", 2), ("green", 4)):  # [CLS] [SEP], and words between
        assert batch["subtitle"]["mask"][names.index(clip)].sum() == count


@pytest.mark.parametrize(
    ("changes", "modalities"),
    [
        ({}, ("vision", "audio")),
        ({"absent": "silence"}, ("vision", "audio", "subtitle")),
        ({"absent": "silence", "config": "didemo"}, ("vision", "audio")),
        ({"absent": "silence", "modalities": ("vision",), "match": ("vision",)}, ("vision",)),
    ],
)
def test_subtitles_that_no_clip_has(clip_index, converted, tmp_path, monkeypatch, changes, modalities):
    """Silence of a whole set takes part as that of a single clip does, wherever the data set has subtitles."""
    rows = [{name: value for name, value in row.items() if name != "subtitle"} for row in ROWS[:-1]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    class Embedding(Exception):
        pass

    def embed_items(model, batches, modalities, **options):
        raise Embedding(modalities)

    monkeypatch.setattr(evaluate_clips, "embed_items", embed_items)
    monkeypatch.setattr(galleries.ClipGallery, "load", staticmethod(lambda path, shardings: None))
    options = {"annotations": tmp_path / "rows.json", "config": "msrvtt", "output": tmp_path} | changes
    with pytest.raises(Embedding) as seen:
        evaluate_clips.evaluate(dataclasses.replace(converted.options, **options))
    assert seen.value.args == (modalities,)


def test_conditions_are_kept_in_a_folder_of_its_own(converted, tmp_path, monkeypatch):
    """A killed evaluation may have left one; another that runs keeps its own."""
    seen = []

    def embed_items(*_, conditions, **options):
        seen.append((conditions, list(conditions.iterdir())))
        raise ValueError("stop")

    monkeypatch.setattr(evaluate_clips, "embed_items", embed_items)
    monkeypatch.setattr(galleries.ClipGallery, "load", staticmethod(lambda path, shardings: None))
    options = dataclasses.replace(converted.options, output=tmp_path / "output")
    left = tmp_path / "output" / ".conditions"
    left.mkdir(parents=True)
    (left / "0.npy").touch()
    with exclusive(tmp_path / "output" / ".lock"), pytest.raises(ValueError, match="by another evaluation"):
        evaluate_clips.evaluate(options)
    assert (left / "0.npy").exists()
    with pytest.raises(ValueError, match="stop"):
        evaluate_clips.evaluate(options)
    assert seen == [(left, [])]
    assert not left.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output must be a folder to write to, got .*file: "):
        evaluate_clips.evaluate(dataclasses.replace(options, output=tmp_path / "file"))


def test_what_was_read_is_said(results, truth):
    assert (results["config"], results["match"]) == ("didemo", ["vision", "audio"])
    assert results["present"] == {"vision": 3, "audio": 4}
    assert results["retrieval"]["captions"] == len(truth.captions) == 10
    assert results["unreadable"]["vision"].keys() == {"short", "broken"}
    assert results["missing"]["vision"] == ["beep", "nowhere"]
    assert (results["dropped"], results["duplicates"]) == ([], [])


@pytest.mark.parametrize("stage", ["first stage", "second stage"])
def test_classes_are_told_by_their_names(results, truth, stage):
    found = results["classification"]
    assert (found["classes"], found["clips"]) == (len(CLASSES), 3)
    table = -truth.volumes if stage == "first stage" else truth.matches
    labels = {number: CLASSES.index(row["label"]) for number, row in enumerate(ROWS[:-1]) if "label" in row}
    ranks = [rank(table[-3:, clip], np.arange(3) == label) for clip, label in labels.items()]
    assert found[stage] == pytest.approx({"top-1": np.mean(np.array(ranks) == 0), "top-5": 1.0})


def test_a_sentence_is_searched_and_its_clips_are_read_again(clip_index, converted, truth, capsys):
    """The converted file is the model that the index was made with, wherever it lies."""
    index, contents = embed.read_index(clip_index.index)
    sentence = truth.captions[0]
    by_match = {name: truth.matches[0, number] for number, name in enumerate(PRESENT) if PRESENT[name]}
    best = search.find(index, contents, sentence, 3)
    found = search.find(index, contents, sentence, 4, converted.model, rerank=3)
    # Only the best three by the score change places; the fourth is where it was.
    assert [one.item.name for one in found[:3]] == sorted((one.item.name for one in best), key=lambda n: -by_match[n])
    probabilities = [1 / (1 + np.exp(-by_match[one.item.name])) for one in found[:3]]
    np.testing.assert_allclose([one.match for one in found[:3]], probabilities, atol=1e-5)
    assert found[3].match is None
    assert [one.item.name for one in found] != [one.item.name for one in search.find(index, contents, sentence, 4)]
    search.main(search.Search(clip_index.index, sentence, k=4, rerank=3, picture=clip_index.index / "again.png"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["rank", "match", "residual"]
    assert [line[:12].split() for line in lines[1:4]] == [[str(i + 1), f"{p:.3f}"] for i, p in enumerate(probabilities)]


def test_what_cannot_be_read_again(clip_index):
    index, contents = embed.read_index(clip_index.index)
    with pytest.raises(ValueError, match="rerank is for a sentence and an index of clips"):
        search.find(index, contents, str(clip_index.clips / "red.mp4"), 3, rerank=3)
    with pytest.raises(ValueError, match="rerank must not be negative, got -1"):
        search.find(index, contents, "red", 3, rerank=-1)


class Finetuned(NamedTuple):
    folder: Path
    losses: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def finetuned(clip_index, converted, tmp_path_factory) -> Finetuned:
    """Twenty steps of the training command over four devices: what it exports, and every loss."""
    run_dir = tmp_path_factory.mktemp("finetuned")
    # The same four in every batch, so that what is learned of them shows in every loss.
    rows = [row for row in ROWS[:-1] if row["id"] in ("red", "blue", "green", "beep")]
    (run_dir / "train.json").write_text(json.dumps(rows))
    places = {
        "run-dir": run_dir,
        "initialize": converted.model,
        "vocabulary": clip_index.vocabulary,
        "annotations": run_dir / "train.json",
        "videos": clip_index.clips,
        "audios": clip_index.clips,
        "validation.annotations": converted.annotations,
    }
    sizes = {"train-frames": 2, "eval-frames": 4, "audio-slices": 1, "slice-frames": 64, "mel-bins": 32}
    sizes |= {"image-size": 42, "caption-length": 8, "subtitle-length": 8}
    length = {"steps": 20, "batch-size": 4, "log-every": 1, "validate-every": 20, "dtype": "float32"}
    rates = {"learning-rate": 1e-3, "vision-learning-rate": 1e-3}
    options = places | length | {f"clips.{name}": size for name, size in sizes.items()}
    options |= {f"optimizer.{name}": rate for name, rate in rates.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_task, "data_mesh", lambda: data_mesh(jax.devices()[:4]))
        patch.setattr(sys, "argv", ["train", "--config", "gram_didemo", *words, "--no-remat"])
        train.main()
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Finetuned(
        run_dir / "model", {name: np.array([line[name] for line in logged]) for name in ("loss", "loss/matching")}
    )


@pytest.mark.slow
def test_finetuning_lowers_the_loss(finetuned, converted, model):
    trained, scalars = load_model(finetuned.folder), load_loss_parameters(finetuned.folder)
    # Dropout makes losses of so few clips noisy.
    for name, fall in (("loss", 0.0), ("loss/matching", 0.1)):
        logged = finetuned.losses[name]
        assert len(logged) == 20
        assert np.isfinite(logged).all()
        assert logged[-5:].mean() < logged[:5].mean() - fall
    # Every part takes part: each tower, head, and the fusion; and the temperature.
    before, after = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, trained))
    moved = {path[:2] for path in before if not np.array_equal(before[path][...], after[path][...])}
    assert moved >= {("towers", name) for name in ("text", "vision", "audio")} | {("fusion", "matching_head")}
    assert moved >= {("heads", name) for name in MODALITIES}
    assert float(scalars.temperature) != pytest.approx(
        float(load_loss_parameters(converted.model).temperature), abs=1e-6
    )


@pytest.mark.slow
def test_a_finetuned_model_goes_back_to_pytorch_and_comes_back(finetuned, truth, converted, tmp_path):
    trained, scalars = load_model(finetuned.folder), load_loss_parameters(finetuned.folder)
    export_torch(trained, tmp_path / "model_step_20.pt", loss_parameters=scalars)
    again = load_torch(tmp_path / "model_step_20.pt", trained.config)
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (trained, again)), strict=True):
        np.testing.assert_array_equal(one[...], other[...], err_msg=str(path))
    exported = read_state_dict(tmp_path / "model_step_20.pt")
    np.testing.assert_allclose(exported["contra_temp"], scalars.temperature, rtol=1e-6)
    released = read_state_dict(GOLDEN / "gram_tiny_ddp.pt")
    assert set(exported) <= set(released)
    # The same embeddings, of a converted folder too.
    convert.main(
        convert.Convert(
            tmp_path / "model_step_20.pt", tmp_path / "converted", convert.JSONFile(finetuned.folder / "config.json")
        )
    )
    batch = {"caption": {"ids": np.array([[2, 4, 5, 7, 3]]), "mask": np.ones((1, 5), bool)}}
    graphdef = nnx.graphdef(trained)
    embed_caption = jax.jit(lambda variables: nnx.merge(graphdef, variables).embed(batch)["caption"])
    folder = load_model(tmp_path / "converted")
    vector, *others = (np.asarray(embed_caption(nnx.state(m))) for m in (trained, again, folder))
    for other in others:
        np.testing.assert_array_equal(vector, other)
    assert np.abs(vector - embed_caption(nnx.state(load_model(converted.model)))).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": 0}, "candidates must be positive, got 0"),
        ({"frames": 0}, "eval_frames must be positive, got 0"),
        ({"modalities": ("subtitle",), "match": ("vision",)}, "clips must have one of vision, .*; got subtitle"),
        ({"videos": None, "audios": None}, "clips have none of the model's modalities"),
        ({"require": ("depth",)}, "no clip is left of 7 rows"),
    ],
)
def test_evaluations_that_cannot_be(converted, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_clips.evaluate(dataclasses.replace(converted.options, **changes))


def test_configs_are_the_published_ones():
    literal, _ = typing.get_args(typing.get_type_hints(evaluate_clips.EvaluateClips)["config"])
    names = typing.get_args(literal)
    assert names == tuple(config.name for config in clips.PUBLISHED)


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.evaluate_clips", "nowhere", "--config", "msrvtt"]
    command += ["--annotations", tmp_path / "a.json", "--vocabulary", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 1
    assert result.stderr.startswith("error: annotations must be a JSON file")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
