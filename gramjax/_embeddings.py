"""The one input of every n-modal loss: `embeddings` `[batch, modality, dim]` and which of them are present."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gramjax import _checks


def stack_modalities(
    embeddings: Mapping[str, Float[Array, "batch dim"]],
    *,
    order: Sequence[str] | None = None,
    where: Mapping[str, Bool[Array, " batch"]] | None = None,
) -> tuple[Float[Array, "batch modality dim"], Bool[Array, "batch modality"]]:
    """Stacks a model's dictionary of embeddings into the input of the losses.

    Args:
      embeddings: modality name -> `[batch, dim]`; all of one shape and dtype.
      order: names along the modality axis; default the dictionary's order. A name that the dictionary lacks is
        an absent modality: zeros, and False in the mask. Names of the dictionary that `order` lacks are left out.
      where: modality name -> `[batch]` bool, which examples have it; default all.

    Returns:
      `(embeddings, where)` of shapes `[batch, modality, dim]` and `[batch, modality]`, to be passed on as
      `loss(embeddings, where=where)`.

    Raises:
      TypeError: if `embeddings` or `where` is no mapping, a dtype is not floating point, or a mask not bool.
      ValueError: if there is nothing to stack, shapes or dtypes differ, or a name repeats or is unknown.

    >>> both = {"text": jnp.ones((4, 8)), "audio": jnp.ones((4, 8))}
    >>> z, where = stack_modalities(both, order=["audio", "video", "text"])
    >>> z.shape, where[0].tolist()
    ((4, 3, 8), [True, False, True])
    """
    where = {} if where is None else where
    for argument, value in (("embeddings", embeddings), ("where", where)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{argument} must be a mapping of modality names to arrays, got {type(value).__name__}.")
    names = list(embeddings if order is None else order)
    given = [name for name in names if name in embeddings]
    if len(set(names)) != len(names):
        raise ValueError(f"order must not repeat a name, got {names}.")
    if not given:
        needed = "" if order is None else f" of {names}"
        raise ValueError(f"embeddings must hold at least one modality{needed}, got {sorted(embeddings) or 'none'}.")
    if unknown := sorted(set(where) - set(embeddings)):
        raise ValueError(f"where has masks for {unknown}, but embeddings holds only {sorted(embeddings)}.")
    arrays = {name: _checks.as_array(f"embeddings[{name!r}]", embeddings[name]) for name in given}
    shape, dtype = arrays[given[0]].shape, arrays[given[0]].dtype
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"embeddings[{name!r}] must have a floating-point dtype, got {array.dtype}.")
        if array.ndim != 2 or array.shape != shape or array.dtype != dtype:
            raise ValueError(
                "embeddings must all have one shape [batch, dim] and one dtype: "
                f"{given[0]!r} is {shape} {dtype}, {name!r} is {array.shape} {array.dtype}."
            )
    zeros = jnp.zeros(shape, dtype)
    masks = [
        _checks.mask(f"where[{name!r}]", where.get(name), shape[:1], "[batch]")
        if name in arrays
        else jnp.zeros(shape[:1], bool)
        for name in names
    ]
    return jnp.stack([arrays.get(name, zeros) for name in names], axis=1), jnp.stack(masks, axis=1)


def check_embeddings(
    embeddings, where, *, at_least: int
) -> tuple[Float[Array, "batch modality dim"], Bool[Array, "batch modality"]]:
    """The input of a loss with shapes and dtypes checked, in at least float32, absent vectors set to 0."""
    z = _checks.floating("embeddings", embeddings, ("batch", "modality", "dim"))
    if z.shape[1] < at_least:
        raise ValueError(
            f"embeddings must have at least {at_least} modalities ([batch, modality, dim]), got shape {z.shape}."
        )
    if not z.shape[2]:
        raise ValueError(f"embeddings must have at least one dimension ([batch, modality, dim]), got shape {z.shape}.")
    where = _checks.mask("where", where, z.shape[:2], "[batch, modality]")
    return jnp.where(where[..., None], z, 0.0), where


def split_anchor(z: Array, where: Array, anchor: int) -> tuple[Array, Array, Array, Array]:
    """`(queries [batch, d], gallery [batch, k-1, d], query_where [batch], gallery_where [batch, k-1])`."""
    anchor = _checks.index("anchor", anchor, z.shape[1], "modality")

    def others(x: Array) -> Array:
        # Slices, not an index array: the derivative of a gather is a scatter, which is slow.
        return jnp.concatenate([x[:, :anchor], x[:, anchor + 1 :]], axis=1)

    return z[:, anchor], others(z), where[:, anchor], others(where)
