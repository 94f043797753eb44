import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from gramjax import _spectrum, linalg
from tests import jaxprs, reference

FUNCTIONS = [
    linalg.gram_matrix,
    linalg.orthonormal_basis,
    linalg.volume,
    linalg.log_volume,
    linalg.singular_values,
    linalg.leading_direction,
]
MASKED = FUNCTIONS[1:]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
every_masked = pytest.mark.parametrize("function", MASKED, ids=lambda f: f.__name__)


def _sets(k, kind, batch=64, d=24, seed=0):
    """Float32 sets of `k` vectors; truths are computed in float64 from exactly these."""
    rng = np.random.default_rng(seed)
    z = reference.unit(rng, batch, k, d)
    if kind == "close":
        z = z[:, :1] + 1e-3 * rng.normal(size=z.shape) / np.sqrt(d)
    if kind == "graded":
        z = z * 10.0 ** -rng.integers(0, 4, size=(batch, k, 1))
    return z.astype(np.float32)


MEASURES = jax.jit(
    lambda z: (linalg.volume(z), linalg.log_volume(z), linalg.singular_values(z), linalg.leading_direction(z))
)


@pytest.mark.usefixtures("also_optimized")
@pytest.mark.parametrize("kind", ["random", "close", "graded"])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_float32_accuracy_against_float64(k, kind):
    z = _sets(k, kind)
    values = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    volumes = np.prod(values, axis=-1)
    volume, log_volume, spectrum, direction = MEASURES(jnp.asarray(z))
    np.testing.assert_allclose(volume, volumes, rtol=1e-4)
    np.testing.assert_allclose(log_volume, np.log(volumes), rtol=1e-5, atol=1e-4)
    assert np.max(np.abs(spectrum - values) / values[:, :1]) < 5e-6
    simple = (values[:, 0] - values[:, 1] > 0.05) if k > 1 else np.ones(len(z), bool)
    truth = np.stack([reference.leading_direction(vectors) for vectors in z])
    np.testing.assert_allclose(direction[simple], truth[simple], atol=2e-5)


@pytest.mark.usefixtures("also_optimized")
def test_volumes_of_modalities_that_differ_by_a_thousandth():
    """The published float32 determinant is off by a tenth here."""
    z = _sets(3, "close", batch=256)
    truth = np.array([reference.volume(vectors) for vectors in z])
    published = np.sqrt(np.abs(np.linalg.det(np.einsum("nid,njd->nij", z, z))))
    assert np.max(np.abs(published / truth - 1)) > 0.05
    np.testing.assert_allclose(MEASURES(jnp.asarray(z))[0], truth, rtol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_float64_stays_float64(k, x64):
    z = _sets(k, "random").astype(np.float64)
    values = np.linalg.svd(z, compute_uv=False)
    result = linalg.singular_values(jnp.asarray(z))
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, values, rtol=1e-13)
    np.testing.assert_allclose(linalg.volume(jnp.asarray(z)), np.prod(values, axis=-1), rtol=1e-13)


