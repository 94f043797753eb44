"""The streamed reductions against whole score matrices, float64 NumPy and themselves in other tiles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import losses, scores
from gramjax.streaming import _engine, contrastive_nll, nll, sigmoid_nll
from tests import jaxprs, reference
from tests.streaming.batches import assert_close, cast, random_batch, value_and_gradients


@dataclasses.dataclass(frozen=True)
class _Distance:
    """A score that gramjax does not have: minus the distance to the farthest modality, which has no matrix product."""

    higher_is_better = True

    def usable(self, where):
        return jnp.any(where, axis=-1)

    def prepare(self, gallery, where):
        return {"items": gallery, "where": where}

    def tile(self, queries, prepared):
        squares = jnp.sum(jnp.square(queries[:, None, None] - prepared["items"][None]), axis=-1)
        return -jnp.max(jnp.where(prepared["where"][None], squares, 0.0), axis=-1)

    def pairs(self, queries, prepared):
        squares = jnp.sum(jnp.square(queries[:, None] - prepared["items"]), axis=-1)
        return -jnp.max(jnp.where(prepared["where"], squares, 0.0), axis=-1)


@pytest.mark.parametrize("score", [scores.Volume(), scores.Triangle()], ids=repr)
def test_tiles_equal_the_whole_matrix(score, x64):
    batch = random_batch()
    scale = 10.0 if score.higher_is_better else -10.0
    whole = value_and_gradients(batch, scale, score, None)
    assert_close(value_and_gradients(batch, scale, score, 5), whole, 1e-12)


@pytest.mark.parametrize("block_size", [1, 5, 8, 23, 24, 1000])
def test_values_do_not_depend_on_the_block_size(block_size):
    batch = cast(random_batch(m=1), jnp.float32)
    whole = value_and_gradients(batch, 10.0, scores.Cosine(), None)
    assert_close(value_and_gradients(batch, 10.0, scores.Cosine(), block_size), whole, 2e-6)


def test_detached_candidates_in_tiles(x64):
    batch = random_batch(m=1)
    whole = value_and_gradients(batch, 10.0, scores.Cosine(), None, detach=True)
    tiled = value_and_gradients(batch, 10.0, scores.Cosine(), 5, detach=True)
    assert_close(tiled, whole, 1e-12)
    exact = value_and_gradients(batch, 10.0, scores.Cosine(), 5)
    np.testing.assert_allclose(tiled[0], exact[0])
    np.testing.assert_allclose(tiled[3], exact[3])  # The gradient of the scale is the same.
    assert not np.allclose(tiled[1], exact[1])


@pytest.mark.parametrize(
    ("score", "detach"), [(scores.Volume(), False), (_Distance(), False), (scores.Cosine(), True)], ids=str
)
def test_more_items_than_are_prepared_and_matched_at_a_time(score, detach, x64, monkeypatch):
    batch = random_batch(m=1 if detach else 2)
    whole = value_and_gradients(batch, 10.0, score, None, detach=detach)
    for module in (_engine, nll):
        monkeypatch.setattr(module, "ITEMS", 7)
    again = jax.jit(functools.partial(value_and_gradients.__wrapped__, score=score, block_size=5, detach=detach))
    assert_close(again(batch, 10.0), whole, 1e-12)


def _softmax(logits, axis):
    exponentials = np.exp(logits - logits.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


@settings(max_examples=8, deadline=None)
@given(
    devices=st.sampled_from([1, 2, 4]), queries=st.integers(1, 3), extra=st.integers(0, 2), block_size=st.integers(1, 9)
)
def test_any_sizes(devices, queries, extra, block_size):
    """Value and gradients of InfoNCE in float64, by the formula for its whole matrix."""
    size, total, scale = devices * queries, devices * (queries + extra), 5.0
    batch = random_batch(queries=size, items=total, m=1)
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices]) if devices > 1 else None
    loss = functools.partial(contrastive_nll, scores.Cosine(), scale=scale, block_size=block_size, mesh=mesh)
    q, x = batch["queries"].astype(jnp.float32), batch["gallery"].astype(jnp.float32)
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(q, x)

    q, x = np.float64(q), np.float64(x[:, 0])
    rows, columns = (_softmax(scale * q @ x.T, axis) for axis in (1, 0))
    matched = np.arange(size)
    np.testing.assert_allclose(
        value, -0.5 * np.mean(np.log(rows[matched, matched]) + np.log(columns[matched, matched])), rtol=1e-5, atol=1e-6
    )
    pulled = (
        0.5 * scale / size * (rows - np.eye(size, total) + (columns - np.eye(size, total)) * (np.arange(total) < size))
    )
    np.testing.assert_allclose(gradients[0], pulled @ x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradients[1][:, 0], pulled.T @ q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_items_beyond_the_queries_are_negatives_only(block_size, symmetric, x64):
    batch = random_batch(queries=6, items=11, m=1)
    losses = contrastive_nll(
        scores.Cosine(), **batch, scale=3.0, label_smoothing=0.1, symmetric=symmetric, block_size=block_size,
        reduction=None,
    )  # fmt: skip
    batch = jax.tree.map(np.asarray, batch)
    queries, items, ids = batch["queries"], batch["gallery"][:, 0], batch["ids"]
    here, usable = batch["query_where"], batch["gallery_where"][:, 0]
    logits = 3.0 * queries @ items.T
    for i in range(6):
        forward = [logits[i, j] for j in range(11) if usable[j] and ids[j] != ids[i]]
        expected = reference.softmax_nll(logits[i, i], forward, 0.1)
        if symmetric:
            backward = [logits[j, i] for j in range(6) if here[j] and ids[j] != ids[i]]
            expected = 0.5 * (expected + reference.softmax_nll(logits[i, i], backward, 0.1))
        expected = expected * batch["weights"][i] if here[i] and usable[i] else 0.0
        np.testing.assert_allclose(losses[i], expected, rtol=1e-10)


@pytest.mark.parametrize("items", [0, 3])
@pytest.mark.parametrize("loss", [contrastive_nll, functools.partial(sigmoid_nll, bias=0.0)])
def test_no_queries_have_no_loss(loss, items):
    def total(queries, gallery):
        return loss(scores.Cosine(), queries, gallery, scale=2.0, block_size=4)

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(jnp.ones((0, 4)), jnp.ones((items, 2, 4)))
    assert value == 0
    np.testing.assert_array_equal(gradients[1], np.zeros((items, 2, 4)))


@pytest.mark.parametrize("block_size", [None, 3])
def test_a_small_loss_keeps_its_digits(block_size):
    """One positive far above the negatives: the loss is about 5e-10, far below the rounding of its logits' sum."""
    z = jnp.eye(8)
    losses = contrastive_nll(scores.Cosine(), z, z[:, None], scale=23.0, block_size=block_size, reduction=None)
    np.testing.assert_allclose(losses, np.log1p(7 * np.exp(-23.0)), rtol=1e-5)


