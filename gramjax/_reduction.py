"""How losses of single examples become one number: the same for every loss."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _devices

Reduction = Literal["mean", "sum"] | None


def check(weights, reduction: Reduction, batch: int, axis_name: _devices.AxisName | None = None) -> Array | None:
    """The weights as an array, if these arguments of `reduce` are right: it is called before losses are computed."""
    _devices.axis_size(axis_name)
    if reduction not in ("mean", "sum", None):
        raise ValueError(f'reduction must be "mean", "sum" or None, got {reduction!r}.')
    return None if weights is None else _checks.weights("weights", weights, batch)


def reduce(
    losses: Float[Array, " batch"],
    valid: Bool[Array, " batch"],
    weights: Array | None,
    reduction: Reduction,
    axis_name: _devices.AxisName | None = None,
) -> Float[Array, ""] | Float[Array, " batch"]:
    """`sum(w l) / sum(w)` over the valid examples, `sum(w l)`, or `w l` of each example, 0 where there is no loss.

    Sums are over the devices along `axis_name` as well. A mean over nothing is 0 with zero gradient.
    """
    weight = jnp.ones((), losses.dtype) if weights is None else weights.astype(losses.dtype)
    # An example without a loss must not contribute even if its value or weight is not finite.
    weight = jnp.where(valid, weight, 0.0)
    weighted = jnp.where(valid, losses, 0.0) * weight
    if reduction is None:
        return weighted
    total = _devices.global_sum(jnp.sum(weighted), axis_name)
    if reduction == "sum":
        return total
    mass = _devices.global_sum(jnp.sum(weight), axis_name)
    return jnp.where(mass == 0, 0.0, total / jnp.where(mass == 0, 1.0, mass))


def mean_of_terms(
    terms: Sequence[tuple[Float[Array, " batch"], Bool[Array, " batch"]]],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Each example's mean over the terms in which it has a loss, and which examples have one in any."""
    losses, valid = (jnp.stack(parts) for parts in zip(*terms))
    count = jnp.sum(valid, axis=0).astype(losses.dtype)
    return jnp.sum(jnp.where(valid, losses, 0.0), axis=0) / jnp.maximum(count, 1.0), count > 0
