"""Singular values and left singular vectors of many small matrices at once, by one-sided Jacobi rotations.

The batch is the last axis everywhere, so that every step of a rotation is elementwise over long contiguous rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Up to here a sweep is written out, pair by pair, and compiles in about a second; beyond, XLA takes far longer.
_WRITTEN_OUT = 8


# Compiled by itself where nothing else is, or every call would compile its loop anew.
@functools.partial(jax.jit, static_argnames="sweeps", inline=True)
def singular_vectors(
    columns: Float[Array, "k m n"], *, sweeps: int
) -> tuple[Float[Array, "k n"], Float[Array, "k m n"]]:
    """Singular values and left singular vectors of matrices of `k` columns of `m` entries, in no order.

    The columns themselves are turned until they are orthogonal: those of `A J = U S`, whose lengths and directions
    these are. No rotation is kept.

    Args:
      columns: of each of `n` matrices, `[k, m, n]`.
      sweeps: over all pairs of columns. Convergence is quadratic at the end.

    Returns:
      `values` `[k, n]` and `vectors` `[k, m, n]` (vector, entry, batch), 0 where the value is 0.
    """
    k = columns.shape[0]
    if k > _WRITTEN_OUT:
        columns = _in_rounds(columns, sweeps)
    elif k > 1:
        columns = jnp.stack(jax.lax.fori_loop(0, sweeps, lambda _, turned: _sweep(turned), list(columns)))
    values = jnp.sqrt(jnp.sum(jnp.square(columns), axis=1))
    return values, columns * jnp.where(values == 0, 0.0, 1.0 / values)[:, None]


def in_descending_order(values: Float[Array, "k n"], *others: Any) -> list[Array]:
    """Sorts along the first axis, and others in the same way, by a network of exchanges."""
    k = values.shape[0]
    columns = [[x[i] for x in (values, *others)] for i in range(k)]
    for end in range(k - 1, 0, -1):
        for i in range(end):
            swap = columns[i + 1][0] > columns[i][0]
            pairs = [(a, b, swap.reshape((*(1 for _ in a.shape[1:]), -1))) for a, b in zip(columns[i], columns[i + 1])]
            columns[i] = [jnp.where(s, b, a) for a, b, s in pairs]
            columns[i + 1] = [jnp.where(s, a, b) for a, b, s in pairs]
    return [jnp.stack(parts) for parts in zip(*columns)]


def _sweep(columns: list[Array]) -> list[Array]:
    """Each pair of columns `[m, n]` made orthogonal once, one after the other."""
    columns = list(columns)
    for p in range(len(columns)):
        for q in range(p + 1, len(columns)):
            columns[p], columns[q] = _rotated(columns[p], columns[q])
    return columns


def _rotated(one: Array, other: Array) -> tuple[Array, Array]:
    """Two columns `[..., m, n]` turned into orthogonal ones."""

    def product(a, b):
        # Not `jnp.sum`, which XLA would not fuse with the rotation.
        return functools.reduce(jnp.add, [a[..., i, :] * b[..., i, :] for i in range(a.shape[-2])])

    cosine, sine = _rotation(product(one, one), product(other, other), product(one, other))
    # A barrier: XLA would compute the angle again for every entry.
    cosine, sine = jax.lax.optimization_barrier((cosine[..., None, :], sine[..., None, :]))
    return cosine * one - sine * other, sine * one + cosine * other


def _rotation(alpha: Array, beta: Array, gamma: Array) -> tuple[Array, Array]:
    """Cosine and sine of the angle that makes `[[alpha, gamma], [gamma, beta]]` diagonal."""
    difference = beta - alpha
    size = jnp.maximum(jnp.abs(difference), 2.0 * jnp.abs(gamma))
    inverse = jnp.where(size > 0, 1.0 / size, 0.0)
    # Brought to a size of 1, whose square neither overflows nor vanishes.
    difference, twice = difference * inverse, 2.0 * gamma * inverse
    root = jnp.where(size > 0, jnp.sqrt(jnp.square(difference) + jnp.square(twice)), 1.0)
    tangent = jnp.where(difference < 0, -twice, twice) / (jnp.abs(difference) + root)
    cosine = jax.lax.rsqrt(1.0 + jnp.square(tangent))
    return cosine, cosine * tangent


def _in_rounds(columns: Array, sweeps: int) -> Array:
    """Rotates `k/2` disjoint pairs at once (the schedule of a round-robin tournament): one small loop for every `k`."""
    k = columns.shape[0]
    even = k + k % 2
    state = jnp.pad(columns, ((0, even - k), (0, 0), (0, 0)))  # odd k: a zero column sits out

    def one_round(_, carry):
        first, second, labels = carry
        first, second = _rotated(first, second)
        everyone = jnp.concatenate([first, second[::-1]])
        everyone = jnp.concatenate([everyone[:1], jnp.roll(everyone[1:], 1, axis=0)])
        labels = jnp.concatenate([labels[:1], jnp.roll(labels[1:], 1)])
        return everyone[: even // 2], everyone[even // 2 :][::-1], labels

    carry = (state[: even // 2], state[even // 2 :][::-1], jnp.arange(even))
    first, second, labels = jax.lax.fori_loop(0, (even - 1) * sweeps, one_round, carry)
    return jnp.concatenate([first, second[::-1]])[jnp.argsort(labels)][:k]