def _awkward(k, batch=500, d=16):
    """Sets on which rotations converge slowest, or on which values vanish or repeat; float64."""
    rng = np.random.default_rng(1)
    random = reference.unit(rng, batch, k, d)
    repeat, zero, opposite = random.copy(), random.copy(), random.copy()
    repeat[:, -1] = repeat[:, 0]
    zero[:, 0] = 0.0
    opposite[:, 1::2] = -opposite[:, : 2 * (k // 2) : 2]
    rows = np.linalg.qr(rng.normal(size=(batch, d, k)))[0].swapaxes(1, 2)
    turns = np.linalg.qr(rng.normal(size=(batch, k, k)))[0]
    cluster = np.where(np.arange(k) < (k + 1) // 2, 1.0, 1e-3)

    def with_values(values):
        return np.einsum("nij,j,njd->nid", turns, values, rows)

    sets = [
        repeat,
        zero,
        opposite,
        rows,
        with_values(cluster),
        with_values(10.0 ** -np.arange(k)),
        with_values(1.0 + np.arange(k)),
    ]
    return np.concatenate(
        [*sets, random * 10.0 ** rng.uniform(-6, 0, size=(batch, k, 1)), 1e12 * random, 1e-12 * random]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# Written out, and beyond 8 in a loop.
@pytest.mark.parametrize("k", [2, 3, 4, 5, *(pytest.param(k, marks=pytest.mark.slow) for k in (6, 8, 12)), 9])
def test_singular_values_of_awkward_sets(k, dtype, x64):
    z = _awkward(k).astype(dtype)
    exact = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    rounding = 5 * k * np.finfo(dtype).eps
    values, direction = (np.asarray(x, np.float64) for x in jax.jit(linalg.spectrum)(jnp.asarray(z)))
    assert np.max(np.abs(values - exact) / exact[:, :1]) < rounding
    # How much of the vectors lies along the direction is stationary there, whether or not the value repeats.
    along = np.linalg.norm(np.einsum("nkd,nd->nk", z.astype(np.float64), direction), axis=1)
    assert np.max(np.abs(along / exact[:, 0] - 1)) < rounding


def test_basis_is_orthonormal_and_spans():
    z = jnp.asarray(_sets(4, "close"))
    basis = np.asarray(linalg.orthonormal_basis(z), np.float64)
    np.testing.assert_allclose(
        np.einsum("nid,njd->nij", basis, basis), np.broadcast_to(np.eye(4), (64, 4, 4)), atol=2e-6
    )
    vectors = np.asarray(z, np.float64)
    projected = np.einsum("nid,njd,nje->nie", vectors, basis, basis)
    np.testing.assert_allclose(projected, vectors, atol=1e-6)


@every_masked
def test_masked_equals_the_present_ones(function, x64):
    z = reference.unit(np.random.default_rng(0), 16, 4, 9)
    where = np.random.default_rng(1).random((16, 4)) < 0.6
    where[0], where[1] = True, False
    poisoned = np.where(where[..., None], z, np.nan)
    result = np.asarray(function(jnp.asarray(poisoned), jnp.asarray(where)))
    for i in range(16):
        count = where[i].sum()
        if function is linalg.volume:
            expected = reference.volume(z[i, where[i]])
        elif function is linalg.log_volume:
            expected = np.log(reference.volume(z[i, where[i]]))
        elif function is linalg.singular_values:
            values = np.linalg.svd(z[i, where[i]], compute_uv=False) if count else []
            expected = np.concatenate([values, np.zeros(4 - count)])
        elif function is linalg.leading_direction:
            expected = reference.leading_direction(z[i, where[i]]) if count else np.zeros(9)
        else:
            q, r = np.linalg.qr(z[i, where[i]].T)
            expected = np.zeros((4, 9))
            expected[where[i]] = (q * np.sign(np.diag(r))).T
        np.testing.assert_allclose(result[i], expected, atol=1e-12)


@every_function
@pytest.mark.parametrize("k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 5))])
def test_derivatives_against_finite_differences(function, k, x64):
    """Forward and reverse, first and second."""
    rng = np.random.default_rng(k)
    z = jnp.asarray(rng.normal(size=(3, k, 7)) + 1.0)
    weights = jnp.asarray(rng.normal(size=jax.eval_shape(function, z).shape))
    loss = jax.jit(lambda z: jnp.sum(weights * jnp.sin(function(z))))
    # The checker passes NumPy arrays on.
    check_grads(lambda z: loss(jnp.asarray(z)), (z,), order=2, eps=1e-5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_second_derivatives_where_values_repeat(k, x64):
    """The squares of the values add up to `|z|^2`, whose second derivative is 2, at orthonormal vectors too."""
    z, tangent = np.random.default_rng(k).normal(size=(2, 4, k, 7))
    z = np.linalg.qr(np.swapaxes(z, 1, 2))[0].swapaxes(1, 2)
    gradient = jax.grad(lambda z: jnp.sum(jnp.square(linalg.singular_values(z))))
    _, change = jax.jit(lambda z, tangent: jax.jvp(gradient, (z,), (tangent,)))(jnp.asarray(z), jnp.asarray(tangent))
    np.testing.assert_allclose(change, 2 * tangent, atol=1e-12)


def test_gradient_of_the_volume_is_the_residual(x64):
    """dVol/dz_l is the volume of the others times the unit residual, also where one vector is dependent on another."""
    z = reference.unit(np.random.default_rng(3), 5, 3, 8)
    gradient = jax.jit(jax.vmap(jax.grad(linalg.volume)))(jnp.asarray(z))
    for i, l in np.ndindex(5, 3):
        others = np.delete(z[i], l, axis=0)
        q, _ = np.linalg.qr(others.T)
        residual = z[i, l] - q @ (q.T @ z[i, l])
        expected = reference.volume(others) * residual / np.linalg.norm(residual)
        np.testing.assert_allclose(gradient[i, l], expected, atol=1e-12)


@pytest.mark.usefixtures("also_optimized")
def test_gradient_of_the_volume_stays_accurate_when_vectors_nearly_coincide():
    rng = np.random.default_rng(4)
    base = reference.unit(rng, 32, 1, 16)
    z = (base + 1e-3 * rng.normal(size=(32, 3, 16))).astype(np.float32)
    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(jax.vmap(jax.grad(linalg.volume)))(jnp.asarray(z, jnp.float64)))
    gradient = np.asarray(jax.jit(jax.vmap(jax.grad(linalg.volume)))(jnp.asarray(z)))
    assert np.max(np.abs(gradient - expected)) < 1e-3 * np.max(np.abs(expected))


def _degenerate():
    e = np.eye(4)
    return {
        "zero": np.zeros((3, 4)),
        "equal": np.ones((3, 4)) / 2,
        "opposite": np.array([e[0], -e[0], e[0]]),
        "orthogonal": e[:3],
        "one zero": np.array([e[0], 0 * e[0], e[1]]),
        "two equal": np.array([e[0], e[1], e[1]]),
        "in a plane": np.array([e[0], e[1], (e[0] + e[1]) / np.sqrt(2)]),
        "nearly equal": np.ones((3, 4)) / 2 + 1e-7 * e[:3],
        "more than dimensions": np.ones((3, 2)) / np.sqrt(2),
    }


@every_function
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_degenerate_sets(function, dtype):
    value_and_grad = jax.jit(lambda z: (function(z), jax.grad(lambda z: jnp.sum(function(z)))(z)))
    for degenerate in _degenerate().values():
        z = jnp.asarray(degenerate, dtype)
        value, gradient = value_and_grad(z)
        chex.assert_tree_all_finite((value, gradient))
        assert value.dtype == jnp.float32
        assert gradient.dtype == dtype


def test_known_degenerate_values():
    sets = {name: jnp.asarray(z, jnp.float32) for name, z in _degenerate().items()}
    for name in ("zero", "equal", "opposite", "one zero", "two equal"):
        assert linalg.volume(sets[name]) == 0
    np.testing.assert_allclose(linalg.volume(sets["in a plane"]), 0, atol=1e-6)
    assert linalg.volume(sets["orthogonal"]) == 1
    np.testing.assert_array_equal(linalg.singular_values(sets["orthogonal"]), [1, 1, 1])
    np.testing.assert_allclose(linalg.singular_values(sets["opposite"]), [np.sqrt(3), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(linalg.leading_direction(sets["opposite"]), [1, 0, 0, 0], atol=1e-6)
    assert not np.any(linalg.leading_direction(sets["zero"]))


def test_log_volume_where_the_volume_underflows():
    # The rows are e_0 + 1e-5 e_l: det Gram = 1e-10^12 (1 + 12 / 1e-10), far below what float32 holds.
    z = jnp.asarray(np.eye(1, 16) + 1e-5 * np.eye(12, 16, 1), jnp.float32)
    assert linalg.volume(z) == 0
    np.testing.assert_allclose(linalg.log_volume(z), 0.5 * (12 * np.log(1e-10) + np.log1p(12e10)), rtol=1e-4)


def test_leading_direction_at_an_obtuse_angle_is_not_left_to_rounding():
    """Two unit vectors at an obtuse angle: u_1 is along their difference, orthogonal to their sum."""
    a = reference.unit(np.random.default_rng(0), 200, 16)
    b = reference.unit(np.random.default_rng(1), 200, 16)
    b = np.where((np.sum(a * b, axis=1) > 0)[:, None], -b, b)
    directions = np.asarray(linalg.leading_direction(jnp.asarray(np.stack([a, b], axis=1), jnp.float32)))
    assert np.all(np.sum(directions * a, axis=1) > 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0, 1e-3, -1e-5, 1e-7]), min_size=12, max_size=12), st.data())
def test_properties(entries, data):
    """Volume and values do not depend on the order; they grow with a factor; a rotation changes neither."""
    z = np.reshape(entries, (3, 4)).astype(np.float32)
    order = data.draw(st.permutations(range(3)))
    size = np.prod(np.maximum(np.linalg.norm(z, axis=1), 1e-30))
    volume, values = _volume_and_values(jnp.asarray(z))
    again, values_again = _volume_and_values(jnp.asarray(z[list(order)]))
    np.testing.assert_allclose(volume, again, atol=2e-5 * size)
    np.testing.assert_allclose(values, values_again, atol=5e-6 * max(values[0], 1e-30))
    truth = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(values, truth, atol=5e-6 * max(truth[0], 1e-30))
    scaled, values_scaled = _volume_and_values(jnp.asarray(2 * z))
    np.testing.assert_array_equal(values_scaled, 2 * values)
    np.testing.assert_array_equal(scaled, 8 * volume)
    assert 0 <= volume <= size * (1 + 1e-5)


@jax.jit
def _volume_and_values(z):
    return linalg.volume(z), linalg.singular_values(z)


@every_function
def test_jit_vmap_and_leading_axes(function):
    z = jnp.asarray(_sets(3, "random", batch=6)).reshape(2, 3, 3, 24)
    expected = function(z)
    np.testing.assert_allclose(jax.jit(function)(z), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(function)))(z), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jax.jit(function)(z[1, 2]), expected[1, 2], rtol=1e-4, atol=1e-6)
    assert function(jnp.zeros((0, 3, 5))).shape[0] == 0


@every_function
def test_no_factor_of_the_size_of_the_dimension_squared(function):
    """Neither forward nor backward holds a `d x d` array."""
    d = 211
    z = jnp.zeros((13, 3, d))
    shapes = jaxprs.shapes(jax.value_and_grad(lambda z: jnp.sum(function(z))), z)
    assert (13, 3, d) in shapes  # The walk sees the arrays inside.
    assert not [shape for shape in shapes if shape.count(d) > 1 or np.prod(shape) > 13 * 8 * d]


def test_products_of_vectors_keep_all_bits():
    """GPUs and TPUs round float32 products to fewer bits unless told not to; volumes are differences of such products.

    CPUs do not, so that no value here could show it. (Sums of elementwise products are never rounded.)
    """
    products = {}
    for function in FUNCTIONS:
        jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda z, f=function: jnp.sum(f(z))))(jnp.zeros((13, 3, 7))).jaxpr
        found = [equation for equation in jaxprs.equations(jaxpr) if equation.primitive.name == "dot_general"]
        products[function.__name__] = [equation.params["precision"] for equation in found]
    assert products["gram_matrix"]
    assert products["volume"]
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert {precision for of_one in products.values() for precision in of_one} == {highest}


