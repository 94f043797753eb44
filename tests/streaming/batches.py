"""Random batches with everything that may be absent, and what the tests of the streamed losses compare."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gramjax.streaming import contrastive_nll
from tests import reference


def random_batch(queries=24, items=24, m=2, d=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "queries": jnp.asarray(reference.unit(rng, queries, d)),
        "gallery": jnp.asarray(reference.unit(rng, items, m, d)),
        "query_where": jnp.asarray(rng.random(queries) < 0.8),
        "gallery_where": jnp.asarray(rng.random((items, m)) < 0.7),
        "weights": jnp.asarray(rng.random(queries)),
        "ids": jnp.asarray(rng.integers(0, 2 * items, items)),
    }


@functools.partial(jax.jit, static_argnames=("score", "block_size", "detach"))
def value_and_gradients(batch, scale, score, block_size, detach=False):
    def loss(queries, gallery, scale):
        both = {**batch, "queries": queries, "gallery": gallery}
        losses = contrastive_nll(
            score, **both, scale=scale, label_smoothing=0.1, detach_candidates=detach, block_size=block_size,
            reduction=None,
        )  # fmt: skip
        return jnp.mean(losses), losses

    (_, losses), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
        batch["queries"], batch["gallery"], scale
    )
    return losses, *gradients


def assert_close(results, expected, tolerance):
    """To rounding, relative to the largest entry."""
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-30))


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
