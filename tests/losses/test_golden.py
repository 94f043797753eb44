"""Figures of the published code of GRAM, PMRL, TRIANGLE and Symile, computed in float64 (tests/golden/README.md)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramjax import linalg, losses, scores

GOLDEN = Path(__file__).parents[1] / "golden"
files = pytest.mark.parametrize("file", ["losses", "losses_aligned"])
widths = pytest.mark.parametrize("k", [2, 3, 4, 5])


@pytest.fixture(params=[jnp.float64, jnp.float32], ids=["float64", "float32"])
def precision(request):
    """The dtype of the computation and the error allowed, relative to the largest value."""
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param, 1e-9 if request.param == jnp.float64 else 1e-5


@functools.cache
def _load(file):
    with np.load(GOLDEN / f"{file}.npz") as data:
        return dict(data)


def _assert_close(actual, expected, tolerance):
    assert np.max(np.abs(np.asarray(actual, np.float64) - expected)) <= tolerance * np.max(np.abs(expected))


@files
@widths
def test_gram(file, k, precision):
    dtype, tolerance = precision
    golden = _load(file)
    z = jnp.asarray(golden["in/embeddings"][:, :k], dtype)
    expected = functools.partial("out/gram/k{}/{}".format, k)
    _assert_close(scores.volume_scores(z[:, 0], z[:, 1:]), golden[expected("volume")], tolerance)
    own = jnp.diagonal(golden[expected("volume")])
    _assert_close(linalg.volume(z), np.asarray(own, np.float64), tolerance)
    loss, gradient = jax.jit(jax.value_and_grad(functools.partial(losses.gram_loss, label_smoothing=0.1)))(z)
    _assert_close(loss, golden[expected("loss")], tolerance)
    _assert_close(gradient, golden[expected("grad")], tolerance)
    cut = jax.jit(jax.grad(functools.partial(losses.gram_loss, label_smoothing=0.1, detach_candidates=True)))(z)
    _assert_close(cut, golden[expected("grad_detached_gather")], tolerance)


@files
@widths
def test_pmrl(file, k, precision):
    dtype, tolerance = precision
    golden = _load(file)
    z = jnp.asarray(golden["in/embeddings"][:, :k], dtype)
    expected = functools.partial("out/pmrl/k{}/{}".format, k)
    _assert_close(linalg.singular_values(z), golden[expected("singular_values")], tolerance)
    _assert_close(linalg.leading_direction(z), golden[expected("leading_direction")], tolerance)
    loss, gradient = jax.value_and_grad(losses.direction_regularization)(z, temperature=0.1)
    _assert_close(loss, golden[expected("regularization_tau0.1/loss")], tolerance)
    _assert_close(gradient, golden[expected("regularization_tau0.1/grad")], tolerance)
    loss, gradient = jax.value_and_grad(losses.alignment_loss)(z, temperature=0.5)
    _assert_close(loss, golden[expected("alignment_tau0.5/loss")], tolerance)
    _assert_close(gradient, golden[expected("alignment_tau0.5/grad")], tolerance)
    # Saturated: the figures reach 1e-13, where those of the published softmax are themselves rounding.
    loss, gradient = jax.value_and_grad(losses.alignment_loss)(z, temperature=0.05)
    np.testing.assert_allclose(loss, golden[expected("alignment_tau0.05/loss")], rtol=0, atol=1e-7 * tolerance / 1e-5)
    np.testing.assert_allclose(
        gradient, golden[expected("alignment_tau0.05/grad")], rtol=0, atol=1e-7 * tolerance / 1e-5
    )


@files
def test_triangle_symile_and_pairwise(file, precision):
    dtype, tolerance = precision
    golden = _load(file)
    z = jnp.asarray(golden["in/embeddings"][:, :3], dtype)
    area = scores.triangle_scores(z[:, 0], z[:, 1:], square_root=False)
    _assert_close(area, golden["out/triangle/area_without_sqrt"], tolerance)
    _assert_close(
        scores.triangle_scores(z[:, 0], z[:, 1:]), np.sqrt(golden["out/triangle/area_without_sqrt"] / 2), tolerance
    )
    _assert_close(losses.symile_loss(z, temperature=0.1), golden["out/symile/loss_n_squared_scale10"], tolerance)
    pairwise = 3 * losses.pairwise_infonce_loss(z, temperature=0.1)
    _assert_close(pairwise, golden["out/pairwise_infonce/sum_of_three_scale10"], tolerance)


@files
def test_symile_logits(file, precision):
    """Every combination of the other two modalities as a gallery of its own."""
    dtype, tolerance = precision
    golden = _load(file)
    z = jnp.asarray(golden["in/embeddings"][:, :3], dtype)
    n = z.shape[0]
    combinations = jnp.stack([jnp.repeat(z[:, 1], n, axis=0), jnp.tile(z[:, 2], (n, 1))], axis=1)
    logits = np.asarray(scores.multilinear_scores(z[:, 0], combinations))
    expected = golden["out/symile/logits_n_squared"]
    _assert_close(np.sort(logits, axis=1), np.sort(expected, axis=1), tolerance)
