import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramjax import _projections, losses, scores
from tests import jaxprs, reference


def _mean_cosine(query, item):
    return np.mean([query @ x for x in item])


PLAIN = {
    scores.cosine_scores: _mean_cosine,
    scores.volume_scores: lambda query, item: reference.volume([query, *item]),
    scores.residual_scores: lambda query, item: reference.volume([query, *item]) / reference.volume(item),
    scores.cone_scores: reference.cone_cosine,
    scores.leading_direction_scores: lambda query, item: query @ reference.leading_direction(item),
    scores.triangle_scores: lambda query, item: reference.triangle_area(query, *item),
    scores.multilinear_scores: lambda query, item: query @ np.prod(item, axis=0),
}
OBJECTS = [
    scores.Cosine(),
    scores.Volume(),
    scores.Residual(),
    scores.LeadingDirection(),
    scores.Triangle(),
    scores.Triangle(square_root=False),
    scores.Multilinear(),
    scores.Cone(),
]
every_function = pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
every_score = pytest.mark.parametrize("score", OBJECTS, ids=repr)


@every_function
@pytest.mark.parametrize("m", [1, 2, 4])
def test_against_loops(function, m, x64):
    if function is scores.triangle_scores and m != 2:
        m = 2
    rng = np.random.default_rng(m)
    queries, gallery = reference.unit(rng, 5, 9), reference.unit(rng, 7, m, 9)
    where = rng.random((7, m)) < 0.6
    where[0], where[1] = True, False
    result = np.asarray(function(jnp.asarray(queries), jnp.asarray(gallery), gallery_where=jnp.asarray(where)))
    worst = np.inf if function in (scores.volume_scores, scores.residual_scores, scores.triangle_scores) else -np.inf
    for i, j in np.ndindex(5, 7):
        needed = where[j].all() if function is scores.triangle_scores else where[j].any()
        expected = PLAIN[function](queries[i], gallery[j, where[j]]) if needed else worst
        np.testing.assert_allclose(result[i, j], expected, atol=1e-12)


@every_score
def test_pairs_are_the_diagonal(score, x64):
    z = jnp.asarray(reference.unit(np.random.default_rng(0), 6, 3, 8))
    prepared = score.prepare(z[:, 1:], jnp.ones((6, 2), bool))
    np.testing.assert_allclose(score.pairs(z[:, 0], prepared), jnp.diagonal(score.tile(z[:, 0], prepared)), rtol=1e-10)


@every_score
def test_prepared_arrays_have_items_leading(score):
    """So that a reduction may cut a gallery into tiles without knowing the score."""
    z = jnp.asarray(reference.unit(np.random.default_rng(0), 6, 3, 8), jnp.float32)
    prepared = score.prepare(z[:, 1:], jnp.ones((6, 2), bool))
    tile = score.tile(z[:4, 0], jax.tree.map(lambda x: x[2:5], prepared))
    np.testing.assert_allclose(tile, score.tile(z[:, 0], prepared)[:4, 2:5], rtol=1e-5, atol=1e-6)


@every_score
def test_is_a_hashable_value(score):
    assert isinstance(score, scores.Score)
    assert hash(score) == hash(type(score)(**{f: getattr(score, f) for f in score.__dataclass_fields__}))
    assert len(set(OBJECTS)) == len(OBJECTS)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_matched_volumes_are_accurate_when_modalities_nearly_coincide(distance):
    rng = np.random.default_rng(0)
    z = reference.unit(rng, 64, 1, 32) + distance * rng.normal(size=(64, 3, 32)) / np.sqrt(32)
    z = (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)
    truth = [reference.volume(vectors) for vectors in z]
    everything = jnp.ones((64, 2), bool)
    score = scores.Volume()
    matched = score.pairs(jnp.asarray(z[:, 0]), score.prepare(jnp.asarray(z[:, 1:]), everything))
    np.testing.assert_allclose(matched, truth, rtol=1e-4 * max(1, 1e-3 / distance))


