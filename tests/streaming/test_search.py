"""Streamed search and ranks against float64 loops, brute force and the dense score matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import metrics, scores
from gramjax.streaming import streamed_ranks, streamed_top_k
from tests import jaxprs, reference

# A reduction knows scores by their protocol alone: one of each kind will do.
kinds_of_score = pytest.mark.parametrize(
    "score", [scores.Cosine(), scores.Volume(), scores.Triangle()], ids=lambda s: type(s).__name__
)
tilings = pytest.mark.parametrize("block_size", [None, 1, 7, 100])


def _inputs(items=23, queries=6, m=2, d=8, seed=0):
    rng = np.random.default_rng(seed)
    where = rng.random((items, m)) < 0.6
    where[0], where[1] = True, False
    gallery = np.where(where[..., None], reference.unit(rng, items, m, d), np.nan)
    arrays = jnp.asarray(reference.unit(rng, queries, d)), jnp.asarray(gallery)
    return *(x.astype(jnp.float32) for x in arrays), jnp.asarray(where)


def _brute(score, queries, gallery, where, k):
    """Stable sort of the dense matrix."""
    matrix = np.asarray(scores.score_matrix(score, queries, gallery, gallery_where=where))
    goodness = matrix if score.higher_is_better else -matrix
    order = np.argsort(-goodness, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(matrix, order, axis=1)
    return best, np.where(np.isfinite(best), order, -1)


@kinds_of_score
def test_top_k_equals_sorting_the_dense_matrix_whatever_the_tiles(score):
    queries, gallery, where = _inputs()
    for k in (1, 5, 23):
        expected, order = _brute(score, queries, gallery, where, k)
        for block_size in (None, 1, 7) if k == 5 else (7,):
            best, indices = streamed_top_k(score, queries, gallery, k, gallery_where=where, block_size=block_size)
            np.testing.assert_array_equal(indices, order)
            np.testing.assert_allclose(best, expected, atol=1e-5)
    assert np.any(order == -1)  # Fewer items than k: the rest is nothing, with the worst score.


def test_many_blocks_of_queries(monkeypatch):
    from gramjax.streaming import rowwise

    monkeypatch.setattr(rowwise, "_tile_shape", lambda rows, columns, block_size: (4, 5))
    queries, gallery, where = _inputs(queries=11, items=24)
    expected, order = _brute(scores.Volume(), queries, gallery, where, 7)
    best, indices = streamed_top_k(scores.Volume(), queries, gallery, 7, gallery_where=where)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(best, expected, atol=1e-5)
    present = jnp.arange(11) != 3
    ranks = streamed_ranks(scores.Volume(), queries, gallery, gallery_where=where, query_where=present)
    matrix = scores.score_matrix(scores.Volume(), queries, gallery, gallery_where=where)
    expected = metrics.retrieval_ranks(matrix, higher_is_better=False).at[3].set(24)
    np.testing.assert_array_equal(ranks, expected)


@tilings
@pytest.mark.parametrize("score", [scores.Cosine(), scores.Volume()], ids=["higher", "lower"])
def test_ties_fall_to_the_lowest_index(score, block_size):
    """Entries of which every product is exact, many items equal, 0 and -0 among the scores."""
    rng = np.random.default_rng(0)
    gallery = jnp.asarray(np.eye(4)[rng.integers(0, 3, size=(23, 1))] * rng.choice([1.0, -1.0], size=(23, 1, 1)))
    queries = jnp.asarray(np.concatenate([np.eye(4), -np.eye(4)]))
    gallery, queries = gallery.astype(jnp.float32), queries.astype(jnp.float32)
    expected, order = _brute(score, queries, gallery, None, 9)
    best, indices = streamed_top_k(score, queries, gallery, 9, block_size=block_size)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(best, expected)


def test_scores_that_are_nan_are_never_found():
    gallery = jnp.asarray([[[np.nan, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]], jnp.float32)
    best, indices = streamed_top_k(scores.Cosine(), jnp.eye(2), gallery, 3)
    np.testing.assert_array_equal(indices, [[2, 1, -1], [1, 2, -1]])
    np.testing.assert_array_equal(best, [[1, 0, -np.inf], [1, 0, -np.inf]])


def test_absent_queries_find_nothing():
    queries, gallery, where = _inputs()
    present = jnp.asarray([True, False, True, True, False, True])
    poisoned = jnp.where(present[:, None], queries, jnp.nan)
    best, indices = streamed_top_k(scores.Volume(), poisoned, gallery, 4, gallery_where=where, query_where=present)
    expected, order = _brute(scores.Volume(), queries, gallery, where, 4)
    np.testing.assert_array_equal(indices, np.where(present[:, None], order, -1))
    np.testing.assert_allclose(best, np.where(present[:, None], expected, np.inf), atol=1e-5)


@kinds_of_score
def test_ranks_equal_those_of_the_dense_matrix(score):
    """Several right items for a query and several queries for an item; ids that nobody has."""
    queries, gallery, where = _inputs(queries=9)
    rng = np.random.default_rng(1)
    matrix = scores.score_matrix(score, queries, gallery, gallery_where=where)
    ids = {
        "query_ids": jnp.asarray(rng.integers(0, 6, size=9)).at[4].set(77),
        "gallery_ids": jnp.asarray(rng.integers(0, 6, size=23)),
    }
    for chosen in ({}, ids):
        expected = metrics.retrieval_ranks(matrix, higher_is_better=score.higher_is_better, **chosen)
        for block_size in (None, 7):
            ranks = streamed_ranks(score, queries, gallery, gallery_where=where, block_size=block_size, **chosen)
            np.testing.assert_array_equal(ranks, expected)
    assert expected[4] == 23


def test_ranks_count_ties_against_the_query():
    gallery = jnp.ones((5, 1, 2))
    for block_size in (1, 2, 5):
        ranks = streamed_ranks(scores.Cosine(), jnp.ones((3, 2)), gallery, block_size=block_size)
        np.testing.assert_array_equal(ranks, [4, 4, 4])


# Queries of several modalities


def _set_score(score, query, item):
    if isinstance(score, scores.Volume):
        return reference.volume([*query, *item])
    if isinstance(score, scores.Residual):
        return reference.volume([*query, *item]) / reference.volume(item)
    if isinstance(score, scores.Cone):
        return np.mean([reference.cone_cosine(part, item) for part in query])
    if isinstance(score, scores.Multilinear):
        return np.sum(np.prod([*query, *item], axis=0))
    direction = reference.leading_direction(item) if isinstance(score, scores.LeadingDirection) else np.mean(item, 0)
    return np.mean(query, axis=0) @ direction


@pytest.mark.parametrize(
    ("score", "p"),
    [
        (scores.Cosine(), 2),
        (scores.LeadingDirection(), 2),
        (scores.Multilinear(), 2),
        (scores.Cone(), 2),
        (scores.Residual(), 2),
        (scores.Volume(), 1),
        (scores.Volume(), 2),
        (scores.Volume(), 3),
    ],
    ids=lambda x: x if isinstance(x, int) else type(x).__name__,
)
def test_queries_of_several_modalities(score, p, x64):
    rng = np.random.default_rng(p)
    queries, gallery = reference.unit(rng, 5, p, 9), reference.unit(rng, 7, 2, 9)
    query_where, where = rng.random((5, p)) < 0.6, rng.random((7, 2)) < 0.6
    query_where[0], query_where[1], where[0] = True, False, True
    poisoned = jnp.asarray(np.where(query_where[..., None], queries, np.nan))
    best, indices = streamed_top_k(
        score, poisoned, jnp.asarray(gallery), 7, query_where=jnp.asarray(query_where),
        gallery_where=jnp.asarray(where), block_size=3,
    )  # fmt: skip
    sign = 1 if score.higher_is_better else -1
    for i in range(5):
        found = {
            j: _set_score(score, queries[i, query_where[i]], gallery[j, where[j]])
            for j in range(7)
            if where[j].any() and query_where[i].any()
        }
        order = sorted(found, key=lambda j: -sign * found[j])
        np.testing.assert_array_equal(indices[i], order + [-1] * (7 - len(order)))
        np.testing.assert_allclose(best[i, : len(order)], [found[j] for j in order], atol=1e-12)


def test_dependent_modalities_of_a_query_span_no_volume():
    query = jnp.asarray([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    best, _ = streamed_top_k(scores.Volume(), query, jnp.asarray([[[0.0, 1.0, 0.0]]]), 1)
    assert best[0, 0] == 0


# Devices


def _mesh(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(("shape", "names"), [((4,), ("data",)), ((2, 2), ("model", "data"))], ids=str)
def test_divided_over_a_mesh(shape, names, kind):
    """24 items divide evenly and come sharded; 23 do not."""
    mesh = _mesh(shape, names, kind)
    queries, gallery, where = _inputs(items=24)
    ids = {"query_ids": jnp.arange(6) % 4, "gallery_ids": jnp.arange(24) % 5}
    for count in (24, 23):
        items = gallery[:count], where[:count], ids["gallery_ids"][:count]
        best, order = streamed_top_k(scores.Volume(), queries, items[0], 20, gallery_where=items[1])
        ranks = streamed_ranks(
            scores.Volume(), queries, items[0], gallery_where=items[1], query_ids=ids["query_ids"], gallery_ids=items[2]
        )
        if count == 24:
            items = jax.device_put(items, NamedSharding(mesh, PartitionSpec("data")))
        where_ = {"gallery_where": items[1], "mesh": mesh, "axis_name": "data", "block_size": 4}
        again, order_again = streamed_top_k(scores.Volume(), queries, items[0], 20, **where_)
        np.testing.assert_array_equal(order_again, order)
        np.testing.assert_allclose(again, best, atol=1e-6)
        ranks_again = streamed_ranks(
            scores.Volume(), queries, items[0], query_ids=ids["query_ids"], gallery_ids=items[2], **where_
        )
        np.testing.assert_array_equal(ranks_again, ranks)


@pytest.mark.parametrize("axis_name", [("data", "model"), ("model", "data")], ids=str)
def test_divided_over_two_axes_of_a_mesh(axis_name):
    mesh = _mesh((2, 3), ("data", "model"), AxisType.Auto)
    queries, gallery, where = _inputs(items=23)
    options = {"gallery_where": where, "mesh": mesh, "axis_name": axis_name}
    _, order = streamed_top_k(scores.Volume(), queries, gallery, 9, **options)
    np.testing.assert_array_equal(order, _brute(scores.Volume(), queries, gallery, where, 9)[1])
    ranks = streamed_ranks(scores.Volume(), queries, gallery, **options)
    np.testing.assert_array_equal(ranks, streamed_ranks(scores.Volume(), queries, gallery, gallery_where=where))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = _mesh((4,), ("data",), AxisType.Auto)
    queries, gallery, where = _inputs(items=24, queries=10)
    here, divided = PartitionSpec(), PartitionSpec("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(here, divided, divided), out_specs=here, check_vma=check_vma)
    def search(queries, gallery, where):
        options = {"gallery_where": where, "axis_name": "data", "block_size": 4}
        found = streamed_top_k(scores.Cosine(), queries, gallery, 9, **options)
        return *found, streamed_ranks(scores.Cosine(), queries, gallery, **options)

    best, order, ranks = search(queries, gallery, where)
    expected = _brute(scores.Cosine(), queries, gallery, where, 9)
    np.testing.assert_array_equal(order, expected[1])
    np.testing.assert_allclose(best, expected[0], atol=1e-6)
    np.testing.assert_array_equal(ranks, streamed_ranks(scores.Cosine(), queries, gallery, gallery_where=where))


@pytest.mark.parametrize(("block_size", "most"), [(64, 1_000_000), (None, 20_000_000)])
def test_never_holds_the_matrix_of_scores(block_size, most):
    queries, gallery = jnp.zeros((20_000, 4)), jnp.zeros((20_000, 2, 4))
    for function in (functools.partial(streamed_top_k, k=3), streamed_ranks):
        shapes = jaxprs.shapes(
            lambda q, g, f=function: f(scores.Volume(), q, g, block_size=block_size), queries, gallery
        )
        assert 10_000 < max(map(np.prod, shapes)) < most


def test_narrow_input_is_computed_in_float32():
    queries, gallery, where = _inputs()
    narrow = queries.astype(jnp.bfloat16), gallery.astype(jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in narrow)
    for inputs in (narrow, (narrow[0], wide[1]), (wide[0], narrow[1])):
        best, indices = streamed_top_k(scores.Volume(), *inputs, 5, gallery_where=where)
        assert best.dtype == jnp.float32
        expected, order = _brute(scores.Volume(), *wide, where, 5)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(best, expected, atol=1e-6)


@pytest.mark.usefixtures("unchecked_signatures")
def test_bad_input():
    queries, gallery = jnp.ones((3, 4)), jnp.ones((5, 2, 4))
    top_k = functools.partial(streamed_top_k, scores.Volume())
    with pytest.raises(ValueError, match=r"k must be from 1 to the number of items in the gallery, 5; got 0"):
        top_k(queries, gallery, 0)
    with pytest.raises(ValueError, match=r"k must be from 1 to the number of items in the gallery, 5; got 6"):
        top_k(queries, gallery, 6)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        top_k(queries, gallery, 2.0)
    mesh = _mesh((2,), ("data",), AxisType.Auto)
    for function in (
        functools.partial(streamed_top_k, scores.Volume(), k=1),
        functools.partial(streamed_ranks, scores.Volume()),
    ):
        with pytest.raises(ValueError, match="gallery must hold at least one item, got none"):
            function(queries, gallery[:0])
        with pytest.raises(TypeError, match="gallery must be an array, got NoneType"):
            function(queries, None)
        with pytest.raises(TypeError, match=r"queries must be one array, got a mapping of \['text'\]"):
            function({"text": queries}, gallery)
        with pytest.raises(ValueError, match=r"queries must have at least one modality .*, got shape \(3, 0, 4\)"):
            function(queries[:, None][:, :0], gallery)
        with pytest.raises(TypeError, match=r"axis_name must be the name of a mesh axis .*, got \['data'\]"):
            function(queries, gallery, mesh=mesh, axis_name=["data"])
        with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
            function(queries, gallery, block_size=0)
        with pytest.raises(TypeError, match="block_size must be an integer of at least 1, or None, got float"):
            function(queries, gallery, block_size=2.0)
        with pytest.raises(
            ValueError, match=r"gallery_where must have shape \[items, modality\] = \(5, 2\), got .*\(5,\)"
        ):
            function(queries, gallery, gallery_where=jnp.ones(5, bool))
        with pytest.raises(ValueError, match=r"query_where must have shape \[queries\] = \(3,\), got shape \(4,\)"):
            function(queries, gallery, query_where=jnp.ones(4, bool))
        with pytest.raises(ValueError, match="the same last axis"):
            function(queries[:, :3], gallery)
        with pytest.raises(TypeError, match="gallery must have a floating-point dtype, got int32"):
            function(queries, gallery.astype(jnp.int32))
        with pytest.raises(TypeError, match="queries must have a floating-point dtype, got int32"):
            function(queries.astype(jnp.int32), gallery)
        with pytest.raises(ValueError, match=r"queries must have shape \[queries, dim\], got shape \(4,\)"):
            function(queries[0], gallery)
        with pytest.raises(ValueError, match=r"axis_name must name a mesh axis of the jax\.shard_map .*, got 'data'"):
            function(queries, gallery, axis_name="data")
        with pytest.raises(ValueError, match=r"axis_name must name an axis of the mesh, .*, got 'model'"):
            function(queries, gallery, mesh=mesh, axis_name="model")
    with pytest.raises(TypeError, match=r"Triangle takes queries of one modality, .* shape \(3, 1, 4\)"):
        streamed_top_k(scores.Triangle(), queries[:, None], gallery, 1)
    with pytest.raises(ValueError, match=r"gallery_ids must have shape \[items\] = \(5,\), got shape \(3,\)"):
        streamed_ranks(scores.Volume(), queries, gallery, gallery_ids=jnp.arange(3))
    with pytest.raises(TypeError, match=r"query_ids must be integers .*got dtype float32"):
        streamed_ranks(scores.Volume(), queries, gallery, query_ids=jnp.ones(3))
