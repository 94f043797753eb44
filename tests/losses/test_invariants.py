"""What every loss must hold to, each loss against its plain float64 version."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import losses
from tests import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss as `loss(z, where=, ...)` and its reference, which returns the loss of each example, NaN for none."""

    name: str
    loss: Callable
    reference: Callable
    modalities: int = 3
    smoothing: bool = True
    ids: bool = True

    def __str__(self):
        return self.name


def _towers(loss):
    """A two-tower loss in the form of the others: a pair counts if both ends are present."""

    def stacked(z, *, where=None, **options):
        where = None if where is None else jnp.all(where, axis=1)
        return loss(z[:, 0], z[:, 1], where=where, **options)

    return stacked


def _both(where):
    return np.repeat(where.all(1, keepdims=True), where.shape[1], axis=1)


def _all_pairs(z, where, ids, **options):
    return reference.infonce_pairs(z, where, ids, list(itertools.combinations(range(z.shape[1]), 2)), **options)


def _pmrl(z, where, ids):
    aligned = np.nan_to_num(reference.alignment(z, where, 0.5))
    apart = reference.regularization(z, where, ids)
    return np.where(np.isnan(apart), np.nan, aligned + 0.7 * np.nan_to_num(apart))


CASES = [
    Case("gram", losses.gram_loss, reference.gram),
    Case("gram_of_2", losses.gram_loss, reference.gram, modalities=2),
    Case("gram_of_5_anchor_3", functools.partial(losses.gram_loss, anchor=3, temperature=0.2),
         functools.partial(reference.gram, anchor=3, temperature=0.2), modalities=5),
    Case("triangle", losses.triangle_loss, reference.triangle),
    Case("triangle_anchor_-1", functools.partial(losses.triangle_loss, anchor=-1),
         functools.partial(reference.triangle, anchor=2)),
    Case("cone", losses.cone_loss, reference.cone),
    Case("cone_of_5_anchor_3", functools.partial(losses.cone_loss, anchor=3),
         functools.partial(reference.cone, anchor=3), modalities=5),
    Case("infonce", _towers(losses.infonce_loss),
         lambda z, where, ids, **o: reference.infonce_pairs(z, _both(where), ids, [(0, 1)], **o), modalities=2),
    Case("anchored_infonce", functools.partial(losses.anchored_infonce_loss, anchor=1),
         lambda z, where, ids, **o: reference.infonce_pairs(z, where, ids, [(1, 0), (1, 2)], **o)),
    Case("pairwise_infonce", losses.pairwise_infonce_loss, _all_pairs, modalities=4),
    Case("sigmoid", _towers(losses.sigmoid_loss), reference.sigmoid, modalities=2, smoothing=False),
    Case("symile", losses.symile_loss, reference.symile),
    Case("alignment", functools.partial(losses.alignment_loss, temperature=0.5),
         lambda z, where, ids: reference.alignment(z, where, 0.5), smoothing=False, ids=False),
    Case("direction_regularization", losses.direction_regularization, reference.regularization, smoothing=False),
    Case("pmrl", functools.partial(losses.pmrl_loss, alignment_temperature=0.5, regularization_weight=0.7),
         _pmrl, smoothing=False),
]  # fmt: skip
every_loss = pytest.mark.parametrize("case", CASES, ids=str)
VARIANTS = {"gram_of_2", "gram_of_5_anchor_3", "triangle_anchor_-1", "cone_of_5_anchor_3"}
# Where a loss is compiled several times, what is the same loss with another anchor or number is left to the slow tests.
every_loss_once = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case.name in VARIANTS else case for case in CASES], ids=str
)


@functools.cache
def _jitted(case):
    return jax.jit(jax.value_and_grad(lambda z, where: case.loss(z, where=where)))


@functools.cache
def _unreduced(case):
    return jax.jit(lambda z, where: case.loss(z, where=where, reduction=None))


def _batch(case, seed=0, batch=6, dim=8):
    return reference.unit(np.random.default_rng(seed), batch, case.modalities, dim)


def _mask(case, seed=1, batch=6):
    """A mask with complete, incomplete, single and empty examples."""
    where = np.random.default_rng(seed).random((batch, case.modalities)) < 0.75
    where[0] = True
    where[1] = False
    where[2] = False
    where[2, 0] = True
    return where


