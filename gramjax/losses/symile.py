"""Symile: contrast multilinear inner products (arXiv 2411.01053)."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _reduction
from gramjax._embeddings import check_embeddings, split_anchor
from gramjax._reduction import Reduction
from gramjax.scores import HIGHEST, Multilinear
from gramjax.streaming.nll import softmax_nll

# 4 GB in float32, and as much again for each anchor and in the gradient.
_MOST_LOGITS = 2**30


def symile_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    temperature: ArrayLike = 0.1,
    key: Array | None = None,
    label_smoothing: float = 0.0,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """Softmax over multilinear inner products, each modality being the anchor in turn (Symile, section 3 and appendix).

    For anchor `t_i` the positive is `sum_d t_id x_id y_id ...` with the example's own other modalities. The negatives
    are combinations of the other modalities of the batch: with a `key`, `batch` of them, each modality shuffled on its
    own; without, all `batch^(k-1)`, exact but only fit as a reference for small batches.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      temperature: positive scalar.
      key: random key for the shuffles, or None for all combinations.
      label_smoothing: in [0, 1).
      where: `[batch, modality]` bool. Absent modalities are left out of the products; an example has a loss for
        an anchor if the anchor and one more modality are present, and its loss is the mean over its anchors.
      weights: `[batch]`.
      ids: `[batch]`. A combination all of whose parts come from examples with the anchor's id is not a negative.
      reduction: "mean", "sum" or None.
      precision: of the matrix products.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit, an option is out of range, or, without `key`, `batch^modality` exceeds 2^30.

    >>> z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))
    >>> round(float(symile_loss(z, temperature=1.0)), 6)  # one of 4 combinations scores 1: log(1 + 3 exp(-1))
    0.743668
    """
    z, where = check_embeddings(embeddings, where, at_least=2)
    temperature = _checks.positive("temperature", temperature, z.dtype)
    label_smoothing = _checks.fraction("label_smoothing", label_smoothing)
    batch, k, _ = z.shape
    key = None if key is None else _checks.random_key("key", key)
    if key is None and batch**k > _MOST_LOGITS:
        raise ValueError(
            f"key must be given for embeddings of shape {z.shape}: without it each example is compared with all "
            f"{batch}^{k - 1} combinations, {batch**k:.1e} logits."
        )
    ids = jnp.arange(batch) if ids is None else _checks.ids("ids", ids, batch)
    weights = _reduction.check(weights, reduction, batch)
    score = Multilinear(precision)
    terms = []
    for anchor in range(k):
        queries, gallery, query_where, gallery_where = split_anchor(z, where, anchor)
        rows = (
            _all_combinations(batch, k - 1) if key is None else _shuffles(jax.random.fold_in(key, anchor), batch, k - 1)
        )
        parts = jnp.arange(k - 1)[None, :]
        candidates, candidates_where = gallery[rows, parts], gallery_where[rows, parts]
        own = jnp.all(ids[rows][None, :, :] == ids[:, None, None], axis=-1)
        negatives = ~own & score.usable(candidates_where)[None, :]
        positives = score.pairs(queries, score.prepare(gallery, gallery_where)) / temperature
        logits = score.tile(queries, score.prepare(candidates, candidates_where)) / temperature
        losses = softmax_nll(logits, positives, negatives, label_smoothing)
        terms.append((losses, query_where & score.usable(gallery_where)))
    return _reduction.reduce(*_reduction.mean_of_terms(terms), weights, reduction)


def _shuffles(key: Array, batch: int, modalities: int) -> Array:
    """`[batch, modalities]`: an independent permutation of the batch for each modality."""
    keys = jax.random.split(key, modalities)
    return jax.vmap(lambda key: jax.random.permutation(key, batch), out_axes=1)(keys)


def _all_combinations(batch: int, modalities: int) -> Array:
    """`[batch^modalities, modalities]`: every choice of an example for each modality."""
    grids = jnp.meshgrid(*[jnp.arange(batch)] * modalities, indexing="ij")
    return jnp.stack([grid.reshape(-1) for grid in grids], axis=-1)
