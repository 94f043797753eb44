"""Exact nearest items and ranks by any score, without the matrix of all scores.

The gallery is read tile by tile, with what was found so far for each query as running state, so memory does not depend
on the product of the numbers of queries and items. Results do not depend on the tiles: equal scores are told apart by
the lower index, as `jax.lax.top_k` does. (Scores themselves may differ in their last bit between tilings, as the
matrix products of any library do.)

Across devices, in two forms. With `mesh=`, outside `jax.shard_map`, the gallery is divided over the mesh axis
`axis_name` and the call returns the result for the whole gallery. Inside `shard_map`, `axis_name` alone says that
`gallery` is this device's part of the gallery; queries must be the same on all devices of that axis, and so are the
results. Either way each device searches its own part, and only `k` candidates a query travel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gramjax import _checks, _devices
from gramjax._score import Score, SetScore, check_items, check_results, check_score
from gramjax.streaming import rowwise


def streamed_top_k(
    score: Score,
    queries: Float[Array, "queries dim"] | Float[Array, "queries query_modality dim"],
    gallery: Float[Array, "items modality dim"],
    k: int,
    *,
    query_where: Bool[Array, " queries"] | Bool[Array, "queries query_modality"] | None = None,
    gallery_where: Bool[Array, "items modality"] | None = None,
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The `k` best items for each query, best first, exactly.

    Args:
      score: what is compared, for instance `gramjax.scores.Volume()`, for which lower is better.
      queries: `[Q, d]`, or `[Q, p, d]` for queries of several modalities (`gramjax.scores.SetScore`).
      gallery: `[N, m, d]`.
      k: from 1 to `N`.
      query_where: `[Q]` bool, or `[Q, p]` for queries of several modalities; default all present.
      gallery_where: `[N, m]` bool, which modalities of the items are present; default all.
      block_size: items of a tile; default from the platform. It changes time and memory, not the result.
      axis_name: mesh axis over which the gallery is divided; see the module's introduction.
      mesh: a mesh, to call this outside `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      `(scores, indices)`, both `[Q, k]`, indices int32; of equal scores the lower index comes first. An item that the
      score cannot use (nothing of it is present) or whose score is NaN is never found: where there are fewer than `k`
      others, and for queries of which nothing is present, the rest is index -1 with the worst score, `+inf` or `-inf`.

    Raises:
      TypeError: if a dtype is wrong, or the score does not take queries of several modalities.
      ValueError: if a shape does not fit, the gallery is empty, `k` or `block_size` is out of range, or `axis_name` is
        not an axis of the mesh.

    >>> from gramjax.scores import Volume
    >>> gallery = jnp.array([[[0.0, 1.0]], [[1.0, 0.0]], [[0.6, 0.8]]])
    >>> streamed_top_k(Volume(), jnp.array([[1.0, 0.0]]), gallery, 2)[1]
    Array([[1, 2]], dtype=int32)
    """
    rows, items = _check(score, queries, gallery, query_where, gallery_where)
    return top_k_of(score, rows, items, k, load=_prepare, block_size=block_size, axis_name=axis_name, mesh=mesh)


