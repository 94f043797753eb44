r"""What is compared: scores between queries `[Q, d]` and items of `m` modalities `[N, m, d]`.

A score is a small hashable object without arrays. It knows how to `prepare` a gallery once, to score a `tile` of
queries against prepared items by matrix products, and to score matched `pairs` accurately. How scores are reduced
(softmax losses, ranks) is written once against this protocol, in `gramjax.streaming`; neither side knows the other.
A score of one's own that is made of matrix products may derive from `ProductScore`, for a faster gradient.

The volume without determinants of `Q x N` Gram matrices. The published code builds a `[Q, N, k, k]` tensor. But by
Schur's complement, for a query `t_i` and the `m = k - 1` modalities `x_j` of item `j`,

    Vol(i, j)^2 = D_j r_ij,   D_j = det(x_j x_j^T),   r_ij = |t_i|^2 - sum_l (q_jl . t_i)^2

with `q_jl` an orthonormal basis of the span of `x_j`: the volume of the item once per item, and `m` matrix products.

Two faults of the volume as a score follow from this formula, and a user should know them. *It is not comparable
between items*: `D_j` multiplies every score of item `j`, so an item whose own modalities are close to each other is
near to every query, and an item with fewer modalities is far from every query. `Residual`, `sqrt(r_ij)`, leaves `D_j`
out: it is the sine of the angle between query and span. *It is blind to sign*: a vector and its opposite span the same
line, so modalities trained from scratch by volume alone may settle anti-parallel. `Cosine`, `LeadingDirection` and
`Cone` see signs. `Cone` has what is good in the volume, the query may lie anywhere between the item's modalities, and a
sign and no factor `D_j`; but it, too, favours items with more modalities, or with modalities further apart.

Unit vectors are expected, not enforced: lengths multiply into the scores. An item that a score cannot use (nothing
of it is present; for `Triangle`: anything is missing) gets the worst score, `+inf` or `-inf`, from the functions here.

Precision: TPUs round float32 factors of a matrix product to bfloat16 unless told otherwise, and GPUs may use TF32.
With modalities at cosine .9995 the difference `r_ij` then turns negative for some pairs and volumes are wrong by a
fifth. So products run at `Precision.HIGHEST` unless a score is made with another `precision`; while modalities are far
from aligned, and for `Cosine`, lower precision is a fair trade for speed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gramjax import _projections, linalg
from gramjax._cone import Cone
from gramjax._score import ProductScore, Score, SetScore, check_inputs
from gramjax._triangle import Triangle

__all__ = [
    "Cone",
    "Cosine",
    "LeadingDirection",
    "Multilinear",
    "ProductScore",
    "Residual",
    "Score",
    "SetScore",
    "Span",
    "Triangle",
    "Volume",
    "cone_scores",
    "cosine_scores",
    "leading_direction_scores",
    "multilinear_scores",
    "residual_scores",
    "score_matrix",
    "triangle_scores",
    "volume_scores",
]

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class _InnerProduct(ProductScore):
    """Scores that are the inner product of the query with one vector `[n, d]` for each item."""

    precision: jax.lax.PrecisionLike = HIGHEST
    higher_is_better = True

    def usable(self, where):
        """Items with at least one modality."""
        return jnp.any(where, axis=-1)

    def products(self, queries, prepared):
        """`[q, d], [n, d] -> [q, n]`."""
        return _projections.products(queries, prepared, self.precision)

    def from_products(self, products, queries, prepared):
        """The products as they are."""
        del queries, prepared
        return products

    def pairs(self, queries, prepared):
        """`[n, d], [n, d] -> [n]`."""
        return jnp.sum(queries * prepared, axis=-1)

    def tile_sets(self, queries, where, prepared):
        """Mean of the scores of the query's modalities: the score of their mean."""
        return self.tile(_mean_of_present(queries, where), prepared)


class Cosine(_InnerProduct):
    """Mean inner product of the query with the modalities of the item: their mean cosine for unit vectors."""

    def prepare(self, gallery, where):
        """Mean of the present modalities, `[n, d]`: the mean of inner products is the product with the mean."""
        return _mean_of_present(gallery, where)


class LeadingDirection(_InnerProduct):
    """Cosine of the query with the leading direction `u_1` of the item's modalities (PMRL, section 4.3)."""

    def prepare(self, gallery, where):
        """The oriented leading directions, `[n, d]`."""
        return linalg.leading_direction(gallery, where)


class Multilinear(_InnerProduct):
    """Multilinear inner product `sum_d t_d x_1d x_2d ...` of the query with the item's modalities (Symile)."""

    def prepare(self, gallery, where):
        """Elementwise product of the present modalities, `[n, d]`."""
        return jnp.prod(jnp.where(where[..., None], gallery, 1.0), axis=-2)

    def tile_sets(self, queries, where, prepared):
        """The product runs over the query's modalities as well."""
        return self.tile(self.prepare(queries, where), prepared)


