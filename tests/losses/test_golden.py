"""Figures of the published code of GRAM, PMRL, TRIANGLE and Symile, computed in float64 (tests/golden/README.md)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramjax import linalg, losses, scores

pytestmark = pytest.mark.usefixtures("also_optimized")
GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("losses", "losses_aligned")
widths = pytest.mark.parametrize("k", [2, 3, pytest.param(4, marks=pytest.mark.slow), 5])

GRAM = jax.jit(jax.value_and_grad(functools.partial(losses.gram_loss, label_smoothing=0.1)))
GRAM_CUT = jax.jit(jax.grad(functools.partial(losses.gram_loss, label_smoothing=0.1, detach_candidates=True)))
ALIGNMENT = jax.jit(jax.value_and_grad(losses.alignment_loss))
REGULARIZATION = jax.jit(jax.value_and_grad(losses.direction_regularization))
SYMILE = jax.jit(losses.symile_loss)
PAIRWISE = jax.jit(losses.pairwise_infonce_loss)
SPECTRUM = jax.jit(lambda z: (linalg.singular_values(z), linalg.leading_direction(z)))
VOLUMES = jax.jit(lambda z: (scores.volume_scores(z[:, 0], z[:, 1:]), linalg.volume(z)))


@pytest.fixture(params=[jnp.float64, jnp.float32], ids=["float64", "float32"])
def precision(request):
    """The dtype of the computation and the error allowed, relative to the largest value."""
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param, 1e-9 if request.param == jnp.float64 else 1e-5


def _load(file):
    with np.load(GOLDEN / f"{file}.npz") as data:
        return dict(data)


def _assert_close(actual, expected, tolerance):
    assert np.max(np.abs(np.asarray(actual, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


@widths
def test_gram(k, precision):
    dtype, tolerance = precision
    for golden in map(_load, FILES):
        z = jnp.asarray(golden["in/embeddings"][:, :k], dtype)
        expected = {
            name: golden[f"out/gram/k{k}/{name}"] for name in ("volume", "loss", "grad", "grad_detached_gather")
        }
        matrix, own = VOLUMES(z)
        _assert_close(matrix, expected["volume"], tolerance)
        _assert_close(own, np.diagonal(expected["volume"]), tolerance)
        loss, gradient = GRAM(z)
        _assert_close(loss, expected["loss"], tolerance)
        _assert_close(gradient, expected["grad"], tolerance)
        _assert_close(GRAM_CUT(z), expected["grad_detached_gather"], tolerance)


@widths
def test_pmrl(k, precision):
    dtype, tolerance = precision
    for golden in map(_load, FILES):
        z = jnp.asarray(golden["in/embeddings"][:, :k], dtype)
        expected = functools.partial("out/pmrl/k{}/{}".format, k)
        values, direction = SPECTRUM(z)
        _assert_close(values, golden[expected("singular_values")], tolerance)
        _assert_close(direction, golden[expected("leading_direction")], tolerance)
        loss, gradient = REGULARIZATION(z, temperature=0.1)
        _assert_close(loss, golden[expected("regularization_tau0.1/loss")], tolerance)
        _assert_close(gradient, golden[expected("regularization_tau0.1/grad")], tolerance)
        loss, gradient = ALIGNMENT(z, temperature=0.5)
        _assert_close(loss, golden[expected("alignment_tau0.5/loss")], tolerance)
        _assert_close(gradient, golden[expected("alignment_tau0.5/grad")], tolerance)
        # Saturated: the figures reach 1e-13, where those of the published softmax are themselves rounding.
        absolute = {"rtol": 0, "atol": 1e-7 * tolerance / 1e-5}
        loss, gradient = ALIGNMENT(z, temperature=0.05)
        np.testing.assert_allclose(loss, golden[expected("alignment_tau0.05/loss")], **absolute)
        np.testing.assert_allclose(gradient, golden[expected("alignment_tau0.05/grad")], **absolute)


def test_triangle_symile_and_pairwise(precision):
    dtype, tolerance = precision
    for golden in map(_load, FILES):
        z = jnp.asarray(golden["in/embeddings"][:, :3], dtype)
        published = golden["out/triangle/area_without_sqrt"]
        _assert_close(scores.triangle_scores(z[:, 0], z[:, 1:], square_root=False), published, tolerance)
        _assert_close(scores.triangle_scores(z[:, 0], z[:, 1:]), np.sqrt(published / 2), tolerance)
        _assert_close(SYMILE(z, temperature=0.1), golden["out/symile/loss_n_squared_scale10"], tolerance)
        expected = golden["out/pairwise_infonce/sum_of_three_scale10"]
        _assert_close(3 * PAIRWISE(z, temperature=0.1), expected, tolerance)


def test_symile_logits(precision):
    """Every combination of the other two modalities as a gallery of its own."""
    dtype, tolerance = precision
    for golden in map(_load, FILES):
        z = jnp.asarray(golden["in/embeddings"][:, :3], dtype)
        n = z.shape[0]
        combinations = jnp.stack([jnp.repeat(z[:, 1], n, axis=0), jnp.tile(z[:, 2], (n, 1))], axis=1)
        logits = np.asarray(scores.multilinear_scores(z[:, 0], combinations))
        # The order of the published combinations is its own affair.
        _assert_close(np.sort(logits, axis=1), np.sort(golden["out/symile/logits_n_squared"], axis=1), tolerance)
