"""Hard negatives: their distribution, and that neither tiles nor devices change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import scores
from gramjax.streaming import rowwise, sample_hard_negatives
from tests import reference

directions = pytest.mark.parametrize("draw", ["items", "queries"])


def _inputs(batch=12, d=6, seed=0):
    rng = np.random.default_rng(seed)
    z = jnp.asarray(reference.unit(rng, batch, 3, d), jnp.float32)
    query_where, where = rng.random(batch) < 0.8, rng.random((batch, 2)) < 0.6
    query_where[:4], where[:2] = True, True
    where[2], where[3], query_where[4] = False, [True, False], False
    ids = rng.integers(0, batch - 3, size=batch)
    masks = {"query_where": jnp.asarray(query_where), "gallery_where": jnp.asarray(where), "ids": jnp.asarray(ids)}
    return z[:, 0], z[:, 1:], masks


def _probabilities(score, queries, gallery, masks, draw, temperature, share=None, floor=None):
    """Float64, dense; rows of 0 where there is no negative to draw."""
    where, present = np.asarray(masks["gallery_where"]), np.asarray(masks["query_where"])
    ids = np.asarray(masks["ids"])
    usable = where.any(1)
    matrix = np.asarray(scores.score_matrix(score, queries, gallery, gallery_where=masks["gallery_where"]), np.float64)
    candidates = usable
    if draw == "queries":
        matrix, candidates = matrix.T, present
    logits = (matrix if score.higher_is_better else -matrix) / temperature
    result = np.zeros(matrix.shape)
    for i in np.flatnonzero(usable & present):
        everything = np.where(candidates, np.exp(logits[i] - logits[i, candidates].max()), 0.0)
        allowed = candidates & (ids != ids[i])
        if not allowed.any():
            continue
        hard, even = np.where(allowed, everything, 0.0), allowed / allowed.sum()
        if floor is None:
            result[i] = (1 - share) * hard / hard.sum() + share * even
        else:
            weights = np.where(allowed, everything / everything.sum() + floor, 0.0)
            result[i] = weights / weights.sum()
    return result


@pytest.mark.parametrize(("score", "draw"), [(scores.Cosine(), "items"), (scores.Volume(), "queries")], ids=str)
@pytest.mark.parametrize("rule", [{"uniform_share": 0.0}, {"uniform_share": 0.3}, {"floor": 0.02}], ids=str)
def test_distribution_is_that_of_the_dense_matrix(score, draw, rule):
    """Chi-square over 4,000 keys for every row; the seeds are fixed, so it does not fail by chance."""
    queries, gallery, masks = _inputs()
    number, temperature = 4000, 0.3

    @jax.jit
    def draws(keys):
        return jax.vmap(
            lambda key: sample_hard_negatives(
                key, score, queries, gallery, draw=draw, temperature=temperature, block_size=5, **rule, **masks
            )
        )(keys)

    drawn = np.asarray(draws(jax.random.split(jax.random.key(1), number)))
    expected = _probabilities(
        score, queries, gallery, masks, draw, temperature, rule.get("uniform_share"), rule.get("floor")
    )
    some = expected.sum(1) > 0
    assert 6 <= some.sum() < 12
    assert np.all(drawn[:, ~some] == -1)
    statistic, freedom = 0.0, 0
    for i in np.flatnonzero(some):
        counts = np.bincount(drawn[:, i], minlength=12)
        assert counts.sum() == number
        assert not counts[expected[i] == 0].any()
        likely = number * expected[i] >= 5
        statistic += np.sum((counts - number * expected[i])[likely] ** 2 / (number * expected[i])[likely])
        freedom += likely.sum() - 1
    # Five standard deviations of a chi-square variable, both ways: too regular is wrong as well.
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_rows_are_drawn_independently():
    """All rows alike: the same random number in every row would draw the same item."""
    same = jnp.ones((64, 4)) / 2
    drawn = np.asarray(sample_hard_negatives(jax.random.key(0), scores.Cosine(), same, same[:, None]))
    assert len(set(drawn.tolist())) > 32
    again = np.asarray(sample_hard_negatives(jax.random.key(1), scores.Cosine(), same, same[:, None]))
    assert np.mean(drawn == again) < 0.2


@pytest.mark.parametrize(
    ("draw", "block_size", "shape", "kind", "impl"),
    [("items", 1, (2, 2), AxisType.Auto, "threefry2x32"), ("queries", 50, (4,), AxisType.Explicit, "rbg")],
)
def test_tiles_and_devices_do_not_change_the_negatives(draw, block_size, shape, kind, impl):
    queries, gallery, masks = _inputs(batch=192)
    options = {"draw": draw, "temperature": 0.2}
    key = jax.random.key(3, impl=impl)
    expected = np.asarray(sample_hard_negatives(key, scores.Volume(), queries, gallery, **options, **masks))
    assert np.sum(expected >= 0) > 100
    other = sample_hard_negatives(jax.random.fold_in(key, 1), scores.Volume(), queries, gallery, **options, **masks)
    assert np.any(other != expected)
    again = sample_hard_negatives(key, scores.Volume(), queries, gallery, block_size=block_size, **options, **masks)
    np.testing.assert_array_equal(again, expected)
    names = ("data", "model")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)])
    queries, gallery, masks = jax.device_put((queries, gallery, masks), NamedSharding(mesh, PartitionSpec("data")))
    again = sample_hard_negatives(
        key, scores.Volume(), queries, gallery, block_size=20, mesh=mesh, axis_name="data", **options, **masks
    )
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("option", ["uniform_share", "floor"])
def test_traced_shares_and_old_keys(option):
    queries, gallery, masks = _inputs(batch=24)
    sample = functools.partial(sample_hard_negatives, score=scores.Cosine(), queries=queries, gallery=gallery, **masks)
    traced = jax.jit(lambda key, share: sample(key, **{option: share}))(jax.random.PRNGKey(2), 0.3)
    np.testing.assert_array_equal(traced, sample(jax.random.key(2), **{option: 0.3}))


@directions
def test_many_blocks_of_rows(draw, monkeypatch):
    queries, gallery, masks = _inputs(batch=53)
    key, options = jax.random.key(1), {"draw": draw, "temperature": 0.2, **masks}
    expected = sample_hard_negatives(key, scores.Volume(), queries, gallery, **options)
    monkeypatch.setattr(rowwise, "_tile_shape", lambda rows, columns, block_size: (20, block_size))
    again = sample_hard_negatives(key, scores.Volume(), queries, gallery, block_size=33, **options)
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize("axis_name", [("data", "model"), ("model", "data")], ids=str)
def test_over_two_axes_of_a_mesh(axis_name):
    """In the order of the mesh, and in the other, in which the ring is not in the order of the shards."""
    queries, gallery, masks = _inputs(batch=24)
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])
    sample = functools.partial(sample_hard_negatives, jax.random.key(5), scores.Volume(), queries, gallery, **masks)
    np.testing.assert_array_equal(sample(mesh=mesh, axis_name=axis_name), sample())


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    queries, gallery, masks = _inputs(batch=24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    here, divided = PartitionSpec(), PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(here, divided, divided, divided), out_specs=divided, check_vma=check_vma
    )
    def sample(key, queries, gallery, masks):
        return sample_hard_negatives(key, scores.Volume(), queries, gallery, axis_name="data", **masks)

    key = jax.random.key(5)
    expected = sample_hard_negatives(key, scores.Volume(), queries, gallery, **masks)
    np.testing.assert_array_equal(sample(key, queries, gallery, masks), expected)


@directions
def test_no_negative_is_minus_one(draw):
    one = jnp.ones((1, 4))
    assert sample_hard_negatives(jax.random.key(0), scores.Cosine(), one, one[:, None], draw=draw)[0] == -1
    same = jnp.ones((3, 4))
    drawn = sample_hard_negatives(
        jax.random.key(0), scores.Cosine(), same, same[:, None], draw=draw, ids=jnp.array([7, 7, 7])
    )
    np.testing.assert_array_equal(drawn, [-1, -1, -1])


def test_sharp_softmax_draws_the_hardest_and_stays_finite():
    """At a temperature at which all exponentials but the largest vanish."""
    queries, gallery, _ = _inputs(batch=40)
    matrix = np.array(scores.score_matrix(scores.Volume(), queries, gallery))
    np.fill_diagonal(matrix, np.inf)
    drawn = sample_hard_negatives(
        jax.random.key(0), scores.Volume(), queries, gallery, temperature=1e-6, uniform_share=0.0
    )
    np.testing.assert_array_equal(drawn, np.argmin(matrix, axis=1))


@pytest.mark.usefixtures("unchecked_signatures")
def test_bad_input():
    queries, gallery, key = jnp.ones((4, 3)), jnp.ones((4, 2, 3)), jax.random.key(0)
    sample = functools.partial(sample_hard_negatives, key, scores.Volume())
    with pytest.raises(ValueError, match="matched pairs"):
        sample(queries[:3], gallery)
    with pytest.raises(ValueError, match=r"uniform_share must be in \[0, 1\], got 1.5"):
        sample(queries, gallery, uniform_share=1.5)
    with pytest.raises(ValueError, match=r"uniform_share must be a scalar, got shape \(4,\)"):
        sample(queries, gallery, uniform_share=jnp.ones(4))
    with pytest.raises(ValueError, match="floor must be at least 0, got -1"):
        sample(queries, gallery, floor=-1.0)
    with pytest.raises(ValueError, match="floor must be at least 0, got nan"):
        sample(queries, gallery, floor=jnp.nan)
    for keys, shape in ((jax.random.split(key, 3), r"\(3,\)"), (jnp.arange(5, dtype=jnp.uint32), r"\(5,\)")):
        with pytest.raises(ValueError, match=f"key must be one random key, got an array of dtype .* and shape {shape}"):
            sample_hard_negatives(keys, scores.Volume(), queries, gallery)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample(queries, gallery, temperature=0.0)
    with pytest.raises(ValueError, match=r"draw must be .*, got 'both'"):
        sample(queries, gallery, draw="both")
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        sample(queries, gallery, block_size=0)
    with pytest.raises(ValueError, match=r"axis_name must name a mesh axis of the jax\.shard_map .*, got 'data'"):
        sample(queries, gallery, axis_name="data")
    with pytest.raises(TypeError, match="ids must be integers"):
        sample(queries, gallery, ids=jnp.ones(4))
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    with pytest.raises(ValueError, match=r"queries must have a first axis that divides over the 3 devices"):
        sample(queries, gallery, mesh=mesh)