@every_function
def test_a_second_call_compiles_nothing(function, caplog):
    z = jnp.asarray(_sets(3, "random", batch=6))
    function(z)
    with jax.log_compiles():
        function(z)
        assert "ompil" not in caplog.text
        jax.jit(lambda z: z + 1)(z)
        assert "ompil" in caplog.text  # it would be seen


@every_function
def test_bad_input(function, unchecked_signatures):
    with pytest.raises(TypeError, match=r"z must have a floating-point dtype, got int32 of shape \(3, 4\)"):
        function(jnp.ones((3, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"z must have shape \[..., modality, dim\], got shape \(4,\)"):
        function(jnp.ones(4))


@pytest.mark.parametrize("function", [*MASKED, linalg.spectrum, linalg.triangular_factor], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(4, 0, 8), (4, 3, 0)])
def test_sets_of_nothing(function, shape, unchecked_signatures):
    with pytest.raises(ValueError, match=f"z must hold at least one vector .* got shape {re.escape(str(shape))}"):
        function(jnp.ones(shape))


@every_masked
def test_bad_mask(function, unchecked_signatures):
    with pytest.raises(ValueError, match=r"where must have shape \[..., modality\] = \(2, 3\), got shape \(3,\)"):
        function(jnp.ones((2, 3, 4)), jnp.ones(3, bool))
    with pytest.raises(TypeError, match=r"where must be a bool array .* got dtype int32"):
        function(jnp.ones((2, 3, 4)), jnp.ones((2, 3), jnp.int32))


@pytest.mark.parametrize("n", [128, 131, 250])
def test_blocks_do_not_change_spectra(n, monkeypatch):
    """On one CPU device large batches are gone through block by block."""
    z = jnp.asarray(_sets(3, "random", batch=n))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    alone = functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec())

    def value_and_gradient(transform):
        weights = jnp.linspace(0.5, 1.5, 24)
        blocks = []

        def loss(z):
            blocks.append(_spectrum._block(z))
            return sum(jnp.sum(jnp.sin(x) * weights[: x.shape[-1]][None]) for x in linalg.spectrum(z))

        return *jax.jit(transform(jax.value_and_grad(loss)))(z), blocks[0]

    monkeypatch.setattr(_spectrum, "_BLOCK_BYTES", 2**10)
    value, gradient, block = value_and_gradient(lambda f: f)
    assert block is None
    again, gradient_again, block = value_and_gradient(alone)
    assert block == 32
    np.testing.assert_allclose(again, value, rtol=1e-5)
    # Where two singular values nearly coincide the direction turns fast, and so rounding counts for more.
    np.testing.assert_allclose(gradient_again, gradient, atol=1e-4 * np.max(np.abs(gradient)))


