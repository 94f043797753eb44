"""Checks of arguments: they read shapes, dtypes and concrete values, and name what came and what was needed."""

import math
import numbers
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from jaxtyping import Array


def as_array(name: str, value, needed: str = "an array") -> Array:
    """`value` as an array; integers that JAX would cut to 32 bits without a word are refused."""
    if isinstance(value, Mapping):
        raise TypeError(f"{name} must be one array, got a mapping of {list(value)}; see gramjax.stack_modalities.")
    if isinstance(value, np.ndarray | np.generic) and np.issubdtype(value.dtype, np.integer):
        narrow = dtypes.canonicalize_dtype(value.dtype)
        if (cut := value.astype(narrow) != value).any():
            raise ValueError(
                f"{name} must fit {narrow} unless jax_enable_x64 is on, got {np.asarray(value)[cut][0]}; "
                "numpy.unique(..., return_inverse=True) makes small integers of large ones."
            )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        got = f"of dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{name} must be {needed}, got {got}.") from error


def floating(name: str, value, axes: Sequence[str]) -> Array:
    """`value` as an array of the accumulation dtype (at least float32), its dtype and number of axes checked.

    `axes` names the axes; a leading `"..."` stands for any number of them.
    """
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {array.dtype} of shape {array.shape}.")
    rank(name, array, axes)
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)


def rank(name: str, array: Array, axes: Sequence[str]) -> None:
    """Raises unless `array` has the axes named by `axes`."""
    open_ended = axes[0] == "..."
    needed = len(axes) - open_ended
    if array.ndim < needed or (array.ndim > needed and not open_ended):
        raise ValueError(f"{name} must have shape [{', '.join(axes)}], got shape {array.shape}.")


def same_dim(name: str, array: Array, other_name: str, other: Array) -> None:
    """Raises unless both arrays have the same last axis."""
    if array.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must have the same last axis (dim), got shapes {array.shape} and {other.shape}."
        )


def mask(name: str, value, shape: tuple[int, ...], axes: str) -> Array:
    """`value` as a bool array of exactly `shape`; None stands for all True."""
    if value is None:
        return jnp.ones(shape, bool)
    array = as_array(name, value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{name} must be a bool array of shape {axes} = {shape}, got dtype {array.dtype}.")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got shape {array.shape}.")
    return array


def per_example(name: str, value, batch: int, axis: str = "batch", needed: str = "an array") -> Array:
    """`value` as an array of shape `[batch]`."""
    array = as_array(name, value, needed)
    if array.shape != (batch,):
        raise ValueError(f"{name} must have shape [{axis}] = ({batch},), got shape {array.shape}.")
    return array


def ids(name: str, value, batch: int, axis: str = "batch") -> Array:
    """`value` as signed integers of shape `[batch]`: JAX takes large unsigned ones for negative ones in comparisons."""
    array = per_example(name, value, batch, axis, "an array of integers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers of shape [{axis}] = ({batch},), got dtype {array.dtype}.")
    if not jnp.issubdtype(array.dtype, jnp.unsignedinteger):
        return array
    signed = jnp.dtype(f"int{8 * array.dtype.itemsize}")
    if batch and is_concrete(value) and (most := np.asarray(value).max()) > jnp.iinfo(signed).max:
        raise ValueError(f"{name} must fit {signed}, got {most}.")
    return array.astype(signed)


def integer(name: str, value, needed: str = "an integer") -> int:
    """`value` as a Python integer."""
    if isinstance(value, bool | Tracer) or not hasattr(value, "__index__"):
        got = "a traced value (see static_argnames)" if isinstance(value, Tracer) else type(value).__name__
        raise TypeError(f"{name} must be {needed}, got {got}.")
    return int(value)


def size(name: str, value: int, *, or_none: bool = True) -> int:
    """`value` as an integer of at least 1; `or_none`: whether the caller takes None as well."""
    value = integer(name, value, "an integer of at least 1" + ", or None" * or_none)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def weights(name: str, value, batch: int) -> Array:
    """`value` as real weights of shape `[batch]`; their signs are checked when they are concrete."""
    array = per_example(name, value, batch)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers of shape [batch] = ({batch},), got dtype {array.dtype}.")
    if batch and is_concrete(value):
        known = np.asarray(value)
        if not np.all(fit := (known >= 0) & (known < np.inf)):
            raise ValueError(f"{name} must be finite and not negative, got {known[~fit][0]} among them.")
    return array


def positive(name: str, value, dtype) -> Array:
    """`value` as a positive scalar of `dtype`; the sign is checked when the value is concrete."""
    scalar = _scalar(name, value, dtype)
    if not isinstance(value, Tracer):
        known, limits = float(value), jnp.finfo(dtype)
        # Smaller ones count as 0 where they are computed with.
        if not float(limits.tiny) <= known <= float(limits.max):
            why = f" (0 or infinite in {jnp.dtype(dtype)})" if 0 < known < math.inf else ""
            raise ValueError(f"{name} must be positive and finite, got {known}{why}.")
    return scalar


def between(name: str, value, least: float, most: float | None, dtype) -> Array:
    """`value` as a scalar of `dtype`, from `least` to `most` (None: any more); checked when the value is concrete."""
    scalar = _scalar(name, value, dtype)
    if not isinstance(value, Tracer) and not least <= float(value) <= (math.inf if most is None else most):
        needed = f"at least {least:g}" if most is None else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {needed}, got {float(value)}.")
    return scalar


def real_scalar(name: str, value, dtype) -> Array:
    """`value` as a finite scalar of `dtype`; whether it is finite is checked when the value is concrete."""
    scalar = _scalar(name, value, dtype)
    if not isinstance(value, Tracer) and not abs(float(value)) <= float(jnp.finfo(dtype).max):
        raise ValueError(f"{name} must be finite in {jnp.dtype(dtype)}, got {float(value)}.")
    return scalar


def _scalar(name: str, value, dtype) -> Array:
    array = as_array(name, value, "a real scalar")
    if array.shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {array.shape}.")
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real scalar, got dtype {array.dtype}.")
    return array.astype(dtype)


def random_key(name: str, value) -> Array:
    """`value` as one random key, new style or old."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (dtype == jnp.uint32 or jnp.issubdtype(dtype, dtypes.prng_key)):
        raise TypeError(f"{name} must be a random key from jax.random.key, got {type(value).__name__}.")
    # An old key is an array of the words that the default generator takes.
    shape = jax.eval_shape(jax.random.PRNGKey, 0).shape if dtype == jnp.uint32 else ()
    if value.shape != shape:
        raise ValueError(f"{name} must be one random key, got an array of dtype {dtype} and shape {value.shape}.")
    return value


def fraction(name: str, value: float) -> float:
    """`value` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number in [0, 1), got {type(value).__name__}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")
    return float(value)


def is_concrete(value) -> bool:
    """Whether the values are known while tracing, and lie on devices of this process."""
    return not isinstance(value, Tracer) and not (isinstance(value, Array) and not value.is_fully_addressable)


def index(name: str, value: int, size: int, axis: str) -> int:
    """`value` as a non-negative index into an axis of `size` entries; negative values count from the end."""
    value = integer(name, value)
    if not -size <= value < size:
        raise ValueError(f"{name} must index the {axis} axis of size {size}, got {value}.")
    return value % size
