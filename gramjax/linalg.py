r"""Gram matrices, volumes, orthonormal bases and spectra of small sets of vectors, with derivatives that stay finite.

Everything here takes `z` of shape `[..., k, d]`: `k` vectors (the embeddings of one item in `k` modalities) of `d`
entries. `k` is small (2 to 8, say), `d` large, and the leading axes are a batch. With the vectors as rows,
`G = z z^T` is their Gram matrix, `sqrt(det G)` is the volume of the parallelotope they span, and the singular values
of `z` are the square roots of the eigenvalues of `G`. GRAM (arXiv 2412.11959, section 3) minimises the volume; PMRL
(arXiv 2507.17343, section 4) maximises the leading singular value.

How it is computed. `G` squares the condition number: in float32 the determinant of three unit vectors that differ by
`1e-3` is wrong by a tenth. So volumes come from Gram-Schmidt with re-orthogonalisation, which writes
`z_l = sum_j R_jl q_j` with orthonormal `q_j`: the volume is the product of the residual norms `R_ll`. Singular values
are those of such an `R` (without re-orthogonalisation, which they do not need), whose rows Jacobi rotations turn until
they are orthogonal. No `d x d` factor ever exists.

A vector is *dependent* when what Gram-Schmidt leaves of it is below `2 k eps` of its length, which is rounding noise:
its direction is then taken as 0. Absent vectors (`where` False) are left out exactly: the volume and the spectrum are
those of the vectors that are present. Inputs narrower than float32 are computed, and results returned, in float32.
The squares of the entries must be representable (unit vectors are what is expected).

Derivatives are written out where automatic differentiation would give NaN or infinity (repeated singular values,
vanishing volumes); each docstring says which subgradient is taken. First derivatives work in forward and in reverse
mode.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gramjax import _checks, _spectrum
from gramjax._spectrum import tolerance

_AXES = ("...", "modality", "dim")


def gram_matrix(z: Float[Array, "*batch k d"]) -> Float[Array, "*batch k k"]:
    """Inner products of the `k` vectors of each set: `G = z z^T`.

    Args:
      z: vectors, `[..., k, d]`.

    Returns:
      `[..., k, k]`, symmetric, computed at full precision in at least float32.

    Raises:
      TypeError: if `z` is not floating point.
      ValueError: if `z` has fewer than two axes.

    >>> gram_matrix(jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    Array([[1., 1.],
           [1., 2.]], dtype=float32)
    """
    z = _checks.floating("z", z, _AXES)
    return jnp.einsum("...id,...jd->...ij", z, z, precision=jax.lax.Precision.HIGHEST)


def orthonormal_basis(
    z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None
) -> Float[Array, "*batch k d"]:
    """Orthonormal basis of the span of the vectors, in their order (Gram-Schmidt with re-orthogonalisation).

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[..., k, d]`: row `l` is the unit vector along what is left of `z_l` outside the span of the vectors before it,
      or 0 if `z_l` is absent or dependent on them. The derivative at a dependent vector is 0; near one it grows as
      the inverse of the residual, because the span itself turns that fast.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> orthonormal_basis(jnp.array([[2.0, 0.0], [1.0, 1.0]]))
    Array([[1., 0.],
           [0., 1.]], dtype=float32)
    """
    z, where = _masked(z, where)
    return _basis(z)


def triangular_factor(z: Float[Array, "*batch k d"]) -> Float[Array, "*batch k k"]:
    """Products of the vectors with their orthonormal basis: `z_l = sum_j R_jl q_j`, with `q` as in `orthonormal_basis`.

    The diagonal holds what is left of each vector outside the span of those before it, accurately, where a Cholesky
    factor of the Gram matrix has lost half of the digits.

    Args:
      z: vectors, `[..., k, d]`.

    Returns:
      `[..., k, k]`, upper triangular. A dependent vector has 0 on the diagonal.

    Raises:
      TypeError: if `z` is not floating point.
      ValueError: if a shape does not fit.

    >>> triangular_factor(jnp.array([[2.0, 0.0], [1.0, 1.0]]))
    Array([[2., 1.],
           [0., 1.]], dtype=float32)
    """
    return _gram_schmidt(_vectors(z)).triangle


def volume(z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None) -> Float[Array, "*batch"]:
    r"""Volume of the parallelotope spanned by the vectors, `sqrt(det(z z^T))` (GRAM, equation 3).

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[...]`. For unit vectors in [0, 1]: 0 when they are linearly dependent (for two: parallel or opposite; the
      volume is blind to sign), 1 when they are orthogonal. One vector has its length for volume, none has 1. The
      derivative with respect to `z_l` is the volume of the other vectors times the unit residual of `z_l` outside
      their span, at most 1 in length for unit vectors. At linearly dependent vectors, where the volume has a corner,
      the subgradient 0 is taken.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> z = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    >>> round(float(volume(z)), 6)
    0.8
    """
    return _volume(*_masked(z, where))


def log_volume(z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None) -> Float[Array, "*batch"]:
    """Logarithm of the volume, for many modalities, where the product of sines underflows.

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[...]`: the sum of the logarithms of the Gram-Schmidt residual norms. A dependent vector counts with the
      smallest residual told apart from 0, `2 k eps` times its length, and with derivative 0, so the result is finite
      everywhere. Elsewhere the derivative grows as the inverse of the residual.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> round(float(log_volume(jnp.array([[1.0, 0.0], [0.6, 0.8]]))), 6)
    -0.223144
    """
    z, where = _masked(z, where)
    residuals = _diagonal(_gram_schmidt(z).triangle)
    tiny = jnp.finfo(z.dtype).tiny
    floor = jax.lax.stop_gradient(jnp.maximum(tolerance(z) * safe_norm(z), tiny))
    told_apart = residuals > tiny
    logs = jnp.log(jnp.where(told_apart, residuals, floor))
    return jnp.sum(jnp.where(where, logs, 0.0), axis=-1)


def singular_values(
    z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None
) -> Float[Array, "*batch k"]:
    """Singular values of the matrix whose rows are the vectors, in descending order.

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[..., k]`. With `n` vectors present the first `n` are their singular values and the rest are 0. For unit
      vectors their squares add up to `n`; full alignment is `(sqrt(n), 0, ...)` (PMRL, section 4.1). The derivative
      is `d sigma_i = u_i^T dz^T v_i`; at repeated values the singular vectors that the solver found are used (for the
      largest value a valid subgradient). A value below `2 k eps` of the largest, which is rounding noise, is taken as
      0, with derivative 0.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> singular_values(jnp.array([[3.0, 0.0], [0.0, 4.0]]))
    Array([4., 3.], dtype=float32)
    """
    return spectrum(z, where)[0]


def leading_direction(
    z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None
) -> Float[Array, "*batch d"]:
    """Unit vector along which the vectors agree most: the leading singular vector `u_1` in `R^d` (PMRL, section 4.3).

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[..., d]`, of length 1, or 0 when every vector is 0 or absent. A singular vector is defined up to its sign;
      this one is oriented so that `u_1 . sum_l z_l > 0`. Where that product is 0 (always so for two unit vectors at
      an obtuse angle, whose leading direction is along their difference) the first vector with a part along `u_1`
      decides; there the orientation is discontinuous. (Unit to float32 rounding: vectors that were rounded to bfloat16
      differ in length by so much that rounding decides. Normalise in float32.) The derivative needs only the largest
      singular value to be simple. Where it is repeated, the direction is undefined within the leading subspace: turns
      inside that subspace are given derivative 0.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> [round(float(x), 6) for x in leading_direction(jnp.array([[0.0, 2.0], [0.0, 3.0]]))]
    [0.0, 1.0]
    """
    return spectrum(z, where)[1]


def spectrum(
    z: Float[Array, "*batch k d"], where: Bool[Array, "*batch k"] | None = None
) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch d"]]:
    """`(singular_values(z, where), leading_direction(z, where))` from one decomposition.

    Args:
      z: vectors, `[..., k, d]`.
      where: which vectors are present, `[..., k]`; default all.

    Returns:
      `[..., k]` and `[..., d]`, as from those functions.

    Raises:
      TypeError: if `z` is not floating point or `where` not bool.
      ValueError: if a shape does not fit.

    >>> spectrum(jnp.array([[0.0, 3.0], [4.0, 0.0]]))
    (Array([4., 3.], dtype=float32), Array([1., 0.], dtype=float32))
    """
    return _spectrum.spectrum(_masked(z, where)[0])


def safe_norm(x: Float[Array, "*batch d"], keep: Bool[Array, "*batch"] | None = None) -> Float[Array, "*batch"]:
    """Euclidean norm over the last axis with derivative 0, instead of NaN, at 0; 0 wherever `keep` is False.

    NaN stays NaN, here and everywhere below: comparisons are written so that it is never taken for 0.
    """
    squares = jnp.sum(jnp.square(x), axis=-1)
    keep = squares != 0 if keep is None else keep & (squares != 0)
    return jnp.where(keep, jnp.sqrt(jnp.where(keep, squares, 1.0)), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Gram-Schmidt


class _Factors(NamedTuple):
    """`z_l = sum_j triangle[j, l] basis[j]`, with zero rows for absent and dependent vectors."""

    basis: Array  # [..., k, d]
    triangle: Array  # [..., k, k], upper triangular


def _vectors(z) -> Array:
    z = _checks.floating("z", z, _AXES)
    if 0 in z.shape[-2:]:
        raise ValueError(f"z must hold at least one vector of at least one dimension in a set, got shape {z.shape}.")
    return z


def _masked(z, where) -> tuple[Array, Array]:
    z = _vectors(z)
    where = _checks.mask("where", where, z.shape[:-1], "[..., modality]")
    return jnp.where(where[..., None], z, 0.0), where


def _gram_schmidt(z: Array) -> _Factors:
    """Classical Gram-Schmidt, each vector projected twice: as orthogonal as rounding allows, and only two passes."""
    k = z.shape[-2]
    rounding = tolerance(z)
    directions: list[Array] = []
    columns: list[Array] = []
    # A list of vectors, and elementwise products and sums, not a stack and matrix products: exact float32 on every
    # platform, and XLA fuses it into several times fewer passes over memory.
    for l in range(k):
        residual = z[..., l, :]
        coefficients = [jnp.zeros(z.shape[:-2], z.dtype)] * l
        length = jax.lax.stop_gradient(safe_norm(residual))
        for _ in range(2 if l else 0):
            steps = [jnp.sum(direction * residual, axis=-1) for direction in directions]
            for step, direction in zip(steps, directions):
                residual = residual - step[..., None] * direction
            coefficients = [total + step for total, step in zip(coefficients, steps)]
        squared = jax.lax.stop_gradient(jnp.sum(jnp.square(residual), axis=-1))
        independent = ~(squared <= jnp.square(rounding * length))
        norm = safe_norm(residual, independent)
        directions.append(residual * jnp.where(norm != 0, 1.0 / jnp.where(norm != 0, norm, 1.0), 0.0)[..., None])
        below = [jnp.zeros_like(norm)] * (k - l - 1)
        columns.append(jnp.stack([*coefficients, norm, *below], axis=-1))
    return _Factors(jnp.stack(directions, axis=-2), jnp.stack(columns, axis=-1))


@jax.custom_jvp
def _basis(z: Array) -> Array:
    return _gram_schmidt(z).basis


@_basis.defjvp
def _basis_jvp(primals, tangents):
    """`dq_l = c_l - (q_l . c_l) q_l - sum_(j<l) (q_j . c_l + q_l . c_j) q_j`, where `dz_l = sum_(j<=l) R_jl c_j`.

    Written out because the derivative of the projections, each done twice, takes many times as long.
    """
    (z,), (tangent,) = primals, tangents
    basis, triangle = _gram_schmidt(z)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    c = einsum("...jl,...jd->...ld", _inverse(triangle), tangent)
    products = einsum("...jd,...ld->...jl", basis, c)
    turn = jnp.triu(products) + jnp.triu(jnp.swapaxes(products, -1, -2), 1)
    return basis, c - einsum("...jl,...jd->...ld", turn, basis)


def _inverse(triangle: Array) -> Array:
    """Inverse of upper triangular matrices, with a zero column wherever the diagonal vanishes."""
    k = triangle.shape[-1]
    zero = jnp.zeros_like(triangle[..., 0, 0])
    columns: list[list[Array]] = []
    for l in range(k):
        pivot = triangle[..., l, l]
        inverse = jnp.where(pivot != 0, 1.0 / jnp.where(pivot != 0, pivot, 1.0), 0.0)
        above = [-inverse * sum((triangle[..., i, l] * columns[i][j] for i in range(j, l)), zero) for j in range(l)]
        columns.append([*above, inverse, *[zero] * (k - l - 1)])
    return jnp.stack([jnp.stack(column, axis=-1) for column in columns], axis=-1)


def _diagonal(matrix: Array) -> Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Volume


@jax.custom_jvp
def _volume(z: Array, where: Array) -> Array:
    return jnp.prod(jnp.where(where, _diagonal(_gram_schmidt(z).triangle), 1.0), axis=-1)


@_volume.defjvp
def _volume_jvp(primals, tangents):
    """`dVol = <adj(R) q, dz>`: the derivative `Vol (z z^T)^-1 z` with the volume multiplied into the inverse."""
    z, where = primals
    tangent = tangents[0]
    basis, triangle = _gram_schmidt(z)
    residuals = jnp.where(where, _diagonal(triangle), 1.0)
    adjugate = _adjugate(triangle, residuals)
    gradient = jnp.einsum("...ij,...jd->...id", adjugate, basis, precision=jax.lax.Precision.HIGHEST)
    return jnp.prod(residuals, axis=-1), jnp.sum(gradient * tangent, axis=(-2, -1))


def _adjugate(triangle: Array, diagonal: Array) -> Array:
    """`det(R) R^-1` of upper triangular matrices without a division, so that it is exact where `det(R)` vanishes.

    Multiplying the back substitution `R_ii (R^-1)_ij = -sum_l R_il (R^-1)_lj` by `R_(i+1)(i+1) .. R_jj` gives a
    recursion for the corners `M_ij = R_ii .. R_jj (R^-1)_ij`, polynomial in the entries of `R`.
    """
    k = triangle.shape[-1]
    one = jnp.ones_like(diagonal[..., 0])
    between = functools.partial(_product, diagonal)
    corner: dict[tuple[int, int], Array] = {(i, i): one for i in range(k)}
    for width in range(1, k):
        for i in range(k - width):
            j = i + width
            corner[i, j] = -functools.reduce(
                jnp.add, [triangle[..., i, l] * between(i + 1, l) * corner[l, j] for l in range(i + 1, j + 1)]
            )
    rows = [
        [between(0, i) * corner[i, j] * between(j + 1, k) if i <= j else jnp.zeros_like(one) for j in range(k)]
        for i in range(k)
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _product(diagonal: Array, start: int, stop: int) -> Array:
    return jnp.prod(diagonal[..., start:stop], axis=-1)
