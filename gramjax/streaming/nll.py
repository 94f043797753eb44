"""How scores are reduced to losses: softmax and sigmoid negative log-likelihoods over a batch, for any score.

The reductions know a score only through its protocol (`gramjax.scores.Score`). Item `i` is the match of query `i`; the
other items are its negatives, and for item `j` the other queries are. Matched scores come from the score's accurate
`pairs` and replace the diagonal of the score matrix.

Who takes part. An example is a *positive* if its query is present and the score can use its item. An item that the
score can use remains a negative for the queries even if its own query is absent, and a query that is present remains a
negative for the items even if its own item is not usable. Two examples with the same `ids` entry are never each
other's negatives.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _reduction
from gramjax.scores import Score, check_inputs


def contrastive_nll(
    score: Score,
    queries: Float[Array, "batch dim"],
    gallery: Float[Array, "batch modality dim"],
    *,
    scale: ArrayLike,
    label_smoothing: float = 0.0,
    query_where: Bool[Array, " batch"] | None = None,
    gallery_where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    symmetric: bool = True,
    detach_candidates: bool = False,
    reduction: _reduction.Reduction = "mean",
) -> Array:
    """Softmax cross-entropy of matched pairs against the rest of the batch, with `scale * score` for logits.

    `loss_i = -1/2 (log softmax_j(scale S_ij)[i] + log softmax_j(scale S_ji)[i])`: query to items, and item to queries.

    Args:
      score: what is compared, for instance `gramjax.scores.Volume()`.
      queries: `[batch, d]`.
      gallery: `[batch, m, d]`; item `i` matches query `i`.
      scale: scalar that multiplies the scores: `1 / temperature`, negative for scores where lower is better. May be
        traced.
      label_smoothing: share of the target spread evenly over the candidates (the positive included), in [0, 1).
      query_where: `[batch]` bool, which queries are present; default all.
      gallery_where: `[batch, m]` bool, which modalities of the items are present; default all.
      weights: `[batch]`, weight of each example's loss; default 1.
      ids: `[batch]`, examples with equal ids are never each other's negatives; default all different.
      symmetric: average both directions; False for query to items only.
      detach_candidates: the reference implementations' distributed training gathers candidates without gradients: then
        queries learn from their own rows only, and items from their own columns only. True reproduces that; the
        default is the exact gradient.
      reduction: "mean" (weighted), "sum", or None for the weighted loss of each example, 0 where there is none.

    Returns:
      A scalar, or `[batch]` for `reduction=None`.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> from gramjax.scores import Cosine
    >>> a = jnp.eye(2)
    >>> round(float(contrastive_nll(Cosine(), a, a[:, None], scale=1.0)), 6)  # log(1 + exp(-1))
    0.313262
    """
    losses, valid = contrastive_terms(
        score, queries, gallery, scale=scale, label_smoothing=label_smoothing, query_where=query_where,
        gallery_where=gallery_where, ids=ids, symmetric=symmetric, detach_candidates=detach_candidates,
    )  # fmt: skip
    return _reduction.reduce(losses, valid, weights, reduction)


def contrastive_terms(
    score: Score, queries, gallery, *, scale, label_smoothing=0.0, query_where=None, gallery_where=None, ids=None,
    symmetric=True, detach_candidates=False,
) -> tuple[Array, Array]:  # fmt: skip
    """Loss of each example `[batch]` and which examples have one; arguments as for `contrastive_nll`."""
    queries, gallery, query_where, gallery_where = _check_pairs(queries, gallery, query_where, gallery_where)
    scale = _checks.real_scalar("scale", scale, queries.dtype)
    label_smoothing = _checks.fraction("label_smoothing", label_smoothing)
    prepared = score.prepare(gallery, gallery_where)
    usable = score.usable(gallery_where)
    different = _different(ids, queries.shape[0])

    def one_direction(queries, prepared, negatives, axis):
        logits = scale * score.tile(queries, prepared)
        positives = scale * score.pairs(queries, prepared)
        return softmax_nll(logits if axis == 1 else logits.T, positives, negatives, label_smoothing)

    fixed_queries, fixed_prepared = (
        jax.lax.stop_gradient((queries, prepared)) if detach_candidates else (queries, prepared)
    )
    # Without `detach_candidates` both directions see the same scores, which XLA computes once.
    losses = one_direction(queries, fixed_prepared, different & usable[None, :], axis=1)
    if symmetric:
        backward = one_direction(fixed_queries, prepared, different & query_where[None, :], axis=0)
        losses = 0.5 * (losses + backward)
    return losses, query_where & usable


def softmax_nll(
    logits: Float[Array, "rows candidates"],
    positives: Float[Array, " rows"],
    negatives: Bool[Array, "rows candidates"],
    label_smoothing: float,
) -> Float[Array, " rows"]:
    """`-log softmax` of each row's positive logit among itself and the `negatives` of its row.

    Computed from differences to the positive as `log1p` of small terms: a loss of 1e-9 is 1e-9, not 0.
    """
    difference = jnp.where(negatives, logits - positives[:, None], -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(difference, axis=1, initial=0.0), 0.0))
    others = jnp.sum(jnp.exp(difference - peak[:, None]), axis=1)
    # log(exp(0) + sum exp(difference)), the positive's own term written as expm1 so that log1p sees small numbers.
    losses = peak + jnp.log1p(others + jnp.expm1(-peak))
    if label_smoothing:
        count = 1.0 + jnp.sum(negatives, axis=1).astype(logits.dtype)
        losses = losses - label_smoothing * jnp.sum(jnp.where(negatives, difference, 0.0), axis=1) / count
    return losses


def sigmoid_nll(
    score: Score,
    queries: Float[Array, "batch dim"],
    gallery: Float[Array, "batch modality dim"],
    *,
    scale: ArrayLike,
    bias: ArrayLike,
    query_where: Bool[Array, " batch"] | None = None,
    gallery_where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: _reduction.Reduction = "mean",
) -> Array:
    """Binary cross-entropy of every pair, with `scale * score + bias` for logits (SigLIP, arXiv 2303.15343).

    `loss_i = -sum_j log sigmoid(y_ij (scale S_ij + bias))` with `y_ij = 1` for `i = j` and -1 otherwise.

    Args:
      score: what is compared.
      queries: `[batch, d]`.
      gallery: `[batch, m, d]`; item `i` matches query `i`.
      scale: scalar that multiplies the scores, negative for scores where lower is better. May be traced.
      bias: scalar added to the logits. May be traced.
      query_where: `[batch]` bool, which queries are present; default all.
      gallery_where: `[batch, m]` bool, which modalities of the items are present; default all.
      weights: `[batch]`, weight of each query's loss; default 1.
      ids: `[batch]`, examples with equal ids are never each other's negatives; default all different.
      reduction: "mean" over examples (each a sum over the batch), "sum", or None for `[batch]`.

    Returns:
      A scalar, or `[batch]` for `reduction=None`.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> from gramjax.scores import Cosine
    >>> a = jnp.eye(2)
    >>> round(float(sigmoid_nll(Cosine(), a, a[:, None], scale=0.0, bias=0.0)), 6)  # 2 log 2
    1.386294
    """
    queries, gallery, query_where, gallery_where = _check_pairs(queries, gallery, query_where, gallery_where)
    scale = _checks.real_scalar("scale", scale, queries.dtype)
    bias = _checks.real_scalar("bias", bias, queries.dtype)
    prepared = score.prepare(gallery, gallery_where)
    usable = score.usable(gallery_where)
    negatives = _different(ids, queries.shape[0]) & usable[None, :]
    repelled = jax.nn.softplus(scale * score.tile(queries, prepared) + bias)
    losses = jax.nn.softplus(-(scale * score.pairs(queries, prepared) + bias))
    losses = losses + jnp.sum(jnp.where(negatives, repelled, 0.0), axis=1)
    return _reduction.reduce(losses, query_where & usable, weights, reduction)


def _check_pairs(queries, gallery, query_where, gallery_where) -> tuple[Array, Array, Array, Array]:
    queries, gallery, gallery_where = check_inputs(queries, gallery, gallery_where)
    if queries.shape[0] != gallery.shape[0]:
        raise ValueError(
            "queries and gallery must hold matched pairs, item i for query i; "
            f"got shapes {queries.shape} and {gallery.shape}."
        )
    query_where = _checks.mask("query_where", query_where, queries.shape[:1], "[batch]")
    return jnp.where(query_where[:, None], queries, 0.0), gallery, query_where, gallery_where


def _different(ids, batch: int) -> Bool[Array, "batch batch"]:
    """Which pairs of examples are each other's negatives."""
    ids = jnp.arange(batch) if ids is None else _checks.per_example("ids", ids, batch)
    return (ids[:, None] != ids[None, :]) & ~jnp.eye(batch, dtype=bool)
