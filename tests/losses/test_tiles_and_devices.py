"""No loss or gradient depends on how the score matrix is cut into tiles or the batch into devices."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gramjax import losses
from gramjax.streaming import _engine, nll
from tests import reference

EVERY_LOSS = {
    "gram": losses.gram_loss,
    "cone": losses.cone_loss,
    "triangle": losses.triangle_loss,
    "infonce": losses.infonce_loss,
    "anchored_infonce": losses.anchored_infonce_loss,
    "pairwise_infonce": losses.pairwise_infonce_loss,
    "sigmoid": losses.sigmoid_loss,
    "alignment": losses.alignment_loss,
    "direction_regularization": losses.direction_regularization,
    "pmrl": losses.pmrl_loss,
}
every_loss = pytest.mark.parametrize("name", EVERY_LOSS)
DEVICES = 4


def _batch(batch=24, dtype=np.float32):
    rng = np.random.default_rng(0)
    arrays = {
        "z": reference.unit(rng, batch, 3, 8).astype(dtype),
        "where": rng.random((batch, 3)) < 0.8,
        "weights": rng.random(batch).astype(dtype),
        "ids": rng.integers(0, 2 * batch, batch),
    }
    return jax.tree.map(jnp.asarray, arrays)


def _loss(name, batch, temperature, **options):
    """A loss as a function of a batch and a temperature, with every option that it has."""
    loss = EVERY_LOSS[name]
    known = inspect.signature(loss).parameters
    named = [option for option in known if option.endswith("temperature")]
    scalars = dict.fromkeys(named, temperature)
    possible = {"ids": batch["ids"], "label_smoothing": 0.1, **options}
    given = {key: value for key, value in possible.items() if key in known}
    z, where = batch["z"], batch["where"]
    vectors, where = ((z[:, 0], z[:, 1]), jnp.all(where[:, :2], axis=1)) if "a" in known else ((z,), where)
    return loss(*vectors, where=where, weights=batch["weights"], **scalars, **given)


def _step(name, **options):
    """Value, gradient for the embeddings, gradient for the temperature."""

    def step(batch, temperature):
        def loss(z, temperature):
            return _loss(name, {**batch, "z": z}, temperature, **options)

        value, (z, scale) = jax.value_and_grad(loss, (0, 1))(batch["z"], temperature)
        return value, z, scale

    return step


def _one_device(name, block_size=None):
    return jax.jit(_step(name, block_size=block_size))


def _mesh(kind=AxisType.Auto, model=1):
    shape = (DEVICES, model) if model > 1 else (DEVICES,)
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(kind,) * len(shape))


def _outside(name, model=1):
    """`jax.grad` of a mapped loss."""

    def step(batch, temperature):
        mapped = jax.shard_map(
            functools.partial(_loss, name, axis_name="data", block_size=5),
            mesh=_mesh(model=model), in_specs=(P("data"), P()), out_specs=P(),
        )  # fmt: skip

        def loss(z, temperature):
            return mapped({**batch, "z": z}, temperature)

        value, (z, scale) = jax.value_and_grad(loss, (0, 1))(batch["z"], temperature)
        return value, z, scale

    return jax.jit(step)


def _inside(name, check_vma, model=1):
    """`jax.grad` in the mapped function; untracked, the temperature's gradient is summed over devices by hand."""

    def step(batch, temperature):
        value, z, scale = _step(name, axis_name="data", block_size=5)(batch, temperature)
        return value, z, scale if check_vma else jax.lax.psum(scale, "data")

    out_specs = (P(), P("data"), P())
    return jax.jit(
        jax.shard_map(
            step, mesh=_mesh(model=model), in_specs=(P("data"), P()), out_specs=out_specs, check_vma=check_vma
        )
    )


def _pmap(name):
    def step(batch, temperature):
        value, z, scale = _step(name, axis_name="data", block_size=5)(batch, temperature)
        return value, z, jax.lax.psum(scale, "data")

    def whole(batch, temperature):
        batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        value, z, scale = jax.pmap(step, axis_name="data", in_axes=(0, None))(batch, temperature)
        assert np.all(value == value[0])
        return value[0], z.reshape(-1, *z.shape[2:]), scale[0]

    return whole


