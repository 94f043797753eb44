"""The area of the triangle between a query and an item of two modalities."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gramjax import _projections, linalg
from gramjax._score import ProductScore


class Line(NamedTuple):
    """Line through two points: unit direction, foot of the perpendicular from 0 (`[n, d]`), their distance `[n]`."""

    direction: Array
    foot: Array
    length: Array


@dataclasses.dataclass(frozen=True)
class Triangle(ProductScore):
    """Area of the triangle whose corners are the query and the two modalities of the item (TRIANGLE, NeurIPS 2025).

    The paper defines the area with a square root; its published code leaves the root out and returns
    `(|u|^2 |v|^2 - (u . v)^2) / 2 = 2 area^2` for the edges `u`, `v` from the query. `square_root=False` does the same.
    """

    square_root: bool = True
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST
    higher_is_better = False

    def usable(self, where):
        """Complete items only: a triangle needs its three corners."""
        return jnp.all(where, axis=-1)

    def prepare(self, gallery, where):
        """The line through the two modalities: the area is half its length times the distance of the query from it."""
        if gallery.shape[1] != 2:
            raise ValueError(
                "gallery must hold items of exactly 2 modalities, corners of a triangle with the query, got "
                f"{gallery.shape[1]}."
            )
        first = gallery[:, 0]
        edge = gallery[:, 1] - first
        length = linalg.safe_norm(edge)
        apart = length != 0
        direction = edge * jnp.where(apart, 1.0 / jnp.where(apart, length, 1.0), 0.0)[:, None]
        foot = first - jnp.sum(first * direction, axis=-1, keepdims=True) * direction
        return Line(direction, foot, length)

    def products(self, queries, prepared):
        """Of the queries with foot and direction, two of `[q, n]`."""
        return tuple(_projections.products(queries, x, self.precision) for x in (prepared.foot, prepared.direction))

    def from_products(self, products, queries, prepared):
        """The areas, `[q, n]`."""
        squares = jnp.sum(jnp.square(queries), axis=-1, keepdims=True)
        size = squares + jnp.sum(jnp.square(prepared.foot), axis=-1)[None, :]
        with_foot, with_direction = products
        distance = size - 2.0 * with_foot - jnp.square(with_direction)
        if self.square_root:
            return 0.5 * prepared.length[None, :] * _projections.safe_sqrt(distance, size)
        return 0.5 * jnp.square(prepared.length)[None, :] * jnp.maximum(distance, 0.0)

    def pairs(self, queries, prepared):
        """The same from the vector that joins the query to the line."""
        offset = queries - prepared.foot
        offset = offset - jnp.sum(offset * prepared.direction, axis=-1, keepdims=True) * prepared.direction
        if self.square_root:
            return 0.5 * prepared.length * linalg.safe_norm(offset)
        return 0.5 * jnp.square(prepared.length) * jnp.sum(jnp.square(offset), axis=-1)