def streamed_ranks(
    score: Score,
    queries: Float[Array, "queries dim"] | Float[Array, "queries query_modality dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    query_ids: Int[Array, " queries"] | None = None,
    gallery_ids: Int[Array, " items"] | None = None,
    query_where: Bool[Array, " queries"] | Bool[Array, "queries query_modality"] | None = None,
    gallery_where: Bool[Array, "items modality"] | None = None,
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> Int[Array, " queries"]:
    """For each query, how many wrong items come before its best right item: `gramjax.metrics.retrieval_ranks` streamed.

    Two passes over the gallery: for the best right score, which skips tiles without a right item, and to count.
    `gramjax.metrics.recall_at_k` turns ranks into recalls.

    Args:
      score: what is compared.
      queries: `[Q, d]`, or `[Q, p, d]` for queries of several modalities.
      gallery: `[N, m, d]`.
      query_ids: `[Q]` integers; default `0 .. Q-1`.
      gallery_ids: `[N]` integers; an item is right for a query with the same id, and there may be several; default
        `0 .. N-1`.
      query_where: `[Q]` bool, or `[Q, p]` for queries of several modalities; default all present.
      gallery_where: `[N, m]` bool, which modalities of the items are present; default all.
      block_size: items of a tile; default from the platform.
      axis_name: mesh axis over which the gallery (and `gallery_ids`) is divided; see the module's introduction.
      mesh: a mesh, to call this outside `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      `[Q]` int32, 0 is found first. Ties and NaN count against the query, and an item that the score cannot use has
      the worst score. A query without a right item, or of which nothing is present, has rank `N`: it is never found.

    Raises:
      TypeError: if a dtype is wrong, or the score does not take queries of several modalities.
      ValueError: if a shape does not fit, the gallery is empty, `block_size` is out of range, or `axis_name` is not an
        axis of the mesh.

    >>> from gramjax.scores import Cosine
    >>> streamed_ranks(Cosine(), jnp.array([[1.0, 0.0], [0.8, 0.6]]), jnp.eye(2)[:, None])
    Array([0, 1], dtype=int32)
    """
    rows, items = _check(score, queries, gallery, query_where, gallery_where)
    return ranks_of(
        score, rows, items, query_ids=query_ids, gallery_ids=gallery_ids, load=_prepare, block_size=block_size,
        axis_name=axis_name, mesh=mesh,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The same for queries that `check_queries` has seen and items in any form: a pytree whose arrays have the items as
# leading axis, and a function that makes `(prepared, usable)` of a tile of them. `gramjax.retrieval` keeps items that
# are prepared already.

Rows = tuple[Array, Array]
Load = Callable[[Score, Any, Any], tuple[Any, Array]]


def top_k_of(
    score: Score, rows: Rows, items: Any, k: int, *, load: Load, block_size=None, axis_name=None, mesh=None
) -> tuple[Array, Array]:
    """`streamed_top_k` for items in any form."""
    place = _place(items, block_size, axis_name, mesh)
    k = _checks.integer("k", k)
    if not 1 <= k <= place.total:
        raise ValueError(f"k must be from 1 to the number of items in the gallery, {place.total}; got {k}.")
    return _top_k(rows, items, score=score, k=k, load=load, place=place)


def ranks_of(
    score: Score, rows: Rows, items: Any, *, query_ids=None, gallery_ids=None, load: Load, block_size=None,
    axis_name=None, mesh=None,
) -> Array:  # fmt: skip
    """`streamed_ranks` for items in any form."""
    place = _place(items, block_size, axis_name, mesh)
    size = _leading(items)
    query_ids = _check_ids("query_ids", query_ids, rows[0].shape[0], "queries")
    if gallery_ids is None and mesh is None:
        gallery_ids = place.first_column(size) + jnp.arange(size, dtype=jnp.int32)
    gallery_ids = _check_ids("gallery_ids", gallery_ids, size, "items")
    return _ranks((*rows, query_ids), (items, gallery_ids), score=score, load=load, place=place)


class _Place(NamedTuple):
    """Where the items lie: `total` of them, on one device or divided over a mesh axis."""

    total: int
    devices: int
    block_size: int | None
    axis_name: _devices.AxisName | None
    mesh: Mesh | None

    def first_column(self, size: int) -> Array:
        """Index in the whole gallery of the first of this device's `size` items."""
        return jnp.int32(size * _devices.position(self.axis_name))

    def run(self, body: Callable, rows, items):
        """`body(rows, items)`, in a `shard_map` of our own if there is a mesh."""
        if self.mesh is None:
            return body(rows, items)
        padding = -self.total % self.devices
        if padding:
            items = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), *((0, 0) for _ in x.shape[1:]))), items)
        specs = PartitionSpec(), PartitionSpec(self.axis_name)
        return _devices.run_on(self.mesh, body, (rows, items), specs, PartitionSpec())


@functools.partial(jax.jit, static_argnames=("score", "k", "load", "place"))
def _top_k(rows, items, *, score, k, load, place):
    dtype = rows[0].dtype

    def body(rows, items):
        first = place.first_column(_leading(items))

        def update(found, rows, tile):
            index = first + tile.position
            goodness = _goodness(score, rows, tile.content, tile.fresh & (index < place.total))
            best, position = jax.lax.top_k(goodness, min(k, goodness.shape[1]))
            # What was found before has lower indices and comes first, so ties fall to the lowest.
            return _best_of(k, (found[0], best), (found[1], index[position]))

        shape = (rows[0].shape[0], k)
        nothing = jnp.full(shape, -jnp.inf, dtype), jnp.full(shape, -1, jnp.int32)
        goodness, indices = rowwise.fold(
            update, nothing, rows, items, load=lambda part: load(score, part, dtype), block_size=place.block_size
        )
        if place.axis_name is not None:
            goodness, indices = _best_of(
                k, *(rowwise.from_all_devices(x, place.axis_name) for x in (goodness, indices))
            )
        scores = goodness if score.higher_is_better else -goodness
        return jnp.where(scores == 0, 0.0, scores), jnp.where(goodness > -jnp.inf, indices, -1)

    return place.run(body, rows, items)


@functools.partial(jax.jit, static_argnames=("score", "load", "place"))
def _ranks(rows, columns, *, score, load, place):
    dtype = rows[0].dtype

    def body(rows, columns):
        first = place.first_column(_leading(columns))

        def load_tile(columns):
            return load(score, columns[0], dtype), columns[1]

        def examine(rows, tile):
            *queries, query_ids = rows
            content, gallery_ids = tile.content
            counted = tile.fresh & (first + tile.position < place.total)
            right = query_ids[:, None] == gallery_ids[None, :]
            right, wrong = right & counted[None, :], ~right & counted[None, :]
            return right, wrong, lambda: _goodness(score, queries, content, counted)

        def best_right(state, rows, tile):
            right, _, goodness = examine(rows, tile)

            def look(state):
                best = jnp.max(jnp.where(right, goodness(), -jnp.inf), axis=1)
                return jnp.maximum(state[0], best), state[1] | jnp.any(right, axis=1)

            return jax.lax.cond(jnp.any(right), look, lambda state: state, state)

        def count(before, rows, tile):
            _, wrong, goodness = examine(rows[0], tile)
            return before + jnp.sum(wrong & (goodness() >= rows[1][:, None]), axis=1, dtype=jnp.int32)

        fold = functools.partial(rowwise.fold, load=load_tile, block_size=place.block_size)
        size = rows[0].shape[0]
        best, found = fold(best_right, (jnp.full(size, -jnp.inf, dtype), jnp.zeros(size, bool)), rows, columns)
        if place.axis_name is not None:
            best = jax.lax.pmax(best, place.axis_name)
            found = jax.lax.psum(found.astype(jnp.int32), place.axis_name) > 0
        before = fold(count, jnp.zeros(size, jnp.int32), (rows, best), columns)
        if place.axis_name is not None:
            before = jax.lax.psum(before, place.axis_name)
        return jnp.where(found & _any_present(rows[1]), before, place.total)

    return place.run(body, rows, columns)