def _global(name, kind, model=1, axis_name="data"):
    """Global arrays under plain `jit`."""
    mesh = _mesh(kind, model)
    step = jax.jit(_step(name, axis_name=axis_name, mesh=mesh, block_size=5))

    def whole(batch, temperature):
        value, z, scale = step(jax.device_put(batch, NamedSharding(mesh, P("data"))), temperature)
        assert z.sharding.is_equivalent_to(NamedSharding(mesh, P(axis_name)), 3)
        return value, z, scale

    return whole


FORMS = {
    "tiles": functools.partial(_one_device, block_size=5),
    "outside": _outside,
    "outside, two axes": functools.partial(_outside, model=2),
    "inside": functools.partial(_inside, check_vma=True),
    "inside, two axes": functools.partial(_inside, check_vma=True, model=2),
    "inside, untracked": functools.partial(_inside, check_vma=False),
    "inside, untracked, two axes": functools.partial(_inside, check_vma=False, model=2),
    "pmap": _pmap,
    "global": functools.partial(_global, kind=AxisType.Auto),
    "global, explicit": functools.partial(_global, kind=AxisType.Explicit),
    "global, two axes": functools.partial(_global, kind=AxisType.Auto, model=2),
    "global, explicit, two axes": functools.partial(_global, kind=AxisType.Explicit, model=2),
    "global, over both axes": functools.partial(_global, kind=AxisType.Auto, model=2, axis_name=("data", "model")),
}


@functools.cache
def _expected(name):
    return _one_device(name)(_batch(), jnp.float32(0.2))


def _check(name, form):
    result = FORMS[form](name)(_batch(), jnp.float32(0.2))
    for x, y in zip(result, _expected(name), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())


@pytest.mark.parametrize("form", FORMS)
def test_infonce_in_every_form(form):
    _check("infonce", form)


@every_loss
def test_every_loss_on_devices(name):
    _check(name, "global")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    # The alignment loss has no score matrix to tile.
    [pair for pair in itertools.product(EVERY_LOSS, FORMS) if pair != ("alignment", "tiles")],
)
def test_every_loss_in_every_form(name, form):
    _check(name, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY_LOSS if name != "alignment"])
def test_every_loss_in_tiles_in_double_precision(name, x64):
    batch = _batch(dtype=np.float64)
    whole = _one_device(name)(batch, 0.2)
    for x, y in zip(_one_device(name, 5)(batch, 0.2), whole, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max())


