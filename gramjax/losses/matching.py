"""Binary matching on the fused features of a pair (GRAM, equation 8; PMRL, section 4.4)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gramjax import _checks, _reduction
from gramjax._reduction import Reduction


def matching_loss(
    logits: Float[Array, "batch 2"],
    labels: Int[Array, " batch"],
    *,
    where: Bool[Array, " batch"] | None = None,
    weights: Array | None = None,
    reduction: Reduction = "mean",
) -> Array:
    """Cross-entropy of "these belong together" (class 1) against "they do not" (class 0).

    The published models build the batch from `[anchor, own data]` (label 1), `[anchor, hard negative data]` and
    `[hard negative anchor, own data]` (label 0), and add 0.1 times this loss to the contrastive one.

    Args:
      logits: `[batch, 2]` of the matching head.
      labels: `[batch]` integers, 0 or 1.
      where: `[batch]` bool, which pairs count.
      weights: `[batch]`.
      reduction: "mean", "sum" or None.

    Returns:
      A scalar, or `[batch]` for `reduction=None`; at least float32.

    Raises:
      TypeError: if `logits` is not floating point or `labels` not integer.
      ValueError: if a shape does not fit, or a concrete label is neither 0 nor 1.

    >>> round(float(matching_loss(jnp.zeros((3, 2)), jnp.array([1, 0, 0]))), 6)  # log 2
    0.693147
    """
    logits = _checks.floating("logits", logits, ("batch", "2"))
    if logits.shape[1] != 2:
        raise ValueError(f"logits must have shape [batch, 2], got shape {logits.shape}.")
    given, labels = labels, _checks.ids("labels", labels, logits.shape[0])
    if _checks.is_concrete(given) and not np.isin(values := np.asarray(given), (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(values.tolist()))}.")
    where = _checks.mask("where", where, labels.shape, "[batch]")
    weights = _reduction.check(weights, reduction, len(logits))
    logits = jnp.where(where[:, None], logits, 0.0)
    margin = logits[:, 1] - logits[:, 0]
    losses = jax.nn.softplus(jnp.where(labels == 1, -margin, margin))
    return _reduction.reduce(losses, where, weights, reduction)
