"""Singular values and leading directions of many small sets of vectors, with their derivatives, from one decomposition.

See `gramjax.linalg` for what is computed and how exactly. Sums over vectors are written out and the batch is the last
axis, so that every step is a pass over long contiguous rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gramjax import _jacobi


def tolerance(z: Array) -> float:
    """Share of a length below which a number is rounding noise, for vectors `[..., k, d]`."""
    return 2 * z.shape[-2] * float(jnp.finfo(z.dtype).eps)


class _Decomposition(NamedTuple):
    """`sum_l v_il z_l = sigma_i u_i`, the batch last."""

    values: Array  # [k, n]
    mixing: Array  # [k, k, n]: row i is v_i
    weights: Array  # [k, k, n]: row i is v_i / sigma_i, which makes u_i of the vectors; 0 where the value vanishes
    leading: Array  # [n, d]: u_1


@jax.custom_jvp
def spectrum(z: Float[Array, "*batch k d"]) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch d"]]:
    """`(singular_values(z), leading_direction(z))` from one decomposition, for floats of at least 32 bits."""
    decomposition = _by_blocks(_decompose, _blocks(z))
    return _whole(z, decomposition.values, decomposition.leading)


@spectrum.defjvp
def _spectrum_jvp(primals, tangents):
    (z,), (tangent,) = primals, tangents
    decomposition = _by_blocks(_decompose, _blocks(z))
    changes = _by_blocks(_differential, decomposition, _blocks(z), _blocks(tangent))
    return _whole(z, decomposition.values, decomposition.leading), _whole(z, *changes)


def _differential(decomposition: _Decomposition, z: Array, tangent: Array) -> tuple[Array, Array]:
    """Derivatives of the singular values `[k, n]` and of the leading singular vector `[n, d]`.

    With `B_ij = u_i^T dz^T v_j`: `d sigma_i = B_ii`, and
    `du_1 = sum_(i>1) u_i (s_1 B_i1 + s_i B_1i) / (s_1^2 - s_i^2) + (I - sum_i u_i u_i^T) dz^T v_1 / s_1`.
    All of it is made of the products `z_m . dz_l` and of combinations of the `z_m` and `dz_l`: two passes.
    """
    values, mixing, weights, _ = decomposition
    k = z.shape[1]
    moves = _vectors(tangent)
    products = jnp.stack([jnp.stack([jnp.sum(z[:, m] * move, axis=-1) for move in moves]) for m in range(k)])
    # b[i, j] = sum_ml weights[i, m] products[m, l] mixing[j, l], batch last
    b = jnp.sum(weights[:, :, None] * products[None], axis=1)
    b = jnp.sum(b[:, None] * mixing[None], axis=2)
    leading = values[:1]
    into, from_ = b[:, 0], b[0]
    # Two values closer than this cannot be told apart; the turn between their vectors is then undefined, and left out.
    simple = leading - values > tolerance(z) * leading
    gap = jnp.where(simple, jnp.square(leading) - jnp.square(values), 1.0)
    turn = jnp.where(simple, (leading * into + values * from_) / gap, 0.0)
    inverse = jnp.where(leading > 0, 1.0 / jnp.where(leading > 0, leading, 1.0), 0.0)
    along = jnp.sum((turn - into * inverse)[:, None] * weights, axis=0)  # [m, n]
    # A set of zero vectors has no leading direction: its weights, and so its derivative, are 0.
    turned = _combined(weights[0], moves) + jnp.sum(along.T[..., None] * z, axis=1)
    return jnp.stack([b[i, i] for i in range(k)]), turned


# A block of items of this size stays in a core's cache from one pass over it to the next.
_BLOCK_BYTES = 2**20


def _blocks(z: Array) -> Array:
    """`[n, k, d]`, or, on one CPU device and where they are many, `[blocks, n / blocks, k, d]`."""
    z = z if z.ndim == 3 else z.reshape((-1, *z.shape[-2:]))
    n, k, d = z.shape
    block = 32
    while n % (2 * block) == 0 and 2 * block * k * d * z.dtype.itemsize <= _BLOCK_BYTES:
        block *= 2
    if jax.default_backend() != "cpu" or n % block or n < 4 * block or not _on_one_device(z):
        return z
    return z.reshape((-1, block, k, d))


def _on_one_device(z: Array) -> bool:
    """Whether the array is known to lie on one device: XLA would gather one divided over a mesh to loop over it."""
    divided = any(axes is not None for axes in jax.typeof(z).sharding.spec)
    return not divided and (jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual)


def _by_blocks(function: Callable, *arrays: Any) -> Any:
    """`function` of blocks one after the other; the last array tells whether there are blocks."""
    if arrays[-1].ndim == 3:
        return function(*arrays)
    # Differentiated, a loop would keep all that it computes for every block; checkpointed, it keeps its input alone.
    return jax.lax.map(jax.checkpoint(lambda block: function(*block), prevent_cse=False), arrays)


def _whole(z: Array, values: Array, leading: Array) -> tuple[Array, Array]:
    """Values `[..., k]` and directions `[..., d]` of the blocks' `[k, n]` and `[n, d]`."""
    values = jnp.swapaxes(values, -1, -2)
    return values.reshape(z.shape[:-1]), leading.reshape((*z.shape[:-2], z.shape[-1]))


def _vectors(z: Array) -> list[Array]:
    """The `k` vectors `[n, d]` of `[n, k, d]`; reading and its transpose, writing, are one pass each."""
    return [part[:, 0] for part in jax.lax.split(z, (1,) * z.shape[1], axis=1)]


def _combined(weights: Array, vectors: list[Array]) -> Array:
    """`[k, n], k of [n, d] -> [n, d]`."""
    return functools.reduce(jnp.add, [weight[:, None] * vector for weight, vector in zip(weights, vectors)])


def _decompose(z: Array) -> _Decomposition:
    """Two rounds: the eigenvectors of the Gram matrix, then those of the Gram matrix of what they make of the vectors.

    The first Gram matrix has lost the small singular values (in float32, below 3e-4 of the largest). But the vectors
    turned by its eigenvectors are orthogonal up to that, and as short as the singular values are small: their own Gram
    matrix is accurate for each, relative to its length.
    """
    k = z.shape[1]
    vectors = _vectors(z)
    more = int(z.dtype == jnp.float64)
    _, first = _jacobi.eigenvectors(_gram(vectors), sweeps=3 + more + k // 3)
    turned = [_combined(weights, vectors) for weights in first]
    squares, second = _jacobi.eigenvectors(_gram(turned), sweeps=2 + more + k // 5)
    mixing = jnp.sum(second[:, :, None] * first[None], axis=1)
    squares, mixing = _jacobi.in_descending_order(squares, mixing)
    lost = squares <= 0
    values = jnp.where(lost, 0.0, jnp.sqrt(jnp.where(lost, 1.0, squares)))
    present = ~(values <= tolerance(z) * values[:1])
    values = jnp.where(present, values, 0.0)
    mixing = mixing * _orientation(values, mixing)[None, None]
    weights = mixing * jnp.where(present, 1.0 / jnp.where(present, values, 1.0), 0.0)[:, None]
    return _Decomposition(values, mixing, weights, _combined(weights[0], vectors))


def _gram(vectors: list[Array]) -> Array:
    """Inner products `[k, k, n]`."""
    k = len(vectors)
    entries = {(i, j): jnp.sum(vectors[i] * vectors[j], axis=-1) for i in range(k) for j in range(i, k)}
    return jnp.stack([jnp.stack([entries[min(i, j), max(i, j)] for j in range(k)]) for i in range(k)])


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
