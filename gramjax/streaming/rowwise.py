"""Reductions along the rows of a score matrix that is never held: a running state for each row, tile by tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from gramjax import _checks, _devices
from gramjax.streaming import _tiles


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
    state = _devices.vary_over(state, _devices.varying((rows, columns)))
    blocks_of_rows = -(-number_of_rows // row_block)
    padding = blocks_of_rows * row_block - number_of_rows

    def split(x):
        x = jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:])))
        return x.reshape((blocks_of_rows, row_block, *x.shape[1:]))

    def one_tile(state, number):
        start, fresh = _tiles.window(number, number_of_columns, column_block)
        content = load(_tiles.cut(columns, start, column_block))
        position = start + jnp.arange(column_block, dtype=jnp.int32)
        tile = Tile(content, position, jnp.ones(column_block, bool) if fresh is None else fresh)
        if blocks_of_rows == 1:
            return update(state, rows, tile), None
        return jax.lax.map(lambda block: update(block[0], block[1], tile), (state, blocked_rows)), None

    if blocks_of_rows > 1:
        # Padded rows are computed like the others and cut off at the end.
        state, blocked_rows = jax.tree.map(split, (state, rows))
    numbers = jnp.arange(_tiles.number(number_of_columns, column_block), dtype=jnp.int32)
    state, _ = jax.lax.scan(one_tile, state, numbers)
    if blocks_of_rows > 1:
        state = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:]))[:number_of_rows], state)
    return state


def from_all_devices(x: Array, axis_name: _devices.AxisName) -> Array:
    """`[devices, ...]`: what `x` is on each device of the axis, known to be equal on all of them.

    A sum instead of `all_gather`, whose result counts as different on every device in the types of `shard_map`.
    """
    own = jnp.arange(_devices.axis_size(axis_name)) == _devices.position(axis_name)
    own = own.reshape((-1, *(1 for _ in x.shape)))
    return jax.lax.psum(jnp.where(own, x[None], jnp.zeros((), x.dtype)), axis_name)


def check_place(
    block_size: int | None, axis_name: _devices.AxisName | None, mesh: Mesh | None
) -> tuple[int | None, _devices.AxisName | None, int]:
    """Block size, axis over which arrays are divided (see `_devices.axis_of`) and number of devices along it."""
    if block_size is not None:
        block_size = _checks.size("block_size", block_size)
    if mesh is None:
        return block_size, axis_name, _devices.axis_size(axis_name)
    return block_size, *_devices.axis_of(mesh, axis_name)


def _tile_shape(rows: int, columns: int, block_size: int | None) -> tuple[int, int]:
    """Rows and columns of a tile: on CPU it should stay in the cache, elsewhere keep the device busy."""
    most_rows, most_columns = (1024, 4096) if jax.default_backend() == "cpu" else (4096, 16384)
    blocks_of_rows = -(-rows // most_rows)
    return -(-rows // blocks_of_rows), min(columns, block_size) if block_size else _tiles.even(columns, most_columns)
