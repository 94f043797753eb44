"""InfoNCE between two towers, from an anchor to every other modality, between all pairs; and the sigmoid loss."""

import itertools

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _reduction
from gramjax._devices import AxisName, over_mesh
from gramjax._embeddings import check_embeddings
from gramjax._reduction import Reduction
from gramjax.scores import HIGHEST, Cosine
from gramjax.streaming import contrastive_nll, sigmoid_nll
from gramjax.streaming.nll import KEPT, check_options, contrastive_terms, prepare


@over_mesh("a", "b", "where", "weights", "ids")
def infonce_loss(
    a: Float[Array, "batch dim"],
    b: Float[Array, "batch dim"],
    *,
    temperature: ArrayLike = 0.07,
    label_smoothing: float = 0.0,
    where: Bool[Array, " batch"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """Symmetric InfoNCE of two towers, as in CLIP (arXiv 2103.00020, figure 3).

    Args:
      a: `[batch, dim]`, unit vectors.
      b: `[batch, dim]`, unit vectors; `b[i]` matches `a[i]`.
      temperature: positive scalar.
      label_smoothing: in [0, 1).
      where: `[batch]` bool, which pairs are present.
      weights: `[batch]`.
      ids: `[batch]`.
      reduction: "mean", "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the matrix product.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> import jax.numpy as jnp
    >>> a = jnp.eye(2)
    >>> round(float(infonce_loss(a, a, temperature=1.0)), 6)  # log(1 + exp(-1))
    0.313262
    """
    del mesh
    a, b, where = _check_towers(a, b, where)
    temperature = _checks.positive("temperature", temperature, a.dtype)
    return contrastive_nll(
        Cosine(precision), a, b[:, None], scale=1.0 / temperature, label_smoothing=label_smoothing,
        query_where=where, gallery_where=where[:, None], weights=weights, ids=ids, reduction=reduction,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip


@over_mesh("embeddings", "where", "weights", "ids")
def anchored_infonce_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    anchor: int = 0,
    temperature: ArrayLike = 0.07,
    label_smoothing: float = 0.0,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """Symmetric InfoNCE between the anchor and each other modality, averaged (ImageBind's objective, arXiv 2305.05665).

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      anchor: index of the anchor modality.
      temperature: positive scalar.
      label_smoothing: in [0, 1).
      where: `[batch, modality]` bool. An example's loss is the mean over its pairs whose both ends are present.
      weights: `[batch]`.
      ids: `[batch]`.
      reduction: "mean", "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the matrix products.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> import jax.numpy as jnp
    >>> z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))
    >>> round(float(anchored_infonce_loss(z, temperature=1.0)), 6)
    0.313262
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    anchor = _checks.index("anchor", anchor, z.shape[1], "modality")
    pairs = [(anchor, other) for other in range(z.shape[1]) if other != anchor]
    return _mean_over_pairs(
        z, where, pairs, temperature, label_smoothing, weights, ids, reduction, block_size, axis_name, precision
    )


@over_mesh("embeddings", "where", "weights", "ids")
def pairwise_infonce_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    temperature: ArrayLike = 0.07,
    label_smoothing: float = 0.0,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """Symmetric InfoNCE averaged over all pairs of modalities.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      temperature: positive scalar.
      label_smoothing: in [0, 1).
      where: `[batch, modality]` bool. An example's loss is the mean over its pairs whose both ends are present.
      weights: `[batch]`.
      ids: `[batch]`.
      reduction: "mean", "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the matrix products.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> import jax.numpy as jnp
    >>> z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))
    >>> round(float(pairwise_infonce_loss(z, temperature=1.0)), 6)
    0.313262
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    pairs = list(itertools.combinations(range(z.shape[1]), 2))
    return _mean_over_pairs(
        z, where, pairs, temperature, label_smoothing, weights, ids, reduction, block_size, axis_name, precision
    )


@over_mesh("a", "b", "where", "weights", "ids")
def sigmoid_loss(
    a: Float[Array, "batch dim"],
    b: Float[Array, "batch dim"],
    *,
    temperature: ArrayLike = 0.1,
    bias: ArrayLike = -10.0,
    where: Bool[Array, " batch"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """Sigmoid loss of two towers: every pair is a binary question (SigLIP, arXiv 2303.15343, algorithm 1).

    Args:
      a: `[batch, dim]`, unit vectors.
      b: `[batch, dim]`, unit vectors; `b[i]` matches `a[i]`.
      temperature: positive scalar; 0.1 and `bias` -10 are the paper's initial values. Both may be learnable.
      bias: scalar added to the logits `a . b / temperature`.
      where: `[batch]` bool, which pairs are present.
      weights: `[batch]`.
      ids: `[batch]`.
      reduction: "mean" over examples (each a sum over the batch, as in the paper), "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the matrix product.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> import jax.numpy as jnp
    >>> a = jnp.eye(2)
    >>> round(float(sigmoid_loss(a, a, temperature=1.0, bias=0.0)), 6)  # log(1 + exp(-1)) + log 2
    1.006409
    """
    del mesh
    a, b, where = _check_towers(a, b, where)
    temperature = _checks.positive("temperature", temperature, a.dtype)
    return sigmoid_nll(
        Cosine(precision), a, b[:, None], scale=1.0 / temperature, bias=bias, query_where=where,
        gallery_where=where[:, None], weights=weights, ids=ids, reduction=reduction,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip


def _check_towers(a, b, where) -> tuple[Array, Array, Array]:
    a = _checks.floating("a", a, ("batch", "dim"))
    b = _checks.floating("b", b, ("batch", "dim"))
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape [batch, dim], got {a.shape} and {b.shape}.")
    return a, b, _checks.mask("where", where, a.shape[:1], "[batch]")


def _mean_over_pairs(
    z, where, pairs, temperature, label_smoothing, weights, ids, reduction, block_size, axis_name, precision
) -> Array:
    temperature = _checks.positive("temperature", temperature, z.dtype)
    options = check_options(
        len(z), len(z), label_smoothing=label_smoothing, weights=weights, ids=ids, reduction=reduction,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip
    score = Cosine(precision)
    # A modality that is compared with several others is prepared once.
    items = {b: prepare(score, z[:, b, None], where[:, b, None], options.ids, axis_name) for _, b in pairs}
    terms = [
        contrastive_terms(
            score, z[:, a], where[:, a], items[b], scale=1.0 / temperature, label_smoothing=options.label_smoothing,
            block_size=options.block_size, axis_name=axis_name, kept=KEPT // len(pairs),
        )
        for a, b in pairs
    ]  # fmt: skip
    return _reduction.reduce(*_reduction.mean_of_terms(terms), options.weights, reduction, axis_name)
