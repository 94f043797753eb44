"""How scores are reduced to losses: softmax and sigmoid negative log-likelihoods over a batch, for any score.

The reductions know a score only through its protocol (`gramjax.scores.Score`). Item `i` is the match of query `i`; the
other items are its negatives, and for item `j` the other queries are. Matched scores come from the score's accurate
`pairs` and replace the diagonal of the score matrix.

Who takes part. An example is a *positive* if its query is present and the score can use its item. An item that the
score can use remains a negative for the queries even if its own query is absent, and a query that is present remains a
negative for the items even if its own item is not usable. Two examples with the same `ids` entry are never each
other's negatives. A gallery may be longer than the queries: the items beyond them match nothing and are negatives only.

How it is computed. Small score matrices are built whole. Large ones never are: `block_size` rows and columns of them
are computed at a time, in the gradient once more, so that memory grows with the batch and not with its square. If all
matrix products of a loss take at most 256 MiB, they are kept for its gradient, which is faster; with a `block_size` or
across devices never. (In a sum every loss has as much to itself, under `vmap` every lane.) Values and gradients agree
to rounding. Losses computed in tiles or across devices have derivatives in reverse mode only, of any order;
`block_size=None` with a small batch, on one device, has those in forward mode as well.

Across devices. A loss is the loss of the whole batch, not the mean of losses of its parts, and its gradient is that:

- `jax.grad` outside `jax.shard_map`, or inside of it: call the loss in the mapped function with `axis_name`, the axis
  along which the batch is divided, each device with its own examples. `reduction="mean"` and `"sum"` give the same
  number on every device, `None` the losses of the device's own examples. What is said of items and queries holds on
  each device: its item `i` is the match of its query `i`, and what it has more items are negatives only, for the
  queries of all devices.
- inside `shard_map` with `check_vma=True` (the default), JAX sums the gradient of what is the same on all devices
  (temperature, parameters of an encoder) by itself. With `check_vma=False`, and in `pmap`, it does not: each device
  gets the gradient with respect to its own copy, and the sum of them over the devices (`psum`, not `pmean`) is the
  gradient. For the device's embeddings it is complete in either case.
- `jax.grad` *outside* of a `shard_map` with `check_vma=False`, or of a `pmap`, is the one form that is not served: JAX
  then hands each device a part of the cotangent of a number that is the same on all, which cannot be told from the
  whole, and the gradient comes out divided by the number of devices. Keep `check_vma=True`, or return `reduction=None`
  from the mapped function and average outside.
- global arrays under plain `jit`: pass `mesh` and `axis_name`; the loss enters `shard_map` by itself. Item `i` is the
  match of query `i` of the whole batch. Both numbers, of queries and of items, must divide by that of the devices.

The columns of the score matrix travel round the devices, each of which keeps its rows, so a device needs memory for
its share of the batch only. `ids` must be comparable across devices; without `ids` all examples differ.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _devices, _reduction
from gramjax._score import Score, check_inputs
from gramjax.streaming import _tiles
from gramjax.streaming._engine import ITEMS, Plan, Scalars, Side, reduce
from gramjax.streaming._statistics import LogSumExp, Partition, SoftplusSum, Statistic

# Up to this many entries the whole score matrix is built unless `block_size` says otherwise.
_WHOLE = 512 * 512
# Most rows and columns of a tile: a few MB, which stay in a processor's cache.
_TILE = (512, 512)
# Bytes of matrix products that a loss keeps for its gradient unless `block_size` is given: those of five modalities of
# 4,096 examples.
KEPT = 256 * 2**20


@_devices.over_mesh("queries", "gallery", "query_where", "gallery_where", "weights", "ids")
def contrastive_nll(
    score: Score,
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    scale: ArrayLike,
    label_smoothing: float = 0.0,
    query_where: Bool[Array, " queries"] | None = None,
    gallery_where: Bool[Array, "items modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    symmetric: bool = True,
    detach_candidates: bool = False,
    reduction: _reduction.Reduction = "mean",
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Softmax cross-entropy of matched pairs against the rest of the batch, with `scale * score` for logits.

    `loss_i = -1/2 (log softmax_j(scale S_ij)[i] + log softmax_j(scale S_ji)[i])`: query to items, and item to queries.

    Args:
      score: what is compared, for instance `gramjax.scores.Volume()`.
      queries: `[Q, d]`.
      gallery: `[N, m, d]`, `N >= Q`; item `i` matches query `i`, items from `Q` on are negatives only.
      scale: scalar that multiplies the scores: `1 / temperature`, negative for scores where lower is better. May be
        traced.
      label_smoothing: share of the target spread evenly over the candidates (the positive included), in [0, 1).
      query_where: `[Q]` bool, which queries are present; default all.
      gallery_where: `[N, m]` bool, which modalities of the items are present; default all.
      weights: `[Q]`, weight of each example's loss; default 1.
      ids: `[N]` integers, the first `Q` those of the queries; examples with equal ids are never each other's negatives;
        default all different.
      symmetric: average both directions; False for query to items only.
      detach_candidates: the reference implementations' distributed training gathers candidates without gradients: then
        queries learn from their own rows only, and items from their own columns only. True reproduces that; the
        default is the exact gradient.
      reduction: "mean" (weighted), "sum", or None for the weighted loss of each example, 0 where there is none.
      block_size: rows and columns of the score matrix that are computed at a time; None: all of a small matrix,
        tiles of a large one.
      axis_name: mesh axis along which the batch is divided, inside `jax.shard_map`: see the module's introduction.
      mesh: for global arrays outside of `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      A scalar, or `[Q]` for `reduction=None`.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> from gramjax.scores import Cosine
    >>> a = jnp.eye(2)
    >>> round(float(contrastive_nll(Cosine(), a, a[:, None], scale=1.0)), 6)  # log(1 + exp(-1))
    0.313262
    """
    del mesh
    queries, gallery, query_where, gallery_where = _check_pairs(
        score, queries, gallery, query_where, gallery_where, axis_name
    )
    scale = _checks.real_scalar("scale", scale, queries.dtype)
    options = check_options(
        len(queries), len(gallery), label_smoothing=label_smoothing, weights=weights, ids=ids, reduction=reduction,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip
    items = prepare(score, gallery, gallery_where, options.ids, axis_name)
    losses, valid = contrastive_terms(
        score, queries, query_where, items, scale=scale, label_smoothing=options.label_smoothing, symmetric=symmetric,
        detach_candidates=detach_candidates, block_size=options.block_size, axis_name=axis_name,
    )  # fmt: skip
    return _reduction.reduce(losses, valid, options.weights, reduction, axis_name)


class Options(NamedTuple):
    """What a loss of a score matrix takes besides, checked and in its own type."""

    label_smoothing: float
    weights: Array | None
    ids: Array | None
    block_size: int | None


def check_options(
    queries: int, items: int, *, label_smoothing=0.0, weights, ids, reduction, block_size, axis_name
) -> Options:
    """All options checked, which is before anything is computed."""
    return Options(
        _checks.fraction("label_smoothing", label_smoothing),
        _reduction.check(weights, reduction, queries, axis_name),
        None if ids is None else _checks.ids("ids", ids, items),
        None if block_size is None else _checks.size("block_size", block_size),
    )


def prepare(score: Score, gallery: Array, gallery_where: Array, ids, axis_name: _devices.AxisName | None) -> Side:
    """The columns of a score matrix, from arguments that have been checked; several losses can share them."""
    number = gallery.shape[0]
    if ids is None:
        ids = number * _devices.position(axis_name) + jnp.arange(number, dtype=jnp.int32)
    prepared = _tiles.item_by_item(score.prepare, ITEMS, gallery, gallery_where)
    return Side(prepared, ids, score.usable(gallery_where))


def contrastive_terms(
    score: Score, queries: Array, query_where: Array, items: Side, *, scale, label_smoothing=0.0, symmetric=True,
    detach_candidates=False, block_size=None, axis_name=None, kept=KEPT,
) -> tuple[Array, Array]:  # fmt: skip
    """Loss of each example `[Q]` and which examples have one; the other arguments as for `contrastive_nll`, checked.

    `kept` is the part of `KEPT` that this one of a loss's score matrices may have.
    """
    statistic = LogSumExp(sums=label_smoothing > 0)
    rows = _rows(queries, query_where, items)
    plan = _plan(score, statistic, rows, items, symmetric, detach_candidates, block_size, axis_name, kept)
    reduced = reduce(plan, rows, items, Scalars(scale))
    losses = _softmax_losses(reduced.rows, scale * reduced.row_matches, label_smoothing)
    if symmetric:
        matched = jax.tree.map(lambda x: x[: queries.shape[0]], reduced.columns)
        losses = 0.5 * (losses + _softmax_losses(matched, scale * reduced.column_matches, label_smoothing))
    return losses, query_where & items.present[: queries.shape[0]]


def softmax_nll(
    logits: Float[Array, "rows candidates"],
    positives: Float[Array, " rows"],
    negatives: Bool[Array, "rows candidates"],
    label_smoothing: float,
) -> Float[Array, " rows"]:
    """`-log softmax` of each row's positive logit among itself and the `negatives` of its row.

    Computed from the difference to the positive as `log1p` of a small term: a loss of 1e-9 is 1e-9, not 0.
    """
    statistic = LogSumExp(sums=label_smoothing > 0)
    running = statistic.add(statistic.empty(logits.shape[0], logits.dtype), logits, negatives, 1)
    return _softmax_losses(statistic.finish(running), positives, label_smoothing)


def _softmax_losses(negatives: Partition, positives: Array, label_smoothing: float) -> Array:
    # A log-sum-exp of -inf, where there are no negatives, gives 0 with derivative 0.
    losses = jax.nn.softplus(negatives.log_sum_exp - positives)
    if negatives.total is not None and negatives.count is not None:
        spread = (negatives.total - negatives.count * positives) / (1.0 + negatives.count)
        losses = losses - label_smoothing * spread
    return losses


@_devices.over_mesh("queries", "gallery", "query_where", "gallery_where", "weights", "ids")
def sigmoid_nll(
    score: Score,
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    scale: ArrayLike,
    bias: ArrayLike,
    query_where: Bool[Array, " queries"] | None = None,
    gallery_where: Bool[Array, "items modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: _reduction.Reduction = "mean",
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Binary cross-entropy of every pair, with `scale * score + bias` for logits (SigLIP, arXiv 2303.15343).

    `loss_i = -sum_j log sigmoid(y_ij (scale S_ij + bias))` with `y_ij = 1` for `i = j` and -1 otherwise.

    Args:
      score: what is compared.
      queries: `[Q, d]`.
      gallery: `[N, m, d]`, `N >= Q`; item `i` matches query `i`, items from `Q` on are negatives only.
      scale: scalar that multiplies the scores, negative for scores where lower is better. May be traced.
      bias: scalar added to the logits. May be traced.
      query_where: `[Q]` bool, which queries are present; default all.
      gallery_where: `[N, m]` bool, which modalities of the items are present; default all.
      weights: `[Q]`, weight of each query's loss; default 1.
      ids: `[N]` integers, the first `Q` those of the queries; examples with equal ids are never each other's negatives;
        default all different.
      reduction: "mean" over examples (each a sum over the batch), "sum", or None for `[Q]`.
      block_size: rows and columns of the score matrix that are computed at a time; None: all of a small matrix,
        tiles of a large one.
      axis_name: mesh axis along which the batch is divided, inside `jax.shard_map`: see the module's introduction.
      mesh: for global arrays outside of `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      A scalar, or `[Q]` for `reduction=None`.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> from gramjax.scores import Cosine
    >>> a = jnp.eye(2)
    >>> round(float(sigmoid_nll(Cosine(), a, a[:, None], scale=0.0, bias=0.0)), 6)  # 2 log 2
    1.386294
    """
    del mesh
    queries, gallery, query_where, gallery_where = _check_pairs(
        score, queries, gallery, query_where, gallery_where, axis_name
    )
    scale = _checks.real_scalar("scale", scale, queries.dtype)
    bias = _checks.real_scalar("bias", bias, queries.dtype)
    options = check_options(
        len(queries), len(gallery), weights=weights, ids=ids, reduction=reduction, block_size=block_size,
        axis_name=axis_name,
    )  # fmt: skip
    items = prepare(score, gallery, gallery_where, options.ids, axis_name)
    rows = _rows(queries, query_where, items)
    plan = _plan(score, SoftplusSum(), rows, items, False, False, options.block_size, axis_name)
    reduced = reduce(plan, rows, items, Scalars(scale, bias))
    attracted, repelled = jax.nn.softplus(-(scale * reduced.row_matches + bias)), reduced.rows
    valid = query_where & items.present[: queries.shape[0]]
    return _reduction.reduce(attracted + repelled, valid, options.weights, reduction, axis_name)


def _check_pairs(score, queries, gallery, query_where, gallery_where, axis_name) -> tuple[Array, Array, Array, Array]:
    queries, gallery, gallery_where = check_inputs(score, ("tile", "pairs"), queries, gallery, gallery_where)
    if queries.shape[0] > gallery.shape[0]:
        raise ValueError(
            "queries and gallery must hold matched pairs, item i for query i, and no query without an item; "
            f"got shapes {queries.shape} and {gallery.shape}."
        )
    query_where = _checks.mask("query_where", query_where, queries.shape[:1], "[queries]")
    if axis_name is None:
        _devices.check_whole(queries, gallery)
    return jnp.where(query_where[:, None], queries, 0.0), gallery, query_where, gallery_where


def _rows(queries: Array, query_where: Array, items: Side) -> Side:
    return Side(queries, items.ids[: queries.shape[0]], query_where)


def _plan(
    score: Score, statistic: Statistic, rows: Side, columns: Side, both: bool, detach_candidates: bool,
    block_size: int | None, axis_name: _devices.AxisName | None, kept: int = KEPT,
) -> Plan:  # fmt: skip
    if block_size is not None or axis_name is not None:
        kept = 0  # across devices they would grow with the number of these
    if block_size is not None:
        tile = (block_size, block_size)
    elif axis_name is None and rows.ids.shape[0] * columns.ids.shape[0] <= _WHOLE:
        tile = None
    else:
        tile = (_tiles.even(rows.ids.shape[0], _TILE[0]), _tiles.even(columns.ids.shape[0], _TILE[1]))
    return Plan(score, statistic, both, detach_candidates, tile, axis_name, kept)
