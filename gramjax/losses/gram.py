"""GRAM: contrast volumes (arXiv 2412.11959)."""

import jax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gramjax import _checks
from gramjax._devices import AxisName, over_mesh
from gramjax._embeddings import check_embeddings, split_anchor
from gramjax._reduction import Reduction
from gramjax.scores import HIGHEST, Volume
from gramjax.streaming import contrastive_nll


@over_mesh("embeddings", "where", "weights", "ids")
def gram_loss(
    embeddings: Float[Array, "batch modality dim"],
    *,
    anchor: int = 0,
    temperature: ArrayLike = 0.07,
    label_smoothing: float = 0.0,
    where: Bool[Array, "batch modality"] | None = None,
    weights: Array | None = None,
    ids: Array | None = None,
    reduction: Reduction = "mean",
    detach_candidates: bool = False,
    block_size: int | None = None,
    axis_name: AxisName | None = None,
    mesh: Mesh | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Array:
    r"""Volume contrastive loss `1/2 (L_D2A + L_A2D)` (GRAM, equations 6 and 7).

    Softmax cross-entropy over the batch with logits `-Vol(anchor_i, data_j) / temperature`, from anchor to data and
    from data to anchor. The published objective adds 0.1 times the matching loss of a fusion encoder
    (`matching_loss`).

    The volume is blind to sign: embeddings trained from scratch by this loss alone may settle anti-parallel. Adding
    `pairwise_infonce_loss` prevents it. See `gramjax.scores` for the bias between items. An item with more modalities
    present than `dim` has volume 0 whatever they are: a batch of such items teaches nothing.

    Args:
      embeddings: `[batch, modality, dim]`, unit vectors, at least 2 modalities.
      anchor: index of the anchor modality (text, in the paper).
      temperature: positive scalar.
      label_smoothing: in [0, 1); the published configurations use 0.1.
      where: `[batch, modality]` bool. An example needs its anchor and one more modality to have a loss.
      weights: `[batch]`.
      ids: `[batch]`.
      reduction: "mean", "sum" or None.
      detach_candidates: reproduce the published distributed gradient, in which gathered candidates carry none.
      block_size: rows and columns of the score matrix computed at a time; None chooses.
      axis_name: mesh axis along which the batch is divided over devices (see `gramjax.losses`).
      mesh: for global arrays outside of `jax.shard_map`; `axis_name` may be left out if it has one axis.
      precision: of the matrix products.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or an option is out of range.

    >>> import jax
    >>> z = jax.random.normal(jax.random.key(0), (8, 3, 16))
    >>> z = z / jax.numpy.linalg.norm(z, axis=-1, keepdims=True)
    >>> loss, gradient = jax.value_and_grad(gram_loss)(z, temperature=0.1)
    >>> loss.shape, gradient.shape
    ((), (8, 3, 16))
    """
    del mesh
    z, where = check_embeddings(embeddings, where, at_least=2)
    temperature = _checks.positive("temperature", temperature, z.dtype)
    queries, gallery, query_where, gallery_where = split_anchor(z, where, anchor)
    return contrastive_nll(
        Volume(precision), queries, gallery, scale=-1.0 / temperature, label_smoothing=label_smoothing,
        query_where=query_where, gallery_where=gallery_where, weights=weights, ids=ids, reduction=reduction,
        detach_candidates=detach_candidates, block_size=block_size, axis_name=axis_name,
    )  # fmt: skip
