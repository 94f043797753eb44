"""Reductions along the rows of a score matrix that is never held: a running state for each row, tile by tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int


class Tile(NamedTuple):
    """Some consecutive columns. The last tile may begin before the one before it ends: what is not `fresh` was seen."""

    content: Any  # pytree with the columns as leading axis
    position: Int[Array, " columns"]
    fresh: Bool[Array, " columns"]


def fold(
    update: Callable[[Any, Any, Tile], Any],
    state: Any,
    rows: Any,
    columns: Any,
    *,
    load: Callable[[Any], Any] = lambda content: content,
    block_size: int | None = None,
) -> Any:
    """Runs `state = update(state, rows, tile)` over all tiles of columns in their order, for blocks of rows.

    Memory beyond the arguments is that of one tile, whatever the numbers of rows and columns.

    Args:
      update: takes and returns the state of a block of rows.
      state: pytree with the rows as leading axis.
      rows: pytree with the rows as leading axis.
      columns: pytree with the columns as leading axis.
      load: what becomes of a tile's content once, before it meets the blocks of rows.
      block_size: columns of a tile; default from the platform.

    Returns:
      The final state.
    """
    number_of_rows, number_of_columns = (jax.tree.leaves(tree)[0].shape[0] for tree in (rows, columns))
    if not number_of_rows:
        return state
    row_block, column_block = _tile_shape(number_of_rows, number_of_columns, block_size)
    state = vary_like(state, (rows, columns))
    blocks_of_rows = -(-number_of_rows // row_block)
    padding = blocks_of_rows * row_block - number_of_rows

    def split(x):
        x = jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:])))
        return x.reshape((blocks_of_rows, row_block, *x.shape[1:]))

    def one_tile(state, number):
        start = jnp.minimum(number * column_block, number_of_columns - column_block)
        content = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, column_block), columns)
        position = start + jnp.arange(column_block, dtype=jnp.int32)
        tile = Tile(load(content), position, position >= number * column_block)
        if blocks_of_rows == 1:
            return update(state, rows, tile), None
        return jax.lax.map(lambda block: update(block[0], block[1], tile), (state, blocked_rows)), None

    if blocks_of_rows > 1:
        # Padded rows are computed like the others and cut off at the end.
        state, blocked_rows = jax.tree.map(split, (state, rows))
    numbers = jnp.arange(-(-number_of_columns // column_block), dtype=jnp.int32)
    state, _ = jax.lax.scan(one_tile, state, numbers)
    if blocks_of_rows > 1:
        state = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:]))[:number_of_rows], state)
    return state


def vary_like(tree: Any, like: Any) -> Any:
    """`tree` typed as different on every device over whose axes `like` is, as `jax.shard_map` wants of a loop's state.

    Outside `shard_map`, and inside it without these types (`check_vma=False`), it is `tree` itself.
    """
    axes = _varying(like)

    def widen(x):
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, tree)


def _varying(tree: Any) -> frozenset:
    axes = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = jax.typeof(leaf)
        kind = getattr(kind, "manual_axis_type", kind)  # where the type keeps it depends on the version of JAX
        axes |= getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())
    return axes


def from_all_devices(x: Array, axis_name: str) -> Array:
    """`[devices, ...]`: what `x` is on each device of the axis, known to be equal on all of them.

    A sum instead of `all_gather`, whose result counts as different on every device in the types of `shard_map`.
    """
    own = jnp.arange(axis_size(axis_name)) == jax.lax.axis_index(axis_name)
    own = own.reshape((-1, *(1 for _ in x.shape)))
    return jax.lax.psum(jnp.where(own, x[None], jnp.zeros((), x.dtype)), axis_name)


def axis_size(axis_name: str) -> int:
    """Devices along a mesh axis of the surrounding `shard_map`."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name {axis_name!r} is not an axis here: outside jax.shard_map (or pmap), leave it out or give mesh=."
        ) from None


def check_axis(axis_name: str | None, mesh: Mesh | None) -> str | None:
    """The axis over which arrays are divided: with a mesh one of its axes, by default the first."""
    if mesh is None:
        if axis_name is not None:
            axis_size(axis_name)
        return axis_name
    if axis_name is not None and axis_name not in mesh.axis_names:
        raise ValueError(f"axis_name must be one of the mesh's axes {mesh.axis_names}, got {axis_name!r}.")
    return mesh.axis_names[0] if axis_name is None else axis_name


def check_block_size(block_size: int | None) -> None:
    """Raises unless `block_size` is None or a positive integer."""
    if block_size is None:
        return
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an integer or None, got {type(block_size).__name__}.")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")


def _tile_shape(rows: int, columns: int, block_size: int | None) -> tuple[int, int]:
    """Rows and columns of a tile: on CPU it should stay in the cache, elsewhere keep the device busy."""
    most_rows, most_columns = (1024, 4096) if jax.default_backend() == "cpu" else (4096, 16384)
    blocks_of_rows = -(-rows // most_rows)
    return -(-rows // blocks_of_rows), min(columns, block_size or most_columns)
