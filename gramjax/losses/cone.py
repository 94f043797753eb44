"""Contrast cones: GRAM's joint contrast with a score that sees signs and does not depend on the item's own volume."""

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks
from gramjax._cone import MOST
from gramjax._devices import AxisName, over_mesh
from gramjax._embeddings import check_embeddings, split_anchor
from gramjax._reduction import Reduction
from gramjax.scores import HIGHEST, Cone
from gramjax.streaming import contrastive_nll


@over_mesh("embeddings", "where", "weights", "ids")
def cone_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    anchor: int = 0,
    temperature: ArrayLike = 0.2,
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
    r"""Cone contrastive loss: `gram_loss` with the cosine to the item's cone in place of the volume.

    Softmax cross-entropy over the batch with logits `S(anchor_i, data_j) / temperature`, from anchor to data and from
    data to anchor; `S` is the largest cosine between the anchor and a direction between the item's other modalities
    (`gramjax.scores.Cone`).

    Why. The volume factorises as `Vol_ij^2 = D_j r_ij` (`gramjax.scores`). Its negatives can be pushed away, and its
    positives pulled in, by `D_j` alone, which says nothing of the anchor; and `r_ij` is even in the anchor: the
    modalities may settle at opposite ends of a line. Both are free directions of the loss. What helps retrieval is
    that `r_ij` lets the anchor lie anywhere in the item's span, closer to the modality that says more about it, where
    the mean of cosines asks it to be close to all of them. `S` keeps that: on the cone `S^2 = 1 - r`, off the cone it
    falls to that of the nearest face, at the least to the best single cosine, sign and all; and there is no factor
    `D_j`. It is not neutral between items either: a wider cone is nearer to everything, so more modalities, or
    modalities further apart, never lower an item's scores.

    A modality that the nearest direction does not need gets no gradient. With an anchor and two modalities the studies
    of the project find items and single pairs better by this loss than by volumes or residuals, also when those have
    the best of a grid of pairwise terms beside them (items by 3 to 6 points of recall, pairs by 1 to 2);
    `triangle_loss`, for complete items of exactly three modalities, is as good on items. With four modalities and more
    the cone alone is behind: add `pairwise_infonce_loss` there, and when towers are trained from scratch on raw inputs
    (`experiments/studies`).

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, 2 to 7 modalities.
      anchor: index of the anchor modality.
      temperature: positive scalar.
      label_smoothing: in [0, 1).
      where: `[batch, modality]` bool. An example needs its anchor and one more modality to have a loss.
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
    >>> round(float(cone_loss(z, temperature=1.0)), 6)  # log(1 + exp(-1))
    0.313262
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    if z.shape[1] > MOST + 1:
        raise ValueError(
            f"embeddings must have at most {MOST + 1} modalities ([batch, modality, dim]), the anchor and {MOST} that "
            f"span a cone, got shape {z.shape}."
        )
    temperature = _checks.positive("temperature", temperature, z.dtype)
    queries, gallery, query_where, gallery_where = split_anchor(z, where, anchor)
    return contrastive_nll(
        Cone(precision), queries, gallery, scale=1.0 / temperature, label_smoothing=label_smoothing,
        query_where=query_where, gallery_where=gallery_where, weights=weights, ids=ids, reduction=reduction,
        block_size=block_size, axis_name=axis_name,
    )  # fmt: skip
