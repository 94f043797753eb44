"""The figures of single studies against truths by hand: searches with missing vectors, intervals, norms, margins."""

import numpy as np
import pytest
import scipy.stats

from experiments.studies import cells, features, metric_correlation, objectives, pmrl_ablations, what_fails
from experiments.studies.missing_modalities import search
from tests import reference

NAMES = ("text", "picture", "sound")


def _identity(width):
    """A trained cell whose towers only bring features to unit length."""
    cell = cells.Cell((objectives.Pairwise(0.1),), modalities=NAMES, anchor="text", embed_dim=width, hidden=1)
    tower = {"linear/kernel": np.eye(width), "hidden/kernel": np.zeros((width, 1)), "hidden/bias": np.zeros(1)}
    tower["out/kernel"] = np.zeros((1, width))
    return cells.Trained(cell, [{name: {key: v.astype(np.float32) for key, v in tower.items()} for name in NAMES}])


def _frozen(train, test):
    """Features of one copy."""
    train = {name: rows[:, None].astype(np.float32) for name, rows in train.items()}
    test = {name: rows.astype(np.float32) for name, rows in test.items()}
    return features.FeatureSet(train, test, test, {}, {}, "")


def _circle(degrees):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_search_leaves_one_vector_or_fills_up():
    """Both modalities are as the text is, so that it does not matter which of them an item keeps."""
    points = _circle(np.arange(12) * 30 + 5)
    frozen = _frozen(dict.fromkeys(NAMES, np.tile([[0.0, 0.7]], (5, 1))), dict.fromkeys(NAMES, points))
    trained = _identity(2)
    assert search(frozen, trained, 1.0, "mask", "mean cosine") == 1
    assert search(frozen, trained, 1.0, "zero", "mean cosine") == 1  # halves every score
    filled = points @ (points + np.array([0.0, 1.0])).T  # the training mean's direction stands beside what was kept
    ranks = [(one > np.diag(one)[:, None] + 1e-6).sum(1) for one in (filled, filled.T)]
    expected = np.mean([np.mean(part < k) for part in ranks for k in (1, 5, 10)])
    assert expected < 0.95
    assert search(frozen, trained, 1.0, "mean", "mean cosine") == pytest.approx(expected)
    assert search(frozen, trained, 0.0, "mean", "mean cosine") == 1


def test_examined_arities():
    """All complete items lie nearer to everything than any bare one, by volume, and are told apart among themselves."""
    plane = np.concatenate([_circle(np.arange(24) * 7), np.zeros((24, 2))], axis=1)
    aside, up = 0.2 * np.eye(4)[2], np.outer(np.linspace(0.01, 0.012, 24), np.eye(4)[3])
    test = {"text": plane, "picture": plane + aside + up, "sound": plane + aside - up}
    found = what_fails.examine(_frozen(test, test), _identity(4), "volume")
    assert found["one among both"] == 0
    assert found["one among ones"] == found["all among both"] == found["all among all"] == 1


def _runs(settings, runs, snapshots, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: {"x": float(rng.integers(4)), "y": float(rng.normal())}  # noqa: E731
    return [[[draw() for _ in range(snapshots)] for _ in range(runs)] for _ in range(settings)]


@pytest.mark.parametrize("of", [metric_correlation.over_training, metric_correlation.over_runs])
def test_interval_against_a_loop(of):
    settings = _runs(5, 2, 4)

    def spearman(points):
        x, y = (scipy.stats.rankdata([one[name] for one in points]) for name in "xy")
        return np.corrcoef(x, y)[0, 1] if np.ptp(x) > 0 else np.nan

    def loop(chosen):
        runs = [run for number in chosen for run in settings[number]]
        if of is metric_correlation.over_training:
            return np.nanmean([spearman(run) for run in runs])
        return spearman([run[-1] for run in runs])

    rng = np.random.default_rng(0)
    drawn = np.array([loop(rng.integers(5, size=5)) for _ in range(300)], float)
    value, low, high = metric_correlation.interval(of, settings, "x", "y", samples=300)
    assert value == pytest.approx(loop(range(5)))
    np.testing.assert_allclose([low, high], np.nanpercentile(drawn, (2.5, 97.5)), rtol=1e-9)


def test_intervals_resample_settings_with_all_their_runs():
    """Two settings, one always rising and one always falling: a quarter of the samples is of either alone."""
    rising = [{"x": float(step), "y": float(step)} for step in range(3)]
    falling = [{"x": float(step), "y": -float(step)} for step in range(3)]
    settings = [[rising] * 8, [falling] * 8]
    assert metric_correlation.interval(metric_correlation.over_training, settings, "x", "y") == (0, -1, 1)
    still = [{"x": 1.0, "y": float(step)} for step in range(3)]  # has no correlation, and no part in the mean
    found = metric_correlation.interval(metric_correlation.over_training, [[rising, still]] * 2, "x", "y")
    assert found == (1, 1, 1)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_gradient_norm_against_differences(temperature):
    rng = np.random.default_rng(0)
    train = {name: reference.unit(rng, 4, 3) for name in NAMES}
    found = pmrl_ablations.gradient_norm(_frozen(train, train), _identity(3), -1, temperature)
    z = np.stack([*train.values()], axis=1)

    def loss(z):
        values = np.linalg.svd(z, compute_uv=False) / temperature
        return np.log(np.exp(values - values[:, :1]).sum(1))

    gradient = np.empty_like(z)
    for place in np.ndindex(z.shape[1:]):
        step = np.zeros_like(z)
        step[:, *place] = 1e-6
        gradient[:, *place] = (loss(z + step) - loss(z - step)) / 2e-6
    assert found == pytest.approx(np.linalg.norm(gradient, axis=(1, 2)).mean(), rel=1e-3)


def test_margin_is_of_the_same_seeds():
    ours, other = ({"items": {"values": values}} for values in ([0.5, 0.7, 0.6], [0.4, 0.4, 0.5]))
    found = what_fails.margin(ours, other, "items")
    assert found["mean"] == pytest.approx(1 / 6)
    assert found["standard error"] == pytest.approx(0.2 / 3)  # of 0.1, 0.3, 0.1: sqrt(0.04 / 3) / sqrt(3)
    assert what_fails.margin({"items": {"values": [0.5]}}, {"items": {"values": [0.1]}}, "items") == {"mean": 0.4}


def test_mismatched_vectors_are_whole_items_of_another():
    rng = np.random.default_rng(0)
    train = {name: rng.normal(size=(400, 2, 3)).astype(np.float32) for name in NAMES}
    frozen = features.FeatureSet(train, {}, {}, {}, {}, "")
    cell = cells.Cell((), modalities=NAMES, anchor="text", mismatched=0.3)
    banks, where = cells.training_arrays(cell, frozen, np.random.default_rng(1))
    assert where.all()
    np.testing.assert_array_equal(banks["text"], train["text"])
    moved = {}
    for name in NAMES[1:]:
        same = (banks[name][:, None] == train[name][None]).all((2, 3))  # [place, item]
        for axis in (0, 1):
            np.testing.assert_array_equal(same.sum(axis), 1)  # every item's vectors are in one place
        moved[name] = ~np.diag(same)
        assert moved[name].mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / 400))
    both = (moved["picture"] & moved["sound"]).mean()
    assert both == pytest.approx(0.09, abs=4 * np.sqrt(0.082 / 400)), "each modality by itself"
