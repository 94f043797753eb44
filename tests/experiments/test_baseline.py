"""The baseline's CCA against other formulations and data whose canonical correlations are known."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from experiments import baseline
from gramjax import metrics


def correlated_views(correlations, items, seed=0, noise_dims=4):
    """Two views mixed at random from latent pairs with the given correlations and some noise of their own."""
    rng = np.random.default_rng(seed)
    correlations = np.asarray(correlations)
    x = rng.normal(size=(items, len(correlations)))
    y = correlations * x + np.sqrt(1 - correlations**2) * rng.normal(size=x.shape)
    x = np.concatenate([x, rng.normal(size=(items, noise_dims))], axis=1)
    y = np.concatenate([y, rng.normal(size=(items, noise_dims))], axis=1)
    mix_x, mix_y = (rng.normal(size=(x.shape[1],) * 2) for _ in range(2))
    return x @ mix_x + 3.0, y @ mix_y - 1.0


def view(rows, rank=320, **held_out):
    return baseline.make_view(rows[:, None], held_out, rank=rank)


def test_unregularised_cca_recovers_known_correlations():
    x, y = correlated_views([0.95, 0.7, 0.3], items=20_000)
    _, _, correlation = baseline.fit_cca(view(x), view(y), 0.0, 0.0)
    np.testing.assert_allclose(correlation[:3], [0.95, 0.7, 0.3], atol=0.015)
    assert correlation[3:].max() < 0.04


def test_cca_solves_the_regularised_eigenproblem():
    x, y = correlated_views([0.9, 0.5], items=50)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    xx, yy, xy = x.T @ x / 50, y.T @ y / 50, x.T @ y / 50
    width = x.shape[1]
    xx += 0.3 * np.trace(xx) / width * np.eye(width)
    yy += 2.0 * np.trace(yy) / width * np.eye(width)
    nothing = np.zeros((width, width))
    values = scipy.linalg.eigh(
        np.block([[nothing, xy], [xy.T, nothing]]), np.block([[xx, nothing], [nothing, yy]]), eigvals_only=True
    )
    _, _, correlation = baseline.fit_cca(view(x), view(y), 0.3, 2.0)
    np.testing.assert_allclose(correlation, values[::-1][:width], rtol=1e-8, atol=1e-10)


def test_projections_are_canonical():
    x, y = correlated_views([0.9, 0.5], items=200)
    vx, vy = view(x, all=x), view(y, all=y)
    project_x, project_y, correlation = baseline.fit_cca(vx, vy, 0.0, 0.0)
    a, b = vx.held_out["all"] @ project_x, vy.held_out["all"] @ project_y
    np.testing.assert_allclose(a.T @ a / 200, np.eye(6), atol=1e-8)
    np.testing.assert_allclose(a.T @ b / 200, np.diag(correlation), atol=1e-8)


@pytest.mark.parametrize("width", [6, 40], ids=["fewer columns than rows", "more columns than rows"])
def test_view_is_the_singular_value_decomposition_of_centred_rows(width):
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(20, width)) + 5, rng.normal(size=(7, width))
    made = view(train, rank=5, test=test)
    _, values, axes = np.linalg.svd(train - train.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(made.variance, values[:5] ** 2 / 20, rtol=1e-9)
    expected = (test - train.mean(axis=0)) @ axes[:5].T
    np.testing.assert_allclose(np.abs(made.held_out["test"]), np.abs(expected), rtol=1e-7, atol=1e-9)


def test_copies_count_in_the_variance_and_are_averaged_in_the_items():
    rng = np.random.default_rng(2)
    copies = rng.normal(size=(30, 3, 4))
    made = baseline.make_view(copies, {"rows": copies[:, 0]}, rank=4)
    np.testing.assert_allclose(made.variance.sum(), copies.reshape(90, 4).var(axis=0).sum())
    again = baseline.make_view(copies, {"rows": copies.mean(axis=1)}, rank=4)
    np.testing.assert_allclose(made.train, again.held_out["rows"], atol=1e-10)


def test_scores_are_weighted_cosines_of_the_leading_components():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    projections = (np.eye(4), 2 * np.eye(4), np.array([0.9, 0.5, 0.2, 0.1]))
    scores = baseline.cca_scores(x, y, projections, components=2, power=2.0)
    for i in range(5):
        for j in range(5):
            a, b = x[i, :2] * [0.81, 0.25], y[j, :2] * [0.81, 0.25]
            assert scores[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_ranks_are_those_of_gramjax():
    scores = np.random.default_rng(4).integers(0, 4, size=(40, 40)).astype(np.float32)  # many ties
    there, back = baseline.ranks_both_ways(scores)
    np.testing.assert_array_equal(there, metrics.retrieval_ranks(jnp.asarray(scores), higher_is_better=True))
    np.testing.assert_array_equal(back, metrics.retrieval_ranks(jnp.asarray(scores.T), higher_is_better=True))


def test_ranks_by_hand():
    there, back = baseline.ranks_both_ways(np.array([[2.0, 1.0, 3.0], [5.0, 5.0, 0.0], [0.0, 0.0, 1.0]]))
    assert there.tolist() == [1, 1, 0]
    assert back.tolist() == [1, 0, 1]
    assert baseline.mean_recall((there, back)) == pytest.approx((1 / 3 + 1 + 1 + 1 / 3 + 1 + 1) / 6)


def test_choice_never_depends_on_the_test_split():
    x, y = correlated_views([0.99] * 6, items=300)
    parts = {"validation": slice(100, 200), "test": slice(200, 300)}

    def views(rows):
        wide = np.concatenate([rows, rows], axis=1)
        return {
            name: view(part[:100], **{s: part[p] for s, p in parts.items()})
            for name, part in [("once", rows), ("twice", wide)]
        }

    ridges = ((0.1, 1.0), (0.1, 1.0))
    best, (_, test) = baseline.choose(views(x), views(y), ridges)
    assert baseline.mean_recall(test) > 0.5  # chance is 0.05
    shuffled = np.concatenate([y[:200], np.random.default_rng(5).permutation(y[200:])])
    again, (_, shuffled_test) = baseline.choose(views(x), views(shuffled), ridges)
    assert again == best
    assert baseline.mean_recall(shuffled_test) < 0.1
