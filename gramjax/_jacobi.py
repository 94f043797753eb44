"""Eigenvectors of many small Gram matrices at once, by Jacobi rotations.

The batch is the last axis everywhere, so that every step of a rotation is elementwise over long contiguous rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gramjax import _devices

# Up to here a sweep is written out, pair by pair, and compiles in about a second; beyond, XLA takes far longer.
_WRITTEN_OUT = 4


# Compiled by itself where nothing else is, or every call would compile its loop anew.
@functools.partial(jax.jit, static_argnames="sweeps", inline=True)
def eigenvectors(gram: Float[Array, "k k n"], *, sweeps: int) -> tuple[Float[Array, "k n"], Float[Array, "k k n"]]:
    """`(values, vectors)` of positive semidefinite matrices, in no order: `gram vectors[i] = values[i] vectors[i]`.

    Args:
      gram: symmetric; the upper triangle is read.
      sweeps: over all pairs. Convergence is quadratic at the end.

    Returns:
      `values` `[k, n]` and `vectors` `[k, k, n]` (vector, entry, batch).
    """
    k = gram.shape[0]
    if k == 1:
        return gram[0], jnp.ones_like(gram)
    # For the loop below it must lie on the devices on which the matrices lie.
    identity = jnp.eye(k, dtype=gram.dtype)[..., None] + jnp.zeros_like(gram)
    identity = _devices.vary_over(identity, _devices.varying(gram))
    if k > _WRITTEN_OUT:
        return _one_sided(gram, identity, sweeps)
    entries = {(i, j): gram[i, j] for i in range(k) for j in range(i, k)}
    sweeps = 1 if k == 2 else sweeps  # the only pair
    entries, vectors = jax.lax.fori_loop(
        0, sweeps, lambda _, state: _sweep(state[0], state[1], k), (entries, [identity[i] for i in range(k)])
    )
    return jnp.stack([entries[i, i] for i in range(k)]), jnp.stack(vectors)


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


def _rotation(alpha: Array, beta: Array, gamma: Array) -> tuple[Array, Array, Array]:
    """Tangent, cosine and sine of the angle that makes `[[alpha, gamma], [gamma, beta]]` diagonal."""
    difference = beta - alpha
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(difference), 2.0 * jnp.abs(gamma)))
    inverse = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)
    # Brought to a size of 1, whose square neither overflows nor vanishes.
    difference, twice = difference * inverse, 2.0 * gamma * inverse
    root = jnp.sqrt(jnp.where(size > 0, jnp.square(difference) + jnp.square(twice), 1.0))
    tangent = jnp.where(difference < 0, -twice, twice) / (jnp.abs(difference) + root)
    cosine = jax.lax.rsqrt(1.0 + jnp.square(tangent))
    return tangent, cosine, cosine * tangent


def _sweep(entries: dict, vectors: list[Array], k: int) -> tuple[dict, list[Array]]:
    """Each pair of rows and columns rotated once, one after the other."""
    entries, vectors = dict(entries), list(vectors)
    for p in range(k):
        for q in range(p + 1, k):
            tangent, cosine, sine = _rotation(entries[p, p], entries[q, q], entries[p, q])
            moved = tangent * entries[p, q]
            entries[p, p], entries[q, q] = entries[p, p] - moved, entries[q, q] + moved
            entries[p, q] = jnp.zeros_like(moved)
            for r in set(range(k)) - {p, q}:
                one, other = (min(r, p), max(r, p)), (min(r, q), max(r, q))
                a, b = entries[one], entries[other]
                entries[one], entries[other] = cosine * a - sine * b, sine * a + cosine * b
            a, b, c, s = vectors[p], vectors[q], cosine[None], sine[None]
            vectors[p], vectors[q] = c * a - s * b, s * a + c * b
    return entries, vectors


def _one_sided(columns: Array, identity: Array, sweeps: int) -> tuple[Array, Array]:
    """Rotates pairs of columns until all are orthogonal; their lengths are then the eigenvalues.

    A round rotates `k/2` disjoint pairs at once (the schedule of a round-robin tournament), so that one small loop
    body serves every `k`.
    """
    k = columns.shape[0]
    even = k + k % 2
    # The rotations are accumulated by rotating the identity along with the matrix. Odd k: a zero column sits out.
    state = jnp.pad(jnp.concatenate([columns, identity], axis=1), ((0, even - k), (0, 0), (0, 0)))

    def one_round(_, carry):
        first, second, labels = carry
        first, second = _rotate_columns(first, second, k)
        everyone = jnp.concatenate([first, second[::-1]])
        everyone = jnp.concatenate([everyone[:1], jnp.roll(everyone[1:], 1, axis=0)])
        labels = jnp.concatenate([labels[:1], jnp.roll(labels[1:], 1)])
        return everyone[: even // 2], everyone[even // 2 :][::-1], labels

    carry = (state[: even // 2], state[even // 2 :][::-1], jnp.arange(even))
    first, second, labels = jax.lax.fori_loop(0, (even - 1) * sweeps, one_round, carry)
    state = jnp.concatenate([first, second[::-1]])[jnp.argsort(labels)][:k]
    squares = jnp.sum(jnp.square(state[:, :k]), axis=1)
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares))), state[:, k:]


def _rotate_columns(first: Array, second: Array, rows: int) -> tuple[Array, Array]:
    """One rotation for each pair of columns `[pair, row, n]`, orthogonalising their first `rows` rows."""
    alpha = jnp.sum(jnp.square(first[:, :rows]), axis=1, keepdims=True)
    beta = jnp.sum(jnp.square(second[:, :rows]), axis=1, keepdims=True)
    gamma = jnp.sum(first[:, :rows] * second[:, :rows], axis=1, keepdims=True)
    _, cosine, sine = _rotation(alpha, beta, gamma)
    return cosine * first - sine * second, sine * first + cosine * second
