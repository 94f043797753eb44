"""The angle between a query and the convex cone of an item's modalities."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gramjax import _projections, linalg
from gramjax._score import ProductScore

# Faces of the cone grow as 2^m, and every one of them is a few operations on a whole tile.
MOST = 6


class Faces(NamedTuple):
    """Combinations of generators (`_members`), each with its triangle, `x_l = sum_j triangle[j, l] q_j`."""

    triangles: Array  # [n, face, m, m], zero rows and columns for what is not in the face
    valid: Array  # [n, face] bool: all generators are there, and told apart


class Generators(NamedTuple):
    """An item's modalities as directions (0 where there is none), their products, and the faces of their cone."""

    directions: tuple[Array, ...]  # m of [n, d]
    present: tuple[Array, ...]  # m of [n] bool
    gram: Array  # [n, m, m]
    faces: Faces


@dataclasses.dataclass(frozen=True)
class Cone(ProductScore):
    r"""Cosine between the query and the nearest direction of the convex cone of the item's modalities.

        S(t, x) = max { t . c : c = sum_l a_l x_l / |x_l|,  a_l >= 0,  |c| = 1 }

    It is to the span of `Residual` what a cone is to its linear hull: `S = sqrt(1 - r)` where the projection of a unit
    query onto the span lies between the modalities, and less where it does not, down to the largest single cosine. So
    it keeps what makes the volume find items (the query may lie anywhere between the modalities, nearer to the one
    that says more); how close an item's modalities are to each other does not multiply every score of the item, and a
    modality that points away does not count for it. A wider cone is nearer to every query: a further modality never
    lowers a score.

    The maximum is taken over the faces of the cone in closed form: there the coefficients are those of the projection
    onto the span of the face's generators, and it counts if all are positive. At the maximum `a` the derivative is
    `dS = sum_l a_l (t - S c) . dx_l + c . dt` (the envelope theorem), and no solve is differentiated.
    Higher derivatives have rules, too; but inside of `jax.lax.map` and `scan` jax 0.10 loses those, and they are wrong.
    """

    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST
    higher_is_better = True

    def usable(self, where):
        """Items with at least one modality."""
        return jnp.any(where, axis=-1)

    def prepare(self, gallery, where):
        """Unit directions, and the triangles of all their combinations."""
        _, m, _ = gallery.shape
        if m > MOST:
            raise ValueError(f"gallery must hold items of at most {MOST} modalities, which span a cone, got {m}.")
        x = jnp.where(where[..., None], gallery, 0.0)
        length = linalg.safe_norm(x)
        present = where & ~(length == 0)  # a length that is not a number is there, and shows
        unit = x * jnp.where(present, 1.0 / jnp.where(present, length, 1.0), 0.0)[..., None]
        gram = jnp.einsum("nad,nbd->nab", unit, unit, precision=jax.lax.Precision.HIGHEST)
        faces = _faces(jax.lax.stop_gradient(unit), present)
        return Generators(tuple(unit[:, l] for l in range(m)), tuple(present[:, l] for l in range(m)), gram, faces)

    def products(self, queries, prepared):
        """One matrix product for each modality, `m` of `[q, n]`."""
        return tuple(_projections.products(queries, x, self.precision) for x in prepared.directions)

    def from_products(self, products, queries, prepared):
        """The scores, `[q, n]`."""
        del queries
        return _nearest(products, *jax.tree.map(lambda x: x[None], prepared[1:]))

    def pairs(self, queries, prepared):
        """`[n, d]`, n items -> `[n]`."""
        products = (jnp.sum(queries * x, axis=-1) for x in prepared.directions)
        return _nearest(tuple(products), *prepared[1:])

    def tile_sets(self, queries, where, prepared):
        """Mean of the scores of the query's modalities, `[q, n]`."""
        number = jnp.maximum(jnp.sum(where, axis=1), 1).astype(queries.dtype)
        each = range(queries.shape[1])
        tiles = [jnp.where(where[:, a, None], self.tile(queries[:, a], prepared), 0.0) for a in each]
        return functools.reduce(jnp.add, tiles) / number[:, None]


@functools.cache
def _members(m: int) -> np.ndarray:
    """`[face, m]` bool: all combinations of two generators and more, the small ones first."""
    faces = [chosen for size in range(2, m + 1) for chosen in itertools.combinations(range(m), size)]
    return np.array([[l in chosen for l in range(m)] for chosen in faces], bool).reshape(len(faces), m)


def _faces(unit: Array, present: Array) -> Faces:
    members = jnp.asarray(_members(unit.shape[1]))
    triangles = linalg.triangular_factor(jnp.where(members[None, :, :, None], unit[:, None], 0.0))
    # Generators closer to dependent than this leave a face so narrow that its edges stand for it, to rounding.
    narrow = 2.0 * float(jnp.finfo(unit.dtype).eps) ** 0.5
    apart = (jnp.diagonal(triangles, axis1=2, axis2=3) > narrow) & present[:, None]
    return Faces(triangles, jnp.all(apart | ~members[None], axis=2))


@jax.custom_jvp
def _nearest(products: tuple[Array, ...], present: tuple[Array, ...], gram: Array, faces: Faces) -> Array:
    """The score from the products of queries and directions, all `[..., n]`; `gram` is for the derivative alone."""
    return _solve(products, present, gram, faces)[0]


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    """`dS = sum_l a_l d(t . x_l) - S/2 sum_lm a_l a_m d(x_l . x_m)`."""
    products, present, gram, faces = primals
    moved, _, turned, _ = tangents
    score, weights = _solve(products, present, gram, faces)
    m = len(products)
    change = functools.reduce(jnp.add, [weight * tangent for weight, tangent in zip(weights, moved)])
    for l in range(m):
        for k in range(l + 1, m):  # the directions are unit vectors: the diagonal does not move
            change = change - score * weights[l] * weights[k] * (0.5 * (turned[..., l, k] + turned[..., k, l]))
    return score, change


def _solve(products: tuple[Array, ...], present: tuple[Array, ...], gram: Array, faces: Faces):
    """The score, and the weights of the generators in the nearest unit direction."""
    m = len(products)
    score = functools.reduce(jnp.maximum, [jnp.where(there, c, -jnp.inf) for there, c in zip(present, products)])
    weights, taken = [], jnp.zeros(score.shape, bool)
    for there, c in zip(present, products):
        first = there & (c == score) & ~taken
        weights.append(first.astype(score.dtype))
        taken |= first
    score = jnp.where(functools.reduce(jnp.logical_or, present), score, 0.0)

    def try_face(best, face):
        score, weights = best
        length, inside, coefficients = _project(products, *face)
        better = inside & (length > score)
        scale = 1.0 / jnp.where(better, length, 1.0)
        weights = [jnp.where(better, found * scale, weight) for found, weight in zip(coefficients, weights)]
        return (jnp.where(better, length, score), weights), None

    # The faces of two or three generators are written out; of more, a loop keeps code and working memory small.
    triangles = _factors(gram, faces.triangles, faces.valid)
    each = (jnp.moveaxis(triangles, -3, 0), jnp.moveaxis(faces.valid, -1, 0), jnp.asarray(_members(m)))
    return _with_derivatives(products, *jax.lax.scan(try_face, (score, weights), each, unroll=m <= 3)[0])


def _with_derivatives(products: tuple[Array, ...], score: Array, weights: list[Array]):
    """The same values, on a face with the derivatives of its length, for those of the weights: second derivatives.

    The loop over faces takes the length for a constant, because it computes it in a way that loses no digits.
    """
    on_face = sum((weight > 0).astype(jnp.int32) for weight in weights) > 1
    length = jax.lax.stop_gradient(score)
    squares = length * sum(weight * c for weight, c in zip(weights, products))
    computed = jnp.sqrt(jnp.where(on_face & (squares > 0), squares, 1.0))
    scale = _projections.known_as(jnp.where(on_face, length / computed, 1.0), jnp.ones_like(score))
    score = _projections.known_as(jnp.where(on_face, computed, score), score)
    return score, [weight * scale for weight in weights]


def _project(products: tuple[Array, ...], triangle: Array, valid: Array, member: Array):
    """Length of the projection onto a face's span, whether it lies inside of the face, and its coefficients."""
    m = len(products)
    pivots = [triangle[..., l, l] for l in range(m)]
    inverse = [jnp.where(valid & (pivot > 0), 1.0 / jnp.where(pivot > 0, pivot, 1.0), 0.0) for pivot in pivots]
    along: list[Array] = []  # the orthonormal vectors of the face
    for l in range(m):
        along.append((products[l] - sum(triangle[..., j, l] * along[j] for j in range(l))) * inverse[l])
    coefficients: list[Array] = [products[0]] * m
    for l in reversed(range(m)):
        rest = along[l] - sum(triangle[..., l, j] * coefficients[j] for j in range(l + 1, m))
        coefficients[l] = rest * inverse[l]
    inside = functools.reduce(jnp.logical_and, [(c > 0) | ~there for c, there in zip(coefficients, member)], valid)
    return jax.lax.stop_gradient(jnp.sqrt(sum(jnp.square(y) for y in along))), inside, coefficients


@jax.custom_jvp
def _factors(gram: Array, triangles: Array, valid: Array) -> Array:
    """The triangles, as the factors of what faces have of the Gram matrix: for second derivatives."""
    del gram, valid
    return triangles


@_factors.defjvp
def _factors_jvp(primals, tangents):
    """`dR = Phi(R^-T dG R^-1) R`, where `Phi` takes the upper triangle with half of the diagonal."""
    (_, _, valid), (turned, *_) = primals, tangents
    factors = _factors(*primals)
    m = factors.shape[-1]
    members = jnp.broadcast_to(_members(m), (*valid.shape, m)) & valid[..., None]
    inside = members[..., :, None] & members[..., None, :]
    one = jnp.broadcast_to(jnp.eye(m, dtype=factors.dtype), factors.shape)
    filled, turned = jnp.where(inside, factors, one), jnp.where(inside, turned[..., None, :, :], 0.0)
    solve = functools.partial(jax.lax.linalg.triangular_solve, filled)
    turned = solve(solve(turned, left_side=True, transpose_a=True), left_side=False)
    change = jnp.einsum("...ij,...jk->...ik", jnp.triu(turned) * (1.0 - 0.5 * one), filled, precision="highest")
    return factors, change