def test_volume_favours_items_with_close_modalities_and_the_residual_does_not(x64):
    """The bias that the documentation warns of: the item's own volume multiplies all its scores."""
    query = jnp.array([[1.0, 0.0, 0.0]])
    angle = 0.02
    near = [[0.0, 1.0, 0.0], [0.0, np.cos(angle), np.sin(angle)]]  # close to each other, orthogonal to the query
    right = [[0.8, 0.6, 0.0], [0.8, 0.0, 0.6]]  # close to the query
    gallery = jnp.asarray([near, right])
    assert jnp.argmin(scores.volume_scores(query, gallery)) == 0
    assert jnp.argmin(scores.residual_scores(query, gallery)) == 1
    assert jnp.argmax(scores.cosine_scores(query, gallery)) == 1


def test_volume_is_blind_to_sign_and_cosines_are_not():
    z = jnp.asarray(reference.unit(np.random.default_rng(0), 4, 3, 8), jnp.float32)
    flipped = z.at[:, 2].multiply(-1.0)
    for function in (scores.volume_scores, scores.residual_scores):
        np.testing.assert_allclose(function(z[:, 0], flipped[:, 1:]), function(z[:, 0], z[:, 1:]), rtol=1e-5)
    assert not np.allclose(scores.cosine_scores(z[:, 0], flipped[:, 1:]), scores.cosine_scores(z[:, 0], z[:, 1:]))


def _bfloat16_products(queries, items, precision):
    """What a TPU does at default precision: factors rounded to bfloat16, products summed in float32."""
    del precision
    queries, items = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (queries, items))
    return queries @ items.T


def test_low_precision_products_ruin_volumes_of_aligned_modalities(monkeypatch):
    """Why the default precision is HIGHEST; with it the error is rounding. At cosine .9995."""
    rng = np.random.default_rng(0)
    base = reference.unit(rng, 128, 1, 64)
    noise = rng.normal(size=(128, 3, 64)) / 8
    z = base + np.sqrt(1 / 0.9995 - 1) * noise
    z = (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)
    truth = np.array([reference.volume(vectors) for vectors in z])

    def error():
        volumes = np.diagonal(scores.volume_scores(jnp.asarray(z[:, 0]), jnp.asarray(z[:, 1:])))
        return np.median(np.abs(volumes / truth - 1))

    exact = error()
    monkeypatch.setattr(_projections, "products", _bfloat16_products)
    assert exact < 1e-3
    assert error() > 0.05


def test_precision_reaches_the_matrix_product():
    z = jnp.ones((4, 3, 8))
    for loss in (losses.gram_loss, losses.triangle_loss, losses.pairwise_infonce_loss, losses.direction_regularization):
        default = str(jax.make_jaxpr(loss)(z))
        lower = str(jax.make_jaxpr(functools.partial(loss, precision=jax.lax.Precision.DEFAULT))(z))
        assert lower.count("Precision.HIGHEST") < default.count("Precision.HIGHEST")


@every_function
def test_bad_input(function, unchecked_signatures):
    queries, gallery = jnp.ones((3, 8)), jnp.ones((5, 2, 8))
    with pytest.raises(ValueError, match=r"queries must have shape \[queries, dim\], got shape \(3, 1, 8\)"):
        function(queries[:, None], gallery)
    with pytest.raises(ValueError, match=r"gallery must have shape \[items, modality, dim\], got shape \(5, 8\)"):
        function(queries, gallery[:, 0])
    with pytest.raises(
        ValueError, match=r"queries and gallery must have the same last axis .*\(3, 8\) and \(5, 2, 7\)"
    ):
        function(queries, gallery[..., :7])
    with pytest.raises(TypeError, match="gallery must have a floating-point dtype, got int32"):
        function(queries, gallery.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"gallery_where must have shape .* = \(5, 2\), got shape \(5,\)"):
        function(queries, gallery, gallery_where=jnp.ones(5, bool))


def test_triangle_needs_two_modalities(unchecked_signatures):
    with pytest.raises(ValueError, match=r"gallery must hold items of exactly 2 modalities.*, got 3"):
        scores.triangle_scores(jnp.ones((3, 8)), jnp.ones((5, 3, 8)))


@pytest.mark.parametrize("k", [3, 5])
def test_gram_loss_holds_no_array_of_gram_matrices(k):
    """No `B x B x k x k` array, forward or backward: nothing larger than the score matrix and the embeddings."""
    batch, d = 37, 11
    z = jnp.zeros((batch, k, d))
    shapes = jaxprs.shapes(jax.value_and_grad(losses.gram_loss), z)
    assert (batch, batch) in shapes
    assert not [shape for shape in shapes if shape.count(batch) >= 2 and np.prod(shape) > batch * batch]