class Span(NamedTuple):
    """The span of an item's modalities: `m` basis vectors `[n, d]` (0 where there is none), and the volume `[n]`."""

    basis: tuple[Array, ...]
    volume: Array


@dataclasses.dataclass(frozen=True)
class Residual(ProductScore):
    """Distance of the query from the span of the item's modalities: for unit queries the sine of their angle."""

    precision: jax.lax.PrecisionLike = HIGHEST
    higher_is_better = False

    def usable(self, where):
        """Items with at least one modality."""
        return jnp.any(where, axis=-1)

    def prepare(self, gallery, where):
        """Orthonormal bases and volumes of the items."""
        basis = linalg.orthonormal_basis(gallery, where)
        return Span(tuple(basis[:, l] for l in range(gallery.shape[1])), linalg.volume(gallery, where))

    def products(self, queries, prepared):
        """`q_l . t`, `m` of `[q, n]`: one product for each modality, so that each is squared as it is accumulated."""
        return tuple(_projections.products(queries, direction, self.precision) for direction in prepared.basis)

    def from_products(self, products, queries, prepared):
        """`sqrt(|t|^2 - sum_l (q_l . t)^2)`, `[q, n]`."""
        lengths = jnp.sum(jnp.square(queries), axis=-1, keepdims=True)
        return _projections.safe_sqrt(lengths - sum(jnp.square(product) for product in products), lengths)

    def pairs(self, queries, prepared):
        """Norm of the residual vector itself: no digits are lost when the query lies close to the span."""
        return _projections.distance(queries, prepared.basis)

    def tile_sets(self, queries, where, prepared):
        """Volume of what the item's span leaves of the query's modalities, `[q, n]`.

        With orthonormal bases `s` of the query and `q` of the item it is `Vol(query) sqrt(det(I - C C^T))`, where
        `C_al = s_a . q_l`: the volume between the two spans, free of the lengths and angles within either.
        """
        basis = linalg.orthonormal_basis(queries, where)
        between = _projections.safe_sqrt(
            _projections.determinant_of_rest(basis, prepared.basis, self.precision), jnp.ones((), queries.dtype)
        )
        return between * linalg.volume(queries, where)[:, None]


class Volume(Residual):
    """Volume of the parallelotope spanned by the query and the item's modalities (GRAM, equation 3).

    See the module's introduction for what this score cannot do: compare items whose own volumes differ, and see signs.
    """

    def from_products(self, products, queries, prepared):
        """`Vol(x_j) sqrt(r_ij)`, `[q, n]`."""
        return super().from_products(products, queries, prepared) * prepared.volume[None, :]

    def pairs(self, queries, prepared):
        """`Vol(x_i)` times the norm of the residual vector."""
        return super().pairs(queries, prepared) * prepared.volume

    def tile_sets(self, queries, where, prepared):
        """Volume of all modalities of both, `[q, n]`."""
        return super().tile_sets(queries, where, prepared) * prepared.volume[None, :]


def cosine_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Mean cosine of each query with the modalities of each item; higher is better.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, m, d]`, unit vectors.
      gallery_where: `[N, m]` bool, which modalities are present; default all.
      precision: of the matrix products.

    Returns:
      `[Q, N]` in [-1, 1]; `-inf` for items of which nothing is present.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> cosine_scores(jnp.array([[1.0, 0.0]]), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]))
    Array([[0.5]], dtype=float32)
    """
    return score_matrix(Cosine(precision), queries, gallery, gallery_where=gallery_where)


def volume_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Volume spanned by each query and the modalities of each item (GRAM, equation 3); lower is better.

    The volume favours items whose own modalities are close to each other or many, and is blind to sign: see the
    module's introduction, and `residual_scores`.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, m, d]`, unit vectors.
      gallery_where: `[N, m]` bool, which modalities are present; default all.
      precision: of the matrix products.

    Returns:
      `[Q, N]` in [0, 1]; `inf` for items of which nothing is present. A volume far below the square root of
      rounding (3e-4 in float32) is lost in it; `linalg.volume` computes matched ones accurately.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> volume_scores(jnp.array([[1.0, 0.0]]), jnp.array([[[0.0, 1.0]], [[1.0, 0.0]]]))
    Array([[1., 0.]], dtype=float32)
    """
    return score_matrix(Volume(precision), queries, gallery, gallery_where=gallery_where)


def residual_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Sine of the angle between each query and the span of each item's modalities; lower is better.

    Unlike the volume, comparable between items whose own modalities are more or less close. It shares the blindness
    to sign, and the span of more modalities is nearer to everything: with very different numbers of modalities the
    fuller items are favoured.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, m, d]`; lengths do not matter.
      gallery_where: `[N, m]` bool, which modalities are present; default all.
      precision: of the matrix products.

    Returns:
      `[Q, N]` in [0, 1]; `inf` for items of which nothing is present.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> round(float(residual_scores(jnp.array([[0.6, 0.8]]), jnp.array([[[5.0, 0.0]]]))[0, 0]), 4)
    0.8
    """
    return score_matrix(Residual(precision), queries, gallery, gallery_where=gallery_where)