@pytest.mark.parametrize("k", [3, 9])  # Jacobi rotations written out, and in a loop
def test_spectra_on_explicit_meshes(k):
    z = _sets(k, "random", batch=8).astype(np.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    weights = jnp.linspace(0.5, 1.5, 24)

    def loss(z):
        values, direction = linalg.spectrum(z)
        return jnp.sum(jnp.sin(values)) + jnp.sum(jnp.sin(direction) * weights[None])

    expected = jax.jit(jax.value_and_grad(loss))(jnp.asarray(z))
    with jax.set_mesh(mesh):
        divided = jax.device_put(z, NamedSharding(mesh, PartitionSpec("data")))
        value, gradient = jax.jit(jax.value_and_grad(loss))(divided)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-4 * np.max(np.abs(expected[1])))


def test_spectra_of_a_divided_batch_stay_divided(monkeypatch):
    monkeypatch.setattr(_spectrum, "_BLOCK_BYTES", 2**10)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    z = jax.device_put(jnp.ones((256, 2, 8)), NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(jax.grad(lambda z: jnp.sum(linalg.leading_direction(z)))).lower(z).compile()
    assert "all-gather" not in compiled.as_text()


def test_compiles_once_for_each_shape():
    def spectrum(z):
        return linalg.singular_values(z)

    traced = jax.jit(chex.assert_max_traces(spectrum, n=1))
    for seed in range(3):
        traced(jnp.asarray(_sets(3, "random", seed=seed)))