@pytest.mark.parametrize(
    ("name", "block_size"),
    [(name, None) for name in EVERY_LOSS]
    + [pytest.param(name, 5, marks=pytest.mark.slow) for name in EVERY_LOSS if name != "alignment"],
)
def test_second_derivatives(name, block_size, x64, monkeypatch):
    """Of embeddings with embeddings and with the temperature, against differences of gradients."""
    if block_size:  # and items a few at a time
        monkeypatch.setattr(nll, "ITEMS", 7)
        monkeypatch.setattr(_engine, "ITEMS", 7)
    batch = _batch(dtype=np.float64)
    # In one orthant no leading direction is orthogonal to the sum, where its sign changes.
    z, turn = jnp.abs(batch["z"]), jnp.asarray(np.random.default_rng(1).normal(size=batch["z"].shape))

    def gradient(z, temperature, block_size=None):
        return jax.grad(lambda z: _loss(name, {**batch, "z": z}, temperature, block_size=block_size))(z)

    def along(z, temperature):
        return jnp.vdot(turn, gradient(z, temperature, block_size))

    step, central = 1e-5, jax.jit(gradient)
    of_z, of_temperature = jax.jit(jax.grad(along, (0, 1)))(z, 0.2)
    expected = (central(z + step * turn, 0.2) - central(z - step * turn, 0.2)) / (2 * step)
    np.testing.assert_allclose(of_z, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    expected = jnp.vdot(turn, central(z, 0.2 + step) - central(z, 0.2 - step)) / (2 * step)
    np.testing.assert_allclose(of_temperature, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cone", "pairwise_infonce", "sigmoid", "pmrl"])
@pytest.mark.parametrize("form", ["global", "inside", "inside, untracked"])
def test_second_derivatives_across_devices(name, form, x64):
    """Those of one device, which `test_second_derivatives` compares with differences."""
    batch = _batch(dtype=np.float64)
    batch["z"], turn = jnp.abs(batch["z"]), jnp.asarray(np.random.default_rng(1).normal(size=batch["z"].shape))
    tracked = form != "inside, untracked"

    def second(batch, turn, temperature, axis_name=None, **options):
        def along(z, temperature):
            def loss(z):
                return _loss(name, {**batch, "z": z}, temperature, axis_name=axis_name, **options)

            here = jnp.vdot(turn, jax.grad(loss)(z))
            return jax.lax.psum(here, axis_name) if form == "inside" and axis_name else here

        of_z, of_temperature = jax.grad(along, (0, 1))(batch["z"], temperature)
        return of_z, of_temperature if tracked or not axis_name else jax.lax.psum(of_temperature, axis_name)

    expected = jax.jit(second)(batch, turn, 0.2)
    if form == "global":
        across = functools.partial(second, axis_name="data", mesh=_mesh(), block_size=5)
    else:
        across = jax.shard_map(
            functools.partial(second, axis_name="data", block_size=5), mesh=_mesh(), check_vma=tracked,
            in_specs=(P("data"), P("data"), P()), out_specs=(P("data"), P()),
        )  # fmt: skip
    for x, y in zip(jax.jit(across)(batch, turn, 0.2), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * np.abs(y).max())


def test_unreduced_losses_are_those_of_the_devices_own_examples():
    """And their mean, taken outside, has the right gradient even where nothing is tracked."""
    batch = _batch()

    def untracked(batch, temperature):
        loss = functools.partial(_loss, "infonce", axis_name="data", reduction=None)
        return jax.shard_map(
            loss, mesh=_mesh(), in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
        )(batch, temperature)  # fmt: skip

    def gradient(losses_of):
        def total(z):
            each = losses_of({**batch, "z": z}, 0.2)
            return jnp.sum(each), each

        return jax.jit(jax.grad(total, has_aux=True))(batch["z"])

    results = gradient(untracked)
    expected = gradient(functools.partial(_loss, "infonce", reduction=None))
    for x, y in zip(results, expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())


def test_ids_are_told_apart_across_devices():
    """Without `ids` every example is a negative; ids that repeat on other devices are none."""
    mesh = _mesh()
    z = jnp.tile(_batch()["z"][:6], (DEVICES, 1, 1))
    call = functools.partial(losses.infonce_loss, z[:, 0], z[:, 1], reduction=None)
    sharded = jax.jit(functools.partial(call, axis_name="data", mesh=mesh))
    ids = jnp.tile(jnp.arange(6), DEVICES)
    np.testing.assert_allclose(sharded(), jax.jit(call)(), rtol=1e-5)
    np.testing.assert_allclose(sharded(ids=ids), jax.jit(call)(ids=ids), rtol=1e-5)
    assert not np.allclose(sharded(ids=ids), sharded())


def test_bad_input():
    z = jnp.ones((6, 3, 8))
    for loss in (losses.gram_loss, losses.alignment_loss, losses.pmrl_loss, losses.pairwise_infonce_loss):
        with pytest.raises(ValueError, match=r"axis_name must name a mesh axis of the jax.shard_map.*got 'data'"):
            jax.eval_shape(functools.partial(loss, axis_name="data"), z)
        with pytest.raises(ValueError, match=r"embeddings must have a first axis that divides over the 4 devices"):
            loss(z, axis_name="data", mesh=_mesh())