def cone_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Cosine of the angle between each query and the convex cone of each item's modalities; higher is better.

    The volume's and the residual's generosity (the query may lie anywhere between the modalities) with a sign, and
    without the factor by which volumes of different items differ. The cone of more modalities is wider, and nearer to
    everything: with very different numbers of modalities the fuller items are favoured, as by the residual.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, m, d]`, at most 6 modalities; lengths do not matter.
      gallery_where: `[N, m]` bool, which modalities are present; default all.
      precision: of the matrix products.

    Returns:
      `[Q, N]` in [-1, 1]; `-inf` for items of which nothing is present.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> between, behind = jnp.array([0.6, 0.8]), jnp.array([-0.6, 0.8])
    >>> [round(float(score), 4) for score in cone_scores(jnp.stack([between, behind]), jnp.eye(2)[None])[:, 0]]
    [1.0, 0.8]
    """
    return score_matrix(Cone(precision), queries, gallery, gallery_where=gallery_where)


def leading_direction_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Cosine of each query with the leading direction of each item's modalities (PMRL, section 4.3); higher is better.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, m, d]`, unit vectors.
      gallery_where: `[N, m]` bool, which modalities are present; default all.
      precision: of the matrix products.

    Returns:
      `[Q, N]` in [-1, 1]; `-inf` for items of which nothing is present.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> scores = leading_direction_scores(jnp.array([[0.6, 0.8]]), jnp.array([[[0.0, 1.0], [0.0, 1.0]]]))
    >>> round(float(scores[0, 0]), 4)
    0.8
    """
    return score_matrix(LeadingDirection(precision), queries, gallery, gallery_where=gallery_where)


def triangle_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    square_root: bool = True,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Area of the triangle with the query and the item's two modalities as corners (TRIANGLE); lower is better.

    Args:
      queries: `[Q, d]`, unit vectors.
      gallery: `[N, 2, d]`, unit vectors.
      gallery_where: `[N, 2]` bool, which modalities are present; default all.
      square_root: True for the area as in the paper, False for `2 area^2` as in its published code.
      precision: of the matrix products.

    Returns:
      `[Q, N]`, at most `3 sqrt(3) / 4` for unit vectors; `inf` for incomplete items.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit, or the items do not have exactly two modalities.

    >>> round(float(triangle_scores(jnp.array([[0.0, 0.0]]), jnp.array([[[1.0, 0.0], [0.0, 1.0]]]))[0, 0]), 4)
    0.5
    """
    return score_matrix(Triangle(square_root, precision), queries, gallery, gallery_where=gallery_where)


def multilinear_scores(
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
    precision: jax.lax.PrecisionLike = HIGHEST,
) -> Float[Array, "queries items"]:
    """Multilinear inner product of each query with the modalities of each item (Symile, equation 3); higher is better.

    Args:
      queries: `[Q, d]`.
      gallery: `[N, m, d]`.
      gallery_where: `[N, m]` bool, which modalities are present; default all. An absent one is left out of the product,
        so scores of items with different numbers of modalities are of different sizes.
      precision: of the matrix products.

    Returns:
      `[Q, N]`; `-inf` for items of which nothing is present.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> multilinear_scores(jnp.array([[1.0, 2.0]]), jnp.array([[[3.0, 4.0], [5.0, 6.0]]]))
    Array([[63.]], dtype=float32)
    """
    return score_matrix(Multilinear(precision), queries, gallery, gallery_where=gallery_where)


def score_matrix(
    score: Score,
    queries: Float[Array, "queries dim"],
    gallery: Float[Array, "items modality dim"],
    *,
    gallery_where: Bool[Array, "items modality"] | None = None,
) -> Float[Array, "queries items"]:
    """Scores of every query with every item by any `score`; the worst score for items that it cannot use.

    Args:
      score: a score object.
      queries: `[Q, d]`.
      gallery: `[N, m, d]`.
      gallery_where: `[N, m]` bool, which modalities are present; default all.

    Returns:
      `[Q, N]`, at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit.

    >>> score_matrix(Residual(), jnp.array([[0.6, 0.8]]), jnp.array([[[1.0, 0.0]]])).shape
    (1, 1)
    """
    queries, gallery, where = check_inputs(score, ("tile",), queries, gallery, gallery_where)
    scores = score.tile(queries, score.prepare(gallery, where))
    return jnp.where(score.usable(where)[None, :], scores, -jnp.inf if score.higher_is_better else jnp.inf)


def _mean_of_present(vectors: Array, where: Array) -> Array:
    count = jnp.sum(where, axis=-1, keepdims=True).astype(vectors.dtype)
    return jnp.sum(jnp.where(where[..., None], vectors, 0.0), axis=-2) / jnp.maximum(count, 1.0)