@every_loss
def test_value_of_each_example(case, x64):
    z = _batch(case)
    expected = case.reference(z, np.ones(z.shape[:2], bool), np.arange(6))
    np.testing.assert_allclose(_unreduced(case)(jnp.asarray(z), jnp.ones(z.shape[:2], bool)), expected, rtol=1e-10)


@every_loss
def test_masked_value_weights_ids_and_smoothing_together(case, x64):
    for seed in range(4):
        z, where = _batch(case, seed), _mask(case, seed)
        weights = np.random.default_rng(seed).random(6)
        ids = np.array([0, 1, 2, 0, 4, 0]) if case.ids else np.arange(6)
        losses_ = case.reference(z, where, ids, **({"smoothing": 0.2} if case.smoothing else {}))
        single, total, mean = _all_reductions(case)(z, where, weights, ids)
        expected = np.nan_to_num(weights * losses_)
        np.testing.assert_allclose(single, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-9)
        if case.name != "pmrl":  # Its mean is the sum of two means over different examples: tested on its own.
            np.testing.assert_allclose(mean, reference.reduce_mean(losses_, weights), rtol=1e-9)


@functools.cache
def _all_reductions(case):
    def compute(z, where, weights, ids):
        options = {"label_smoothing": 0.2} if case.smoothing else {}
        options |= {"ids": ids} if case.ids else {}
        loss = functools.partial(case.loss, z, where=where, weights=weights, **options)
        return loss(reduction=None), loss(reduction="sum"), loss()

    return jax.jit(compute)


@every_loss
def test_absent_values_do_not_matter_even_if_not_finite(case):
    z, where = _batch(case).astype(np.float32), _mask(case)
    poisoned = np.where(where[..., None], z, np.nan)
    value, gradient = _jitted(case)(jnp.asarray(z), jnp.asarray(where))
    poisoned_value, poisoned_gradient = _jitted(case)(jnp.asarray(poisoned), jnp.asarray(where))
    assert value == poisoned_value
    np.testing.assert_array_equal(gradient, poisoned_gradient)
    assert np.all(np.asarray(gradient)[~where] == 0)


@every_loss
def test_a_vector_that_is_not_a_number_shows(case):
    """A model that has diverged must not look perfect."""
    z = _batch(case)
    for row in (z[2], z[2, 1]):
        kept = row.copy()
        row[:] = np.nan
        value, _ = _jitted(case)(jnp.asarray(z, jnp.float32), jnp.ones(z.shape[:2], bool))
        assert np.isnan(value)
        row[:] = kept


@every_loss
def test_nothing_present_is_zero_with_zero_gradient(case):
    z = jnp.asarray(_batch(case), jnp.float32)
    nothing = jnp.zeros(z.shape[:2], bool)
    value, gradient = _jitted(case)(z, nothing)
    assert value == 0
    assert not np.any(gradient)
    assert not np.any(_unreduced(case)(z, nothing))


@every_loss
def test_zero_weights_are_zero_with_zero_gradient(case):
    z = jnp.asarray(_batch(case), jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(functools.partial(case.loss, weights=jnp.zeros(6))))(z)
    assert value == 0
    assert not np.any(gradient)


@every_loss
def test_permutes_with_the_batch(case):
    z, where = jnp.asarray(_batch(case), jnp.float32), jnp.asarray(_mask(case))
    order = jnp.array([3, 0, 5, 1, 4, 2])
    loss = _unreduced(case)
    np.testing.assert_allclose(loss(z[order], where[order]), loss(z, where)[order], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "symile"], ids=str)
def test_invariant_to_rotations(case):
    z = _batch(case)
    rotation, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(8, 8)))
    everything = jnp.ones(z.shape[:2], bool)
    value, _ = _jitted(case)(jnp.asarray(z, jnp.float32), everything)
    turned, _ = _jitted(case)(jnp.asarray(z @ rotation, jnp.float32), everything)
    np.testing.assert_allclose(turned, value, rtol=1e-4)


