"""Products with the vectors that span an item, and what they leave of a query, without a loss of digits or a NaN."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gramjax import linalg


@jax.custom_jvp
def distance(queries: Array, basis: tuple[Array, ...]) -> Array:
    """Distance `[n]` of each query `[n, d]` from the span of its orthonormal vectors, each `[n, d]` or 0."""
    return linalg.safe_norm(*_residuals(queries, basis))


@distance.defjvp
def _distance_jvp(primals, tangents):
    """`d|r| = (dt - sum_l (q_l . t) dq_l) . r / |r|`, because the residual is orthogonal to every `q_l`; 0 at 0."""
    (queries, basis), (turned_queries, turned_basis) = primals, tangents
    residuals, told_apart = _residuals(queries, basis)
    distance = linalg.safe_norm(residuals, told_apart)
    unit = residuals * jnp.where(told_apart, 1.0 / jnp.where(told_apart, distance, 1.0), 0.0)[:, None]
    moved = turned_queries
    for direction, turned in zip(basis, turned_basis):
        moved = moved - jnp.sum(direction * queries, axis=-1, keepdims=True) * turned
    return distance, jnp.sum(unit * moved, axis=-1)


def _residuals(queries: Array, basis: tuple[Array, ...]) -> tuple[Array, Array]:
    """What is left of the queries outside the span, projected twice, and where that is more than rounding."""
    residuals = queries
    for _ in range(2):
        for direction in basis:
            residuals = residuals - jnp.sum(direction * residuals, axis=-1, keepdims=True) * direction
    noise = 2 * len(basis) * float(jnp.finfo(queries.dtype).eps)
    squares = jax.lax.stop_gradient(jnp.sum(jnp.square(residuals), axis=-1))
    return residuals, ~(squares <= noise**2 * jnp.sum(jnp.square(queries), axis=-1))


def products(queries: Array, items: Array, precision) -> Array:
    """Inner products, `[q, d], [n, d] -> [q, n]`."""
    return jax.lax.dot_general(queries, items, (((1,), (1,)), ((), ())), precision=precision)


@jax.custom_jvp
def known_as(computed: Array, value: Array) -> Array:
    """`value`, which is that of `computed`: only the derivatives of `computed` are left for XLA to compute."""
    del computed
    return value


known_as.defjvp(lambda primals, tangents: (known_as(*primals), tangents[0]))


def safe_sqrt(squares: Array, size: Array) -> Array:
    """`sqrt(max(squares, 0))`; derivative 0 where `squares` is lost in the rounding of terms of this `size`."""
    squares = jnp.maximum(squares, 0.0)
    told_apart = squares > float(jnp.finfo(squares.dtype).eps) * size
    smooth = jnp.sqrt(jnp.where(told_apart, squares, 1.0))
    return jnp.where(told_apart, smooth, jax.lax.stop_gradient(jnp.sqrt(squares)))


def determinant_of_rest(basis: Array, directions: tuple[Array, ...], precision) -> Array:
    """`det(I - C C^T)` with `C_al = basis_a . directions_l`, `[q, p, d]` and `m` of `[n, d]` -> `[q, n]`.

    The matrix is positive semidefinite with entries of at most 1: it is eliminated without pivoting, entry by entry
    over whole tiles, and what rounding leaves of a vanishing pivot is 0. A zero row of `basis` changes nothing.
    """
    p = basis.shape[1]
    cosines = [[products(basis[:, a], direction, precision) for direction in directions] for a in range(p)]
    rest = {
        (a, b): float(a == b) - sum(x * y for x, y in zip(cosines[a], cosines[b]))
        for a in range(p)
        for b in range(a, p)
    }
    pivots = []
    for a in range(p):
        pivot = jnp.maximum(rest[a, a], 0.0)
        pivots.append(pivot)
        inverse = jnp.where(pivot > 0, 1.0 / jnp.where(pivot > 0, pivot, 1.0), 0.0)
        for b in range(a + 1, p):
            for c in range(b, p):
                rest[b, c] = rest[b, c] - rest[a, b] * rest[a, c] * inverse
    return functools.reduce(jnp.multiply, pivots)
