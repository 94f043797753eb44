"""What a score is, and that an object is one: its methods are tried on shapes before anything is computed."""

import abc
import dataclasses
import functools
import weakref
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from gramjax import _checks


@runtime_checkable
class Score(Protocol):
    """How well queries match items: an immutable value, since what is compiled for a score is kept by its hash.

    `prepare` returns a pytree whose arrays all have the items as leading axis; derivatives go through those of a
    floating-point dtype. JAX traces all methods. Before anything is computed, those that are needed are tried on a few
    items without values; what returns another shape than is said here is named in a `ValueError`.
    """

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better match."""
        ...

    def usable(self, where: Bool[Array, "items modality"]) -> Bool[Array, " items"]:
        """Which items have what the score needs."""
        ...

    def prepare(self, gallery: Float[Array, "items modality dim"], where: Bool[Array, "items modality"]) -> Any:
        """What the score needs to know of each item."""
        ...

    def tile(self, queries: Float[Array, "queries dim"], prepared: Any) -> Float[Array, "queries items"]:
        """Scores of every query with every item."""
        ...

    def pairs(self, queries: Float[Array, "items dim"], prepared: Any) -> Float[Array, " items"]:
        """Scores of query `i` with item `i`, accurate also where `tile` loses digits to cancellation."""
        ...


@runtime_checkable
class SetScore(Score, Protocol):
    """A score whose queries may have several modalities themselves (text and sound, looking for a video)."""

    def tile_sets(
        self,
        queries: Float[Array, "queries modality dim"],
        where: Bool[Array, "queries modality"],
        prepared: Any,
    ) -> Float[Array, "queries items"]:
        """Scores of every query with every item; absent modalities of a query are 0 and count for nothing."""
        ...


class ProductScore(abc.ABC):
    """Base class of scores that follow, entry by entry, from matrix products of the queries with the items.

    It gives the `tile` of the protocol. The gradient of a loss can then keep the products in place of computing them
    again; of a class with a `tile` of its own it does not.

    >>> class Projection(ProductScore):  # on the item's only modality; with the rest of the protocol it is a score
    ...     def products(self, queries, prepared):
    ...         return queries @ prepared.T
    ...     def from_products(self, products, queries, prepared):
    ...         return products / jnp.linalg.norm(prepared, axis=-1)[None, :]
    >>> Projection().tile(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]]))
    Array([[4.]], dtype=float32)
    """

    @abc.abstractmethod
    def products(self, queries: Array, prepared: Any) -> Any:
        """The products of every query with every item, a pytree of `[q, n]`."""

    @abc.abstractmethod
    def from_products(self, products: Any, queries: Array, prepared: Any) -> Array:
        """The scores `[q, n]`, without a further matrix product."""

    def tile(self, queries: Array, prepared: Any) -> Array:
        """`[q, d]`, n prepared items -> `[q, n]`."""
        return self.from_products(self.products(queries, prepared), queries, prepared)


def gives_products(score: Any) -> bool:
    """Whether the scores of a tile are those of its matrix products."""
    return isinstance(score, ProductScore) and type(score).tile is ProductScore.tile


def check_score(score: Any) -> None:
    """Raises unless `score` has the members of a score object and is hashable."""
    name = score.__name__ if isinstance(score, type) else type(score).__name__
    if isinstance(score, type) or not isinstance(score, Score):
        members = ("higher_is_better", "usable", "prepare", "tile", "pairs")
        lacking = [member for member in members if getattr(score, member, None) is None]
        hint = f"the class {name}" if isinstance(score, type) else f"{name}, which lacks {', '.join(lacking)}"
        raise TypeError(f"score must be a score object, such as gramjax.scores.Volume(), got {hint}.")
    if not isinstance(score.higher_is_better, bool | np.bool_):
        got = type(score.higher_is_better).__name__
        raise TypeError(
            f"higher_is_better of {name} must be True or False (or a property that is), got one of type {got}."
        )
    try:
        hash(score)
    except TypeError as error:
        raise TypeError(f"score must be hashable, as a frozen dataclass without arrays is; {name}: {error}.") from error


_TRIED: weakref.WeakKeyDictionary[Any, set] = weakref.WeakKeyDictionary()


def check_results(
    score: Any, methods: tuple[str, ...], query: tuple[int, ...], gallery: tuple[int, ...], dtype: Any
) -> None:
    """Raises unless these methods of `score` return what they must for queries and a gallery of these shapes.

    What is of another shape would be broadcast, to a loss that looks like one. `prepare` and `usable` are tried in any
    case. `query` is the shape of one query.
    """
    case = type(score), methods, query, gallery[1:], jnp.dtype(dtype), jax.config.read("jax_enable_x64")
    # Values may be kept for good. Other scores may hold arrays: what is known of them goes with them.
    if dataclasses.is_dataclass(score) and type(score).__eq__ is not object.__eq__:
        _check_value(score, *case)
        return
    try:
        tried = _TRIED.setdefault(score, set())
    except TypeError:  # no weak reference to it
        tried = set()
    if case not in tried:
        _check_results(score, *case)
        tried.add(case)


@functools.lru_cache(maxsize=1024)
def _check_value(score, *case) -> None:
    _check_results(score, *case)


def _check_results(score, kind, methods, query, item, dtype, _) -> None:
    # A few of each, told apart from all else by their number: tracing takes longer than a small loss.
    items, queries, *_ = (number for number in range(3, 10) if number not in (*query, *item))

    def real(of):
        return jnp.issubdtype(of, jnp.floating) and of.itemsize <= dtype.itemsize

    vectors = jax.ShapeDtypeStruct((items, *item), dtype)
    where = jax.ShapeDtypeStruct(vectors.shape[:2], jnp.bool_)
    _check_result(score, "usable", (items,), "bool [items]", lambda of: of == jnp.bool_, where)
    prepared = _try(score, "prepare", vectors, where)
    for leaf in jax.tree.leaves(prepared) or [None]:
        if leaf is None or leaf.shape[:1] != (items,):
            got = "none" if leaf is None else f"one of shape {leaf.shape}"
            raise ValueError(
                f"{kind.__name__}.prepare must return arrays with the items as leading axis, of {items} if "
                f"tried on a gallery of shape {vectors.shape}; got {got}."
            )
    tile = (queries, items), f"{dtype} [queries, items]", real
    vectors = jax.ShapeDtypeStruct((queries, *query), dtype)
    if "tile_sets" in methods:
        where = jax.ShapeDtypeStruct(vectors.shape[:2], jnp.bool_)
        _check_result(score, "tile_sets", *tile, vectors, where, prepared)
    if "tile" in methods and gives_products(score):
        _check_result(score, "products", *tile, vectors, prepared)
    if "tile" in methods:
        _check_result(score, "tile", *tile, vectors, prepared)
    if "pairs" in methods:
        matched = jax.ShapeDtypeStruct((items, *query), dtype)
        _check_result(score, "pairs", (items,), f"{dtype} [items]", real, matched, prepared)


def _check_result(score, method, shape, needed, right, *arguments) -> None:
    result = _try(score, method, *arguments)
    for leaf in jax.tree.leaves(result) if method == "products" else [result]:
        array = isinstance(leaf, jax.ShapeDtypeStruct)
        if not array or leaf.shape != shape or not right(leaf.dtype):
            got = f"{leaf.dtype} of shape {leaf.shape}" if array else type(leaf).__name__
            raise ValueError(
                f"{type(score).__name__}.{method} must return {needed} = {shape} if tried on {shape[-1]} items and an "
                f"argument of shape {arguments[0].shape}, got {got}."
            )


def _try(score, method, *arguments) -> Any:
    name = f"{type(score).__name__}.{method}"
    try:
        traced, result = jax.make_jaxpr(getattr(score, method), return_shape=True)(*arguments)
    except Exception as error:
        error.add_note(f"So far, {name} is only tried on an argument of shape {arguments[0].shape}.")
        raise
    if any(isinstance(constant, Tracer) for constant in traced.consts):
        raise TypeError(
            f"score must not hold traced arrays, but {name} uses one: make constants outside of jit; what is learned "
            "belongs into the vectors or the scale of the logits."
        )
    return result


def check_items(gallery: Array) -> None:
    """Raises if the items have no modality, or vectors of no dimension."""
    if not all(gallery.shape[1:]):
        raise ValueError(
            "gallery must hold items of at least one modality and one dimension ([items, modality, dim]), got shape "
            f"{gallery.shape}."
        )


def check_inputs(score: Any, methods: tuple[str, ...], queries, gallery, gallery_where) -> tuple[Array, Array, Array]:
    """Queries, gallery and mask brought to one floating dtype, once they and the score's methods have been checked."""
    check_score(score)
    queries = _checks.floating("queries", queries, ("queries", "dim"))
    gallery = _checks.floating("gallery", gallery, ("items", "modality", "dim"))
    _checks.same_dim("queries", queries, "gallery", gallery)
    check_items(gallery)
    where = _checks.mask("gallery_where", gallery_where, gallery.shape[:2], "[items, modality]")
    dtype = max(queries.dtype, gallery.dtype, key=lambda dtype: dtype.itemsize)
    check_results(score, methods, queries.shape[1:], gallery.shape, dtype)
    # What is absent must not reach a score: its value may be anything, NaN included.
    gallery = jnp.where(where[..., None], gallery, 0.0)
    return queries.astype(dtype), gallery.astype(dtype), where