@every_loss
def test_gradient_against_finite_differences(case, x64):
    # At acute angles: for two vectors at an obtuse one the sign of the leading direction jumps.
    z = np.abs(_batch(case)) + 0.1 * _batch(case, 3)
    z, where = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True)), jnp.asarray(_mask(case))
    direction = jnp.asarray(np.random.default_rng(7).normal(size=z.shape))
    loss, step = _jitted(case), 1e-6
    numeric = (loss(z + step * direction, where)[0] - loss(z - step * direction, where)[0]) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(loss(z, where)[1], direction), numeric, rtol=1e-6, atol=1e-9)


def _degenerate(kind, shape):
    _, k, d = shape
    z = reference.unit(np.random.default_rng(0), *shape)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "duplicated items":
        return np.broadcast_to(z[:1], shape)
    if kind == "duplicated modalities":
        return np.broadcast_to(z[:, :1], shape)
    if kind == "all equal":
        return np.broadcast_to(z[:1, :1], shape)
    if kind == "opposite":
        return z[:, :1] * np.where(np.arange(k) % 2, -1.0, 1.0)[None, :, None]
    if kind == "orthogonal":
        return np.broadcast_to(np.eye(k, d)[None], shape)
    if kind == "nearly equal":
        return z[:, :1] + 1e-7 * z
    return np.concatenate([z[:, :1], z[:, :1], z[:, 2:]], axis=1)  # two of the modalities equal


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        "zero",
        "duplicated items",
        "duplicated modalities",
        "all equal",
        "opposite",
        "orthogonal",
        "nearly equal",
        "pair",
    ],
)
def test_finite_at_degenerate_inputs(case, dtype, kind):
    z = jnp.asarray(_degenerate(kind, (6, case.modalities, 8)), dtype)
    value, gradient = _jitted(case)(z, jnp.ones(z.shape[:2], bool))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))


_entries = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-3, 1e-7, -1e-4, 1e-12, 0.7071])


@every_loss
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_finite_wherever_hypothesis_looks(case, data):
    size = 6 * case.modalities * 8
    entries = data.draw(st.lists(_entries, min_size=size, max_size=size))
    where = data.draw(st.lists(st.booleans(), min_size=size // 8, max_size=size // 8))
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    z = jnp.asarray(np.reshape(entries, (6, case.modalities, 8)), dtype)
    value, gradient = _jitted(case)(z, jnp.asarray(np.reshape(where, (6, -1))))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))


@every_loss
def test_narrow_inputs_are_accumulated_in_float32(case):
    z = jnp.asarray(_batch(case), jnp.bfloat16)
    everything = jnp.ones(z.shape[:2], bool)
    value, gradient = _jitted(case)(z, everything)
    wide, wide_gradient = _jitted(case)(z.astype(jnp.float32), everything)
    np.testing.assert_allclose(value, wide, rtol=1e-6)
    np.testing.assert_array_equal(gradient, wide_gradient.astype(jnp.bfloat16))


@every_loss_once
def test_jit_and_vmap_agree_with_eager(case):
    z = jnp.asarray(_batch(case), jnp.float32)
    eager = case.loss(z)
    value, _ = _jitted(case)(z, jnp.ones(z.shape[:2], bool))
    np.testing.assert_allclose(value, eager, rtol=1e-5, atol=1e-6)
    mapped = jax.jit(jax.vmap(case.loss))(jnp.stack([z, z[::-1]]))
    np.testing.assert_allclose(mapped, [eager, eager], rtol=1e-5, atol=1e-6)


@every_loss_once
def test_sharded_over_devices_equals_one_device(case):
    """Under plain jit, a batch sharded over an Auto mesh gives the loss and the gradient of the whole batch."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z = jnp.asarray(_batch(case, batch=16), jnp.float32)
    where = jnp.asarray(_mask(case, batch=16))
    value, gradient = _jitted(case)(z, where)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sharded_value, sharded_gradient = _jitted(case)(jax.device_put(z, sharding), jax.device_put(where, sharding))
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-4, atol=1e-6)


@every_loss
def test_a_single_example(case):
    """Without negatives only the terms within the item remain."""
    z = jnp.asarray(_batch(case, batch=1), jnp.float32)
    alone = {"alignment", "pmrl", "sigmoid"}
    assert (jax.jit(case.loss)(z) == 0) == (case.name not in alone)