@pytest.mark.parametrize("block_size", [None, 5])
def test_large_scales_do_not_overflow(block_size):
    batch = cast(random_batch(m=1), jnp.float32)
    results = value_and_gradients(batch, 1e5, scores.Cosine(), block_size)
    assert all(np.all(np.isfinite(x)) for x in results)
    assert np.max(results[0]) > 1e4


def test_sigmoid_in_tiles(x64):
    batch = random_batch(queries=18, m=1)

    @functools.partial(jax.jit, static_argnums=0)
    def both(block_size):
        def loss(queries, gallery, scale, bias):
            inputs = {**batch, "queries": queries, "gallery": gallery}
            return sigmoid_nll(scores.Cosine(), **inputs, scale=scale, bias=bias, block_size=block_size)

        return jax.value_and_grad(loss, (0, 1, 2, 3))(batch["queries"], batch["gallery"], 5.0, -2.0)

    assert_close(both(7), both(None), 1e-12)


@functools.partial(jax.jit, static_argnums=1)
def _gradient_of_volumes(z, block_size):
    def loss(z):
        return contrastive_nll(scores.Volume(), z[:, 0], z[:, 1:], scale=-10.0, block_size=block_size)

    return jax.value_and_grad(loss)(z)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_finite_at_degenerate_inputs(data):
    entries = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-3, 1e-7, -1e-4, 1e-12, 0.7071])
    z = data.draw(st.lists(entries, min_size=7 * 3 * 4, max_size=7 * 3 * 4))
    value, gradient = _gradient_of_volumes(jnp.reshape(jnp.asarray(z), (7, 3, 4)), 3)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_vmap_of_tiles():
    batch = cast(random_batch(m=1), jnp.float32)
    loss = functools.partial(contrastive_nll, scores.Cosine(), scale=5.0, block_size=5)
    pair = jnp.stack([batch["queries"], batch["queries"][::-1]])
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(pair, batch["gallery"])
    single = [jax.jit(jax.value_and_grad(loss))(queries, batch["gallery"]) for queries in pair]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *single), 1e-6)


def test_half_precision_is_accumulated_in_float32():
    batch = cast(random_batch(m=1), jnp.bfloat16)
    loss = functools.partial(contrastive_nll, scores.Cosine(), scale=5.0, block_size=5)
    value, gradient = jax.jit(jax.value_and_grad(loss))(batch["queries"], batch["gallery"])
    wide = cast(batch, jnp.float32)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, jax.jit(loss)(wide["queries"], wide["gallery"]), rtol=1e-6)


def test_a_score_from_outside_needs_nothing_but_the_protocol(x64):
    batch = random_batch()
    whole = value_and_gradients(batch, 2.0, _Distance(), None)
    assert_close(value_and_gradients(batch, 2.0, _Distance(), 5), whole, 1e-12)


def test_nothing_of_the_size_of_the_score_matrix_is_ever_held():
    batch, d, block = 301, 7, 32
    z = jnp.zeros((batch, 3, d))

    def loss(z):
        return contrastive_nll(scores.Volume(), z[:, 0], z[:, 1:], scale=-10.0, label_smoothing=0.1, block_size=block)

    shapes = jaxprs.shapes(jax.value_and_grad(loss), z)
    assert (block, block) in shapes
    assert max(np.prod(shape) for shape in shapes) <= z.size


