"""The studies: what a cell trains on and keeps, what is measured, and that every study runs from features to tables."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config import ConfigError
from experiments.studies import all as every_study
from experiments.studies import cells, classification, compare_losses, features, measure, objectives, study, what_fails
from experiments.studies.families import CANDIDATES, PUBLISHED
from gramjax import losses
from tests import reference

NAMES = ("text", "picture", "sound")


def _arrays(items=(40, 16, 20), width=8):
    rng = np.random.default_rng(0)
    views = {name: rng.normal(size=(6, width)) for name in NAMES}
    arrays = {}
    for split, number in zip(features.SPLITS, items):
        labels = rng.integers(3, size=number)
        hidden = rng.normal(size=(number, 6)) + 2 * np.eye(6)[labels]
        for name, view in views.items():
            seen = hidden @ view
            copies = seen[:, None] + 0.1 * rng.normal(size=(number, 2, width))
            arrays[f"{split}/{name}"] = (copies if split == "train" else seen).astype(np.float32)
        arrays[f"{split}/label"] = labels
    arrays["classes/text"] = (2 * np.eye(6)[:3] @ views["text"]).astype(np.float32)
    return arrays


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(path, **_arrays())
    return path


@pytest.fixture(scope="module")
def frozen(file):
    return features.read(file)


def _cell(*objective, **settings):
    settings = {"steps": 4, "batch_size": 16, "embed_dim": 5, "hidden": 7, **settings}
    return cells.Cell(objective or (objectives.Pairwise(0.1),), modalities=NAMES, anchor="text", **settings)


def test_a_cell_is_trained_once_and_repeats_exactly(frozen, tmp_path, capsys):
    cell = _cell(snapshots=2)
    (first,) = cells.load_or_train([cell], frozen, tmp_path)
    assert "cell 1 of 1" in capsys.readouterr().out
    (again,) = cells.load_or_train([cell], frozen, tmp_path)
    assert capsys.readouterr().out == ""
    anew = cells.train(cell, frozen)
    for other in (again, anew):
        for snapshot in (0, 1):
            one, two = (trained.embed(frozen.test, snapshot=snapshot) for trained in (first, other))
            for name in NAMES:
                np.testing.assert_array_equal(one[name], two[name])
    early, late = (first.embed(frozen.test, snapshot=snapshot)["text"] for snapshot in (0, 1))
    assert np.abs(early - late).max() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(late, axis=1), 1, rtol=1e-5)


def _flip_middle(whole):
    place = len(whole) // 2
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-40], lambda whole: b"", _flip_middle])
def test_a_damaged_cell_is_trained_again(frozen, tmp_path, capsys, damage):
    (first,) = cells.load_or_train([_cell()], frozen, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    (again,) = cells.load_or_train([_cell()], frozen, tmp_path)
    assert f"{path} is damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(again.embed(frozen.test)["text"], first.embed(frozen.test)["text"])
    assert cells.load_or_train([_cell()], frozen, tmp_path)
    assert capsys.readouterr().err == ""


def test_towers_embed_as_they_were_trained(frozen):
    """The kept parameters against the module they come from."""
    cell = _cell(dropout=0.0)
    tower = cells.Tower(8, cell, rngs=nnx.Rngs(3))
    kept = {"linear/kernel": tower.linear.kernel, "hidden/kernel": tower.hidden.kernel}
    kept |= {"hidden/bias": tower.hidden.bias, "out/kernel": tower.out.kernel}
    trained = cells.Trained(cell, [{"text": {name: np.asarray(value[...]) for name, value in kept.items()}}])
    expected = tower(jnp.asarray(frozen.test["text"]), nnx.Rngs(0))
    np.testing.assert_allclose(trained.embed(frozen.test, only=("text",))["text"], expected, rtol=1e-5, atol=1e-6)


def test_every_setting_names_another_cell(frozen):
    plain = _cell()
    others = [_cell(objectives.Anchored(0.1)), _cell(objectives.Pairwise(0.2)), _cell(seed=1), _cell(missing=0.5)]
    names = {cells.fingerprint(cell, frozen) for cell in (plain, *others)}
    assert len(names) == 5
    changed = dataclasses.replace(frozen, fingerprint="other")
    assert cells.fingerprint(plain, changed) not in names


def test_what_is_missing_and_mismatched(frozen):
    banks, where = cells.training_arrays(_cell(missing=0.5), frozen, np.random.default_rng(0))
    assert where[:, 0].all()
    assert 0.2 < where[:, 1:].mean() < 0.8
    for name in NAMES:
        np.testing.assert_array_equal(banks[name], frozen.train[name])
    absent = ~where
    for fill in ("zero", "mean"):
        banks, where = cells.training_arrays(_cell(missing=0.5, fill=fill), frozen, np.random.default_rng(0))
        assert where.all()
        for column, name in enumerate(NAMES):
            there = ~absent[:, column]
            np.testing.assert_array_equal(banks[name][there], frozen.train[name][there])
            expected = 0.0 if fill == "zero" else frozen.train[name][there].mean(axis=(0, 1))
            filled = banks[name][absent[:, column]]
            np.testing.assert_allclose(filled, np.broadcast_to(expected, filled.shape), rtol=1e-5, atol=1e-6)
    banks, where = cells.training_arrays(_cell(mismatched=0.4), frozen, np.random.default_rng(0))
    np.testing.assert_array_equal(banks["text"], frozen.train["text"])
    moved = (banks["sound"] != frozen.train["sound"]).any(axis=(1, 2))
    assert 0.1 < moved.mean() < 0.7
    assert sorted(banks["sound"].sum((1, 2)).tolist()) == sorted(frozen.train["sound"].sum((1, 2)).tolist())


def test_terms_are_the_losses_with_their_weights():
    rng = np.random.default_rng(0)
    embeddings = {name: jnp.asarray(reference.unit(rng, 6, 5), jnp.float32) for name in NAMES}
    z = jnp.stack(list(embeddings.values()), axis=1)
    where = jnp.asarray(rng.random((6, 3)) < 0.7).at[0].set(True)
    ids = jnp.array([0, 1, 2, 0, 4, 5])
    objective = (objectives.Gram(0.3, weight=2.0), objectives.Directions(0.2), objectives.OwnVolume(1.0, weight=0.5))
    total, parts = objectives.loss(
        objective, embeddings, {}, anchor="picture", where=where, ids=ids, key=jax.random.key(0)
    )
    gram = losses.gram_loss(z, anchor=1, temperature=0.3, where=where, ids=ids)
    apart = losses.direction_regularization(z, temperature=0.2, where=where, ids=ids)
    both = [i for i in range(6) if where[i, 0] and where[i, 2]]
    own = np.mean([reference.volume(np.asarray(z)[i, [0, 2]]) for i in both])
    np.testing.assert_allclose(total, 2 * gram + apart + 0.5 * own, rtol=1e-5)
    assert len(parts) == 3


def test_mean_recall_and_joint_against_loops():
    assert measure.mean_recall([np.array([0, 4, 9, 30])]) == pytest.approx((1 / 4 + 2 / 4 + 3 / 4) / 3)
    rng = np.random.default_rng(0)
    embedded = {name: reference.unit(rng, 12, 5).astype(np.float32) for name in NAMES}
    where = rng.random((12, 2)) < 0.7
    where[:, 0] |= ~where.any(1)
    items = np.stack([embedded["picture"], embedded["sound"]], axis=1)
    table = np.array([[reference.volume([q, *items[j, where[j]]]) for j in range(12)] for q in embedded["text"]])
    ranks, _ = measure.ranks(measure.ITEM_SCORES["volume"], embedded["text"], items, where)
    np.testing.assert_array_equal(ranks, (table < np.diag(table)[:, None]).sum(1))
    joint = measure.joint(embedded, "text", ["mean cosine"])["mean cosine"]
    cosines = embedded["text"] @ (embedded["picture"] + embedded["sound"]).T
    both = [(one > np.diag(one)[:, None]).sum(1) for one in (cosines, cosines.T)]
    assert joint == pytest.approx(np.mean([np.mean(part < k) for part in both for k in (1, 5, 10)]))
    assert set(measure.any_to_any(embedded)) == {f"{a} -> {b}" for a in NAMES for b in NAMES if a != b}


def test_classification_figures():
    labels = np.array([0, 0, 0, 1])
    assert classification.balanced_accuracy(np.array([0, 0, 1, 1]), labels) == pytest.approx((2 / 3 + 1) / 2)
    rng = np.random.default_rng(0)
    of = {split: rng.integers(3, size=60) for split in features.SPLITS}
    seen = {split: np.eye(3)[part] + 0.05 * rng.normal(size=(60, 3)) for split, part in of.items()}
    assert classification.linear_probe(seen, of) == 1
    shuffled = {split: rng.permutation(part) for split, part in of.items()}
    assert classification.linear_probe(seen, shuffled) < 0.6
    embedded = {"a": reference.unit(rng, 4, 3), "b": reference.unit(rng, 4, 3)}
    cosines = classification.class_cosines(embedded, labels)
    mean = lambda pairs: np.mean([embedded[x][i] @ embedded[y][j] for x in "ab" for y in "ab" for i, j in pairs])  # noqa: E731
    within, across = mean([(0, 1), (0, 2), (1, 2)]), mean([(0, 3), (1, 3), (2, 3)])
    expected = np.array([[within, across], [across, np.nan]])
    np.testing.assert_allclose(cosines, expected - np.nanmean(expected), rtol=1e-6)


def test_the_tuned_temperature_is_the_best_on_validation(file, tmp_path):
    this = study.Study("t", study.Options(features=file, anchor="text", modalities=NAMES, output=tmp_path, seeds=1))
    settings = {"steps": 6, "batch_size": 16, "embed_dim": 5, "hidden": 7}
    candidates = [(objectives.Pairwise(temperature, weight=0.5),) for temperature in (0.05, 30.0)]
    cell = this.tuned("pairs", candidates, **settings)
    recalls = {}
    for candidate in candidates:
        (trained,) = this.train([this.cell(candidate, **settings)])
        recalls[candidate] = max(measure.joint(trained.embed(this.features.validation), "text").values())
    best = max(recalls, key=recalls.__getitem__)
    assert cell.objective == best
    this.write({}, {})
    tuned = json.loads((tmp_path / "t" / "results.json").read_text())["tuned"]["pairs"]
    assert tuned == {"setting": objectives.describe(best), "validation": pytest.approx(recalls[best]), "tried": 2}
    line = f"| pairs | 0.5 Pairwise(temperature={best[0].temperature:g}) | {100 * recalls[best]:.1f} | 2 |"
    assert line in (tmp_path / "t" / "results.md").read_text().splitlines()


def test_tables():
    rows = {"a": {"x": study.spread([0.1, 0.3])}, "b": {"x": study.spread([0.25, 0.25]), "y": study.spread([1.0])}}
    lines = study.table(rows, {"X": "x", "Y": "y"}, corner="row").splitlines()
    assert lines[0] == "| row | X | Y |"
    assert lines[2] == "| a | 20.0 ± 14.1 |  |"
    assert lines[3] == "| b | **25.0** ± 0.0 | **100.0** |", "one value has no spread"


def _with_nan(array):
    array = array.copy()
    array[0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"train/depth": a["train/text"]},
            r"every modality must be in train and in validation.*\['depth'\]",
        ),
        (lambda a: a | {"test/text": _with_nan(a["test/text"])}, r"test/text must be finite in float32, got 1 entries"),
        (lambda a: a | {"test/text": a["test/text"][:, :-1]}, r"test/text must be as wide as train/text, \d+, got"),
        (
            lambda a: a | {"test/text": a["test/text"][:, None]},
            r"test/text must be numbers .* of shape \(\d+, 1, \d+\)",
        ),
        (lambda a: a | {"train/text": a["train/text"][:, 0, 0]}, r"train/text must be numbers .* of shape \(\d+,\)"),
        (lambda a: a | {"test/text": a["test/text"][:0]}, r"test/text must be numbers .* none of them 0"),
        (lambda a: a | {"test/text": a["test/text"].astype(str)}, r"test/text must be numbers .* got <U"),
        (lambda a: a | {"test/label": np.array([0.5])}, r"test/label must be integers \[items\], got float64"),
        (lambda a: a | {"middle/text": a["test/text"]}, r"SPLIT/MODALITY.*'middle/text'"),
        (lambda a: a | {"test/text": a["test/text"][:3]}, r"features of test must be of the same items"),
        (lambda a: {name: a[name] for name in a if name.endswith("text")}, r"two or more modalities"),
    ],
)
def test_features_that_do_not_fit(change, message, tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, **change(_arrays()))
    with pytest.raises(ConfigError, match=message):
        features.read(path)


def test_files_and_options_that_do_not_fit(file, tmp_path):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(file.read_bytes()[:100])
    for path in (broken, tmp_path / "none.npz"):
        with pytest.raises(ConfigError, match=r"features must be an .npz file"):
            features.read(path)
    for options, message in (
        ({"modalities": ("text", "smell")}, r"modalities must be among .*got \['smell'\]"),
        ({"modalities": ("picture", "sound")}, r"must be different and hold the anchor"),
        ({"modalities": ("text",)}, r"two or more"),
        ({"seeds": 0}, r"seeds must be at least 1, got 0"),
        ({"output": file}, r"output must be a folder that can be made, got "),
    ):
        given = {"features": file, "anchor": "text", "modalities": NAMES, "output": tmp_path, **options}
        with pytest.raises(ConfigError, match=message):
            study.Study("t", study.Options(**given))


def test_whitening_evens_out_training_axes_and_moves_the_rest_with_them():
    rng = np.random.default_rng(0)
    scale = np.array([10.0, 1.0, 0.1])
    rows = {"train": rng.normal(size=(50, 2, 3)) * scale + 5, "test": rng.normal(size=(7, 1, 3)) * scale + 5}
    out = features.whiten(rows, axes=2, ridge=0.0)
    assert out["train"].shape == (50, 2, 2)
    assert out["test"].shape == (7, 2)
    flat = out["train"].reshape(-1, 2)
    np.testing.assert_allclose(np.cov(flat.T, bias=True), np.eye(2), atol=1e-5)
    centred = rows["test"][:, 0] - rows["train"].reshape(-1, 3).mean(0)
    fitted, *_ = np.linalg.lstsq(centred, out["test"], rcond=None)  # one linear map takes all held-out rows
    np.testing.assert_allclose(centred @ fitted, out["test"], atol=1e-4)


def test_families_have_distinct_objectives():
    every = [candidate for family in (PUBLISHED | CANDIDATES).values() for candidate in {*map(repr, family)}]
    assert all(len({*map(repr, family)}) == len(family) for family in (PUBLISHED | CANDIDATES).values())
    # Only a sum that is tuned apart has the settings of the one with a single temperature as well.
    shared = [
        one for name in CANDIDATES if ", tuned apart" in name for one in (PUBLISHED | CANDIDATES).get(name[:-13], [])
    ]
    assert len(every) - len({*every}) == len(shared)


def test_log_volumes_against_determinants():
    rng = np.random.default_rng(0)
    z = reference.unit(rng, 5, 3, 8)
    own = np.array([np.log(reference.volume(item[1:])) for item in z])
    table = np.array([[np.log(reference.volume([query[0], *item[1:]])) for item in z] for query in z])

    @functools.partial(jax.jit, static_argnums=0)
    def of(score, queries, items):
        there = jnp.ones((5, 2), bool)
        pairs = lambda by: score.pairs(queries, score.prepare(by * items, there))  # noqa: E731
        return score.tile(queries, score.prepare(items, there)), pairs(1.0), jax.grad(lambda by: pairs(by).mean())(1.0)

    for bias, detached in ((0.5, False), (1.0, True)):
        score = objectives.LogVolume(bias=bias, detached=detached)
        found, pairs, growth = of(score, jnp.asarray(z[:, 0], jnp.float32), jnp.asarray(z[:, 1:], jnp.float32))
        np.testing.assert_allclose(found, table - bias * own, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(pairs, np.diag(table) - bias * own, rtol=1e-4, atol=1e-6)
        # The logarithm of an item's own volume grows by 1 with that of each of its two vectors' lengths.
        assert float(growth) == pytest.approx(2 * (1 - (0.0 if detached else bias)), rel=1e-4)


@pytest.mark.slow
def test_every_study_runs_from_features_to_tables(file, tmp_path, capsys):
    options = study.Options(features=file, anchor="text", modalities=NAMES, output=tmp_path, quick=True)
    every_study.run(options)
    for name in (
        "compare_losses", "what_fails", "modality_scaling", "missing_modalities", "pmrl_ablations", "classification",
        "batch_size", "metric_correlation",
    ):  # fmt: skip
        assert json.loads((tmp_path / name / "results.json").read_text())["features"] == features.read(file).fingerprint
        assert "| :-- |" in (tmp_path / name / "results.md").read_text()
        assert list((tmp_path / name).glob("*.png"))
    capsys.readouterr()
    compare_losses.run(options)
    what_fails.run(options)
    assert "cell 1 of" not in capsys.readouterr().out, "everything was trained before"