def _goodness(score, rows, content, counted) -> Array:
    """Scores `[q, n]` turned so that higher is better; `-inf` for what cannot be found."""
    (queries, query_where), (prepared, usable) = rows, content
    scores = score.tile(queries, prepared) if queries.ndim == 2 else score.tile_sets(queries, query_where, prepared)
    goodness = scores if score.higher_is_better else -scores
    possible = _any_present(query_where)[:, None] & (usable & counted)[None, :] & ~jnp.isnan(goodness)
    # `top_k` puts 0 before -0, which would break a tie.
    return jnp.where(possible, jnp.where(goodness == 0, 0.0, goodness), -jnp.inf)


def _best_of(k: int, goodness, indices) -> tuple[Array, Array]:
    goodness, indices = (jnp.concatenate(parts, axis=1) for parts in (goodness, indices))
    goodness, position = jax.lax.top_k(goodness, k)
    return goodness, jnp.take_along_axis(indices, position, axis=1)


def _any_present(query_where: Array) -> Array:
    return query_where if query_where.ndim == 1 else jnp.any(query_where, axis=1)


def _prepare(score: Score, items, dtype) -> tuple[Any, Array]:
    gallery, where = items
    # What is absent must not reach a score: its value may be anything, NaN included.
    return score.prepare(jnp.where(where[..., None], gallery.astype(dtype), 0.0), where), score.usable(where)


def _leading(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _check(score, queries, gallery, query_where, gallery_where) -> tuple[Rows, tuple[Array, Array]]:
    queries, gallery = _checks.as_array("queries", queries), _checks.as_array("gallery", gallery)
    if not jnp.issubdtype(gallery.dtype, jnp.floating):
        raise TypeError(f"gallery must have a floating-point dtype, got {gallery.dtype} of shape {gallery.shape}.")
    _checks.rank("gallery", gallery, ("items", "modality", "dim"))
    check_items(gallery)
    if queries.ndim:
        _checks.same_dim("queries", queries, "gallery", gallery)
    where = _checks.mask("gallery_where", gallery_where, gallery.shape[:2], "[items, modality]")
    # The gallery is widened tile by tile.
    wider = jnp.issubdtype(queries.dtype, jnp.floating) and gallery.dtype.itemsize > queries.dtype.itemsize
    rows = check_queries(score, queries.astype(gallery.dtype) if wider else queries, query_where)
    check_trial(score, rows, gallery.shape)
    return rows, (gallery, where)


def check_trial(score: Score, rows: Rows, gallery: tuple[int, ...]) -> None:
    """Raises unless the score's methods return what they must for such queries and a gallery of this shape."""
    queries, _ = rows
    check_results(score, ("tile" if queries.ndim == 2 else "tile_sets",), queries.shape[1:], gallery, queries.dtype)


def check_queries(score: Score, queries, query_where) -> Rows:
    """Queries, 0 where absent, and their mask, once they and the score have been checked."""
    check_score(score)
    sets = jnp.ndim(queries) == 3
    axes = ("queries", "query_modality", "dim") if sets else ("queries", "dim")
    queries = _checks.floating("queries", queries, axes)
    if sets and not isinstance(score, SetScore):
        raise TypeError(
            f"{type(score).__name__} takes queries of one modality, [queries, dim], got queries of shape "
            f"{queries.shape}."
        )
    if not all(queries.shape[1:]):
        raise ValueError(f"queries must have at least one modality and one dimension, got shape {queries.shape}.")
    where = _checks.mask("query_where", query_where, queries.shape[:-1], f"[{', '.join(axes[:-1])}]")
    return jnp.where(where[..., None], queries, 0.0), where


def _place(items, block_size, axis_name, mesh) -> _Place:
    block_size, axis_name, devices = rowwise.check_place(block_size, axis_name, mesh)
    size = _leading(items)
    if not size:
        raise ValueError("gallery must hold at least one item, got none.")
    return _Place(size * devices if mesh is None else size, devices, block_size, axis_name, mesh)


def _check_ids(name: str, ids, size: int, axis: str) -> Array:
    return jnp.arange(size, dtype=jnp.int32) if ids is None else _checks.ids(name, ids, size, axis)
