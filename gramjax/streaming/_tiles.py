"""Cutting arrays of items into tiles, and functions of one item computed tile by tile.

The last tile of a size that does not divide overlaps the one before it, instead of being padded: every tile holds real
items, and only those not `fresh` are left out.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gramjax._devices import vary_over, varying


def number(items: int, size: int) -> int:
    """How many tiles of this size it takes."""
    return -(-items // size)


def even(items: int, most: int) -> int:
    """Size of the tiles that share the items evenly: the last one overlaps another, and would do that work again."""
    share = -(-items // max(1, -(-items // most)))
    return min(items, most, -(-share // 32) * 32)


def window(index: Int[Array, ""], items: int, size: int) -> tuple[Int[Array, ""], Bool[Array, " size"] | None]:
    """Where a tile starts, and which of its items no tile before it had (None: all)."""
    nominal = index * size
    if items % size == 0:
        return nominal, None
    start = jnp.minimum(nominal, items - size)
    return start, start + jnp.arange(size, dtype=start.dtype) >= nominal


def cut(tree: Any, start: Int[Array, ""], size: int) -> Any:
    """`size` items of every array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def put(tree: Any, part: Any, start: Int[Array, ""]) -> Any:
    """Every array with `part` in the place of what was there."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), tree, part)


# Cotangents. Of what is no real number (a mask, an index) there is none, and None stands for it: JAX has arrays of a
# dtype of its own there, which no loop can carry.


def add(tree: Any, part: Any, start: Int[Array, ""], size: int) -> Any:
    """Every cotangent with `part` added in its place."""
    return put(tree, jax.tree.map(jnp.add, cut(tree, start, size), of_reals(part)), start)


def zeros(tree: Any) -> Any:
    """Cotangents of 0 of every array, varying over the same devices."""
    return jax.tree.map(lambda x: vary_over(jnp.zeros(x.shape, x.dtype), varying(x)) if _is_real(x) else None, tree)


def of_reals(cotangents: Any) -> Any:
    """What JAX gives and takes as cotangents, in the form of `zeros`."""
    return jax.tree.map(lambda x: x if _is_real(x) else None, cotangents)


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def item_by_item(function: Callable, size: int, inputs: Any, fixed: Any = ()) -> Any:
    """`function(inputs, fixed)` of many items, `size` of them at a time.

    The function must treat each item on its own. Its intermediate results are held for one tile only, in the gradient
    as well, where they are computed again. Differentiable in reverse mode, with respect to `inputs`.
    """
    items = jax.tree.leaves(inputs)[0].shape[0]
    if items <= size:
        return function(inputs, fixed)
    axes = varying((inputs, fixed))
    return _item_by_item(function, size, *vary_over((inputs, fixed), axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _item_by_item(function, size, inputs, fixed):
    items = jax.tree.leaves(inputs)[0].shape[0]
    axes = varying((inputs, fixed))

    def body(i, outputs):
        start, _ = window(i, items, size)
        return put(outputs, function(*cut((inputs, fixed), start, size)), start)

    shapes = jax.eval_shape(lambda: function(*cut((inputs, fixed), jnp.int32(0), size)))
    outputs = jax.tree.map(lambda x: vary_over(jnp.zeros((items, *x.shape[1:]), x.dtype), axes), shapes)
    return jax.lax.fori_loop(0, number(items, size), body, outputs)


def _forward(function, size, inputs, fixed):
    return _item_by_item(function, size, inputs, fixed), (inputs, fixed)


def _backward(function, size, residuals, cotangents):
    inputs, fixed = residuals
    return pull_item_by_item(function, size, inputs, fixed, of_reals(cotangents)), None


_item_by_item.defvjp(_forward, _backward)


def pull_item_by_item(function: Callable, size: int, inputs: Any, fixed: Any, cotangents: Any) -> Any:
    """Cotangents of the inputs of `item_by_item`, from those of what it returns, both in the form of `zeros`."""
    items = jax.tree.leaves(inputs)[0].shape[0]

    def body(i, gradients):
        start, _ = window(i, items, size)
        part, unchanged, received = cut((inputs, fixed, cotangents), start, size)
        _, pull = jax.vjp(lambda part: of_reals(function(part, unchanged)), part)
        return put(gradients, of_reals(pull(received)[0]), start)

    size = min(size, items)
    return jax.lax.fori_loop(0, number(items, size), body, zeros(inputs))
