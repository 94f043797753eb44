"""PMRL: one leading singular value for each instance, leading directions kept apart (arXiv 2507.17343)."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _reduction, linalg
from gramjax._devices import AxisName, over_mesh
from gramjax._embeddings import check_embeddings
from gramjax._reduction import Reduction
from gramjax.scores import HIGHEST, Cosine
from gramjax.streaming import contrastive_nll
from gramjax.streaming.nll import check_options


def pmrl_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    alignment_temperature: ArrayLike = 0.05,
    regularization_temperature: ArrayLike = 0.1,
    regularization_weight: ArrayLike = 1.0,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """`alignment_loss + regularization_weight * direction_regularization` (PMRL, section 4).

    The published objective adds 0.1 times the matching loss of a fusion encoder (`matching_loss`). The
    published code contrasts directions within the local batch of a device; here it is the whole batch.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      alignment_temperature: of the softmax over singular values; the paper pretrains with 0.01, finetunes with 0.05.
      regularization_temperature: of the softmax over instances.
      regularization_weight: scalar.
      where: `[batch, modality]` bool. The alignment term needs two modalities, the regularisation one.
      weights: `[batch]`.
      ids: `[batch]`, for the regularisation: instances with equal ids are not pushed apart.
      reduction: "mean" (each term over the examples that have it), "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the batch-by-batch matrix product.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))  # fully aligned, instances orthogonal
    >>> round(float(pmrl_loss(z, regularization_temperature=1.0)), 6)  # 0 + log(1 + exp(-1))
    0.313262
    """
    z, where = check_embeddings(embeddings, where, at_least=2)
    regularization_weight = _checks.real_scalar("regularization_weight", regularization_weight, z.dtype)
    alignment, regularization = pmrl_terms(
        z, alignment_temperature=alignment_temperature, regularization_temperature=regularization_temperature,
        where=where, weights=weights, ids=ids, reduction=reduction, block_size=block_size, axis_name=axis_name,
        mesh=mesh, precision=precision,
    )  # fmt: skip
    return alignment + regularization_weight * regularization


@over_mesh("embeddings", "where", "weights", "ids")
def pmrl_terms(
    embeddings, *, alignment_temperature, regularization_temperature, where=None, weights=None, ids=None,
    reduction: Reduction = "mean", block_size=None, axis_name=None, mesh=None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> tuple[Array, Array]:  # fmt: skip
    """`alignment_loss` and `direction_regularization` from one spectrum; the arguments are those of `pmrl_loss`."""
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    alignment_temperature = _checks.positive("alignment_temperature", alignment_temperature, z.dtype)
    regularization_temperature = _checks.positive("regularization_temperature", regularization_temperature, z.dtype)
    _, weights, ids, block_size = check_options(
        len(z), len(z), weights=weights, ids=ids, reduction=reduction, block_size=block_size, axis_name=axis_name
    )
    values, directions = linalg.spectrum(z)
    return _align(values, where, alignment_temperature, weights, reduction, axis_name), _separate(
        directions, where, regularization_temperature, weights, ids, reduction, block_size, axis_name, precision
    )


@over_mesh("embeddings", "where", "weights")
def alignment_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    temperature: ArrayLike = 0.05,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Softmax over the singular values of each instance, `-log softmax(sigma / temperature)[0]` (PMRL, section 4.2).

    It is 0 for a rank-one instance, all of whose modalities are parallel or opposite, and `log k` when they are
    orthogonal. It saturates: the gradient falls as `exp(-(sigma_1 - sigma_2) / temperature)`, so it is computed as
    `log1p` of small terms. At repeated leading singular values the subgradient of `linalg.singular_values` is taken.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      temperature: positive scalar, in units of singular values, which lie in [0, sqrt(modality)].
      where: `[batch, modality]` bool. Singular values of absent modalities are left out of the softmax, not counted as
        0; an example with fewer than two modalities has no loss.
      weights: `[batch]`.
      reduction: "mean", "sum" or None.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> round(float(alignment_loss(jnp.eye(3)[None])), 6)  # orthogonal: log 3
    1.098612
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    temperature = _checks.positive("temperature", temperature, z.dtype)
    weights = _reduction.check(weights, reduction, len(z), axis_name)
    return _align(linalg.spectrum(z)[0], where, temperature, weights, reduction, axis_name)


@over_mesh("embeddings", "where", "weights", "ids")
def direction_regularization(
    embeddings: Float[Array, "batch modality dim"],
    *,
    temperature: ArrayLike = 0.1,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    """InfoNCE of the leading directions with themselves, logits `u_i . u_j / temperature` (PMRL, section 4.3).

    The directions are oriented along the sum of the modalities (`linalg.leading_direction`); the published code leaves
    their signs to the solver, so that its logits flip at random. So do those of two modalities at an obtuse angle that
    were rounded to bfloat16: pass vectors that were normalised in float32.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors.
      temperature: positive scalar.
      where: `[batch, modality]` bool. An example needs one modality; its direction then is that modality's.
      weights: `[batch]`.
      ids: `[batch]`, instances with equal ids are not pushed apart.
      reduction: "mean", "sum" or None.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the batch-by-batch matrix product.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))
    >>> round(float(direction_regularization(z, temperature=1.0)), 6)  # log(1 + exp(-1))
    0.313262
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=1)
    temperature = _checks.positive("temperature", temperature, z.dtype)
    _, weights, ids, block_size = check_options(
        len(z), len(z), weights=weights, ids=ids, reduction=reduction, block_size=block_size, axis_name=axis_name
    )
    directions = linalg.spectrum(z)[1]
    return _separate(directions, where, temperature, weights, ids, reduction, block_size, axis_name, precision)


def _align(values: Array, where: Array, temperature: Array, weights, reduction: Reduction, axis_name) -> Array:
    present = jnp.sum(where, axis=-1)
    # The first `present` values in descending order are those of the present modalities; the rest are exactly 0.
    counted = jnp.arange(1, where.shape[1])[None, :] < present[:, None]
    below = (values[:, 1:] - values[:, :1]) / temperature
    losses = jnp.log1p(jnp.sum(jnp.where(counted, jnp.exp(below), 0.0), axis=-1))
    return _reduction.reduce(losses, present >= 2, weights, reduction, axis_name)


def _separate(
    directions: Array, where: Array, temperature: Array, weights, ids, reduction, block_size, axis_name, precision
) -> Array:
    present = jnp.any(where, axis=-1)
    # The scores are symmetric: the second direction of the softmax would repeat the first.
    return contrastive_nll(
        Cosine(precision), directions, directions[:, None], scale=1.0 / temperature, query_where=present,
        gallery_where=present[:, None], weights=weights, ids=ids, reduction=reduction, symmetric=False,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip
