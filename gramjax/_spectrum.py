"""Singular values and leading directions of many small sets of vectors, with their derivatives, from one decomposition.

See `gramjax.linalg` for what is computed and how exactly. Sums over vectors are written out and the batch is the last
axis, so that every step is a pass over long contiguous rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gramjax import _devices, _jacobi


def tolerance(z: Array) -> float:
    """Share of a length below which a number is rounding noise, for vectors `[..., k, d]`."""
    return 2 * z.shape[-2] * float(jnp.finfo(z.dtype).eps)


class _Decomposition(NamedTuple):
    """`sum_l v_il z_l = sigma_i u_i`, the batch last."""

    values: Array  # [k, n]
    mixing: Array  # [k, k, n]: row i is v_i
    weights: Array  # [k, k, n]: row i is v_i / sigma_i, which makes u_i of the vectors; 0 where the value vanishes


@jax.custom_jvp
def spectrum(z: Float[Array, "*batch k d"]) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch d"]]:
    """`(singular_values(z), leading_direction(z))` from one decomposition, for floats of at least 32 bits."""
    return _spectrum(z)[0]


def _spectrum(z: Array) -> tuple[tuple[Array, Array], _Decomposition]:
    decomposition = _decompose(_sets(z))
    weighted = [weight[:, None] * _sets(z)[:, l] for l, weight in enumerate(decomposition.weights[0])]
    return _shaped(z, decomposition.values, functools.reduce(jnp.add, weighted)), decomposition


@spectrum.defjvp
def _spectrum_jvp(primals, tangents):
    (z,), (tangent,) = primals, tangents
    result, decomposition = _spectrum(z)
    return result, _shaped(z, *_differential(decomposition, _sets(z), _sets(tangent)))


def _sets(z: Array) -> Array:
    return z if z.ndim == 3 else z.reshape((-1, *z.shape[-2:]))


def _shaped(z: Array, values: Array, leading: Array) -> tuple[Array, Array]:
    """Values `[..., k]` and directions `[..., d]` of `[k, n]` and `[n, d]`."""
    return values.T.reshape(z.shape[:-1]), leading.reshape((*z.shape[:-2], z.shape[-1]))


def _differential(decomposition: _Decomposition, z: Array, tangent: Array) -> tuple[Array, Array]:
    """Derivatives of the singular values `[k, n]` and of the leading singular vector `[n, d]`.

    With `B_ij = u_i^T dz^T v_j`: `d sigma_i = B_ii`, and
    `du_1 = sum_(i>1) u_i (s_1 B_i1 + s_i B_1i) / (s_1^2 - s_i^2) + (I - sum_i u_i u_i^T) dz^T v_1 / s_1`.
    All of it is made of the products `z_m . dz_l` and of combinations of the `z_m` and `dz_l`. Written so that the
    transpose, which gradients take, is two passes: the products of the cotangent of `u_1` with the `z_m`, and one
    combination of both for every `dz_l`.
    """
    values, mixing, weights = decomposition
    k = z.shape[1]
    leading = values[:1]
    # Two values closer than this cannot be told apart; the turn between their vectors is then undefined, and left out.
    simple = leading - values > tolerance(z) * leading
    gap = jnp.where(simple, jnp.square(leading) - jnp.square(values), 1.0)
    inverse = jnp.where(leading > 0, 1.0 / jnp.where(leading > 0, leading, 1.0), 0.0)
    into, from_ = jnp.where(simple, leading / gap, 0.0) - inverse, jnp.where(simple, values / gap, 0.0)
    products = _products(z, tangent)
    # Barriers: XLA would compute few numbers for each set, and so their cotangents, again for each of many.
    into, from_ = jax.lax.optimization_barrier((into, from_))
    products = jax.lax.optimization_barrier(products)
    of_values = [_outer(weight, mix) for weight, mix in zip(weights, mixing)]
    into, from_ = into[:, None] * weights, from_[:, None] * mixing  # [k, k, n]
    of_turns = [_outer(into[i], mixing[0]) + _outer(weights[0], from_[i]) for i in range(k)]
    changes, turns = (
        jnp.stack([jnp.sum(x * products, axis=(0, 1)) for x in functionals]) for functionals in (of_values, of_turns)
    )
    turns = jax.lax.optimization_barrier(turns)
    along = [functools.reduce(jnp.add, [turns[i] * weights[i, m] for i in range(k)]) for m in range(k)]
    # A set of zero vectors has no leading direction: its weights, and so its derivative, are 0.
    return changes, jnp.sum(weights[0].T[..., None] * tangent, axis=1) + _combined(jnp.stack(along), z)


def _products(z: Array, tangent: Array) -> Array:
    """`z_m . dz_l`, `[m, l, n]`."""
    return jnp.stack([jnp.sum(z[:, m : m + 1] * tangent, axis=-1).T for m in range(z.shape[1])])


def _outer(a: Array, b: Array) -> Array:
    """`[m, n], [l, n] -> [m, l, n]`."""
    return a[:, None] * b[None]


# A block of items of this size stays in the cache from one pass over it to the next.
_BLOCK_BYTES = 2**21


def _block(z: Array) -> int | None:
    """How many of the sets `[n, k, d]` to take at a time on one CPU device, if they are many; None: all."""
    n, k, d = z.shape
    size = max(32, _BLOCK_BYTES // (k * d * z.dtype.itemsize))
    return size if jax.default_backend() == "cpu" and n >= 4 * size and _on_one_device(z) else None


def _on_one_device(z: Array) -> bool:
    """Whether the array is known to lie on one device: XLA would gather one divided over a mesh to loop over it."""
    divided = any(axes is not None for axes in jax.typeof(z).sharding.spec)
    return not divided and (jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual)


@jax.custom_jvp
def _decompose(z: Array) -> _Decomposition:
    if (block := _block(z)) is None:
        return _decompose_at_once(z)
    n = z.shape[0]

    def body(i, done):
        start = jnp.minimum(i * block, n - block)  # the last ones, whatever of them was done before
        part = _decompose_at_once(jax.lax.dynamic_slice_in_dim(z, start, block))
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, x.ndim - 1), done, part)

    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(_decompose_at_once, z))
    return jax.lax.fori_loop(0, -(-n // block), body, _devices.vary_over(empty, _devices.varying(z)))


@_decompose.defjvp
def _decompose_jvp(primals, tangents):
    """For second derivatives.

    With `B_ij` as above, `dv_i = sum_(j != i) v_j (s_i B_ij + s_j B_ji) / (s_i^2 - s_j^2)`.
    """
    (z,), (tangent,) = primals, tangents
    decomposition = _decompose(z)
    values, mixing, weights = decomposition
    along = jnp.sum(weights[:, :, None] * _products(z, tangent)[None], axis=1)  # u_i . dz_l
    b = jnp.sum(along[:, None] * mixing[None], axis=2)
    changes = jnp.stack([b[i, i] for i in range(len(values))])
    gaps = values[:, None] - values[None]
    simple = jnp.abs(gaps) > tolerance(z) * values[:1, None]
    gaps = jnp.where(simple, gaps * (values[:, None] + values[None]), 1.0)
    turns = values[:, None] * b
    turns = jnp.where(simple, (turns + jnp.swapaxes(turns, 0, 1)) / gaps, 0.0)
    mixing_changes = jnp.sum(turns[:, :, None] * mixing[None], axis=1)
    inverse = jnp.where(values > 0, 1.0 / jnp.where(values > 0, values, 1.0), 0.0)[:, None]
    weight_changes = inverse * (mixing_changes - changes[:, None] * weights)
    return decomposition, _Decomposition(changes, mixing_changes, weight_changes)


def _decompose_at_once(z: Array) -> _Decomposition:
    """From the triangular factor, `z_l = sum_j R_jl q_j`: the left singular vectors of `R^T` are the `v_i`.

    The factor is as small as the Gram matrix, but that would have lost the small singular values (in float32, below
    3e-4 of the largest).
    """
    k = z.shape[1]
    # Measured: more gain nothing on sets random, nearly parallel, or of repeated, clustered or widely different values.
    sweeps = (2 if k == 2 else 3 + k // 2) + 2 * (z.dtype == jnp.float64)
    values, mixing = _jacobi.singular_vectors(_triangle(z), sweeps=sweeps)
    values, mixing = jax.lax.optimization_barrier(_jacobi.in_descending_order(values, mixing))
    present = ~(values <= tolerance(z) * values[:1])
    values = jnp.where(present, values, 0.0)
    mixing = mixing * _orientation(values, mixing)[None, None]
    weights = mixing * jnp.where(present, 1.0 / values, 0.0)[:, None]
    return _Decomposition(values, mixing, weights)


def _triangle(z: Array) -> Array:
    """Rows `[j, l, n]` of the triangular factor, by modified Gram-Schmidt.

    The orthonormal vectors, which are not kept, may not be so orthogonal, but the factor is as accurate as one of
    Householder reflections (Bjorck, 1967).
    """
    k = z.shape[1]
    # Copies: the sums below take a fraction of the time over vectors that lie together. The other barriers keep what is
    # left of the vectors from being computed again for every sum.
    rest = list(jax.lax.optimization_barrier([z[:, l] for l in range(k)]))
    rows = []
    while rest:
        products = [jnp.sum(rest[0] * vector, axis=-1) for vector in rest]
        inverse = jnp.where(products[0] == 0, 0.0, jax.lax.rsqrt(products[0]))
        row = [product * inverse for product in products]
        rows.append([jnp.zeros_like(inverse)] * len(rows) + row)
        shares = jax.lax.optimization_barrier([(entry * inverse)[:, None] for entry in row[1:]])
        left = [vector - share * rest[0] for vector, share in zip(rest[1:], shares)]
        rest = list(jax.lax.optimization_barrier(left))
    return jnp.stack([jnp.stack(row) for row in rows])


def _combined(weights: Array, z: Array) -> Array:
    """`[k, n], [n, k, d] -> [n, d]`."""
    # On CPUs the transpose, products of one vector with k, takes a fraction of the time so. Accelerators would leave
    # their matrix units idle and round besides; there XLA fuses the sums into few passes.
    if jax.default_backend() == "cpu":
        return jnp.einsum("mn,nmd->nd", weights, z, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(weights.T[..., None] * z, axis=1)


def _orientation(values: Array, mixing: Array) -> Array:
    """Sign `[n]` that makes `u_1 . sum_l z_l = sigma_1 sum_l v_1l` positive, or else the first `sigma_1 v_1l`.

    The sum vanishes not by accident only: two unit vectors at an obtuse angle have their leading direction along their
    difference, orthogonal to their sum. Rounding must not choose the sign then.
    """
    k = mixing.shape[0]
    # Rounding turns v_1 by its share of the distance to the next singular value.
    gap = jnp.maximum(values[0] - values[min(1, k - 1)], 0.0)
    noise = 8 * k * float(jnp.finfo(mixing.dtype).eps)
    noise = jnp.where(gap > 0, noise * values[0] / jnp.where(gap > 0, gap, 1.0), noise)
    total = jnp.sum(mixing[0], axis=0)
    decides = jnp.zeros_like(total)
    for entry in (total, *mixing[0]):
        decides = jnp.where(decides == 0, jnp.where(jnp.abs(entry) > noise, entry, 0.0), decides)
    return jnp.where(decides < 0, -1.0, 1.0).astype(mixing.dtype)