@pytest.mark.parametrize(
    "loss", [losses.gram_loss, losses.pmrl_loss, losses.pairwise_infonce_loss], ids=lambda loss: loss.__name__
)
def test_large_batches_are_tiled_by_default_and_small_ones_whole(loss):
    def largest(batch):
        shapes = jaxprs.shapes(jax.value_and_grad(loss), jax.ShapeDtypeStruct((batch, 3, 4), jnp.float32))
        return max(np.prod(shape) for shape in shapes)

    assert largest(200) >= 200**2
    assert largest(16384) <= 16384**2 / 100


def test_what_the_gradient_keeps_grows_with_the_batch_and_not_its_square():
    def kept(batch):
        def loss(z):
            return contrastive_nll(scores.Volume(), z[:, 0], z[:, 1:], scale=-10.0, block_size=32)

        pull = jax.eval_shape(lambda z: jax.vjp(loss, z)[1], jax.ShapeDtypeStruct((batch, 3, 8), jnp.float32))
        return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(pull))

    assert kept(4000) <= 2.01 * kept(2000)


@pytest.mark.parametrize("loss", [contrastive_nll, functools.partial(sigmoid_nll, bias=0.0)])
def test_the_axis_may_be_left_out_for_a_mesh_that_has_one(loss):
    batch = random_batch()
    call = functools.partial(loss, scores.Volume(), scale=-10.0, **batch)
    over_devices = jax.jit(functools.partial(call, mesh=jax.make_mesh((4,), ("rows",))))
    np.testing.assert_allclose(over_devices(), jax.jit(call)(), rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "score", "kind"),
    [
        (contrastive_nll, scores.Volume(), AxisType.Auto),
        (functools.partial(contrastive_nll, detach_candidates=True), scores.Volume(), AxisType.Auto),
        (functools.partial(sigmoid_nll, bias=0.0), _Distance(), AxisType.Explicit),
    ],
    ids=["softmax", "detached", "sigmoid"],
)
def test_items_beyond_the_queries_are_shared_among_devices(loss, score, kind):
    """Query `i` keeps item `i`, although its part of the queries is not the same part of the items."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    batch = cast(random_batch(queries=8, items=20), jnp.float32)

    @functools.partial(jax.jit, static_argnames=("mesh", "axis_name"))
    def both(batch, **options):
        def each(queries, gallery):
            inputs = {**batch, "queries": queries, "gallery": gallery}
            losses = loss(score, **inputs, scale=-10.0, reduction=None, **options)
            return jnp.sum(losses), losses

        return jax.grad(each, (0, 1), has_aux=True)(batch["queries"], batch["gallery"])

    sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    assert_close(both(sharded, mesh=mesh, axis_name=("model", "data")), both(batch), 2e-6)


@pytest.mark.usefixtures("unchecked_signatures")
@pytest.mark.parametrize("loss", [contrastive_nll, functools.partial(sigmoid_nll, bias=0.0)])
def test_bad_input(loss):
    z, items = jnp.ones((4, 8)), jnp.ones((4, 2, 8))
    call = functools.partial(loss, scores.Cosine(), scale=1.0)
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"block_size must be at least 1, got {value}"):
            call(z, items, block_size=value)
    for value in (2.0, True):
        with pytest.raises(TypeError, match="block_size must be an integer of at least 1, or None, got"):
            call(z, items, block_size=value)
    with pytest.raises(ValueError, match=r"no query without an item; got shapes \(4, 8\) and \(3, 2, 8\)"):
        call(z, items[:3])
    with pytest.raises(TypeError, match=r"ids must be integers of shape \[batch\] = \(4,\), got dtype float32"):
        call(z, items, ids=jnp.ones(4))
    with pytest.raises(ValueError, match=r"axis_name must name a mesh axis of the jax.shard_map.*got 'data'"):
        call(z, items, axis_name="data")
    mesh = jax.make_mesh((3,), ("data",))
    with pytest.raises(ValueError, match=r"queries must have a first axis that divides over the 3 devices .*\(4, 8\)"):
        call(z, items, axis_name="data", mesh=mesh)
    with pytest.raises(ValueError, match=r"axis_name must name an axis of the mesh, one of .*'model'.*, got None"):
        call(z, items, mesh=jax.make_mesh((2, 2), ("data", "model")))
    with pytest.raises(ValueError, match=r"axis_name must name an axis of the mesh, one of \('data',\), got 'model'"):
        call(z, items, mesh=mesh, axis_name="model")
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got tuple"):
        call(z, items, mesh=(4,), axis_name="data")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(
        functools.partial(call, mesh=mesh), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec()
    )
    with pytest.raises(
        ValueError, match=r"mesh must be left out inside of jax.shard_map or pmap \(here over \('data',\)\)"
    ):
        inside(z, items)
