"""What holds for every encoder: one small one of each kind goes through the same tests."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax.encoders import (
    BERT,
    BEATs,
    BEATsConfig,
    BERTConfig,
    VectorConfig,
    VectorEncoder,
    VisionConfig,
    VisionTransformer,
)

VISION = VisionConfig(
    image_size=16, patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=32, drop_path_rate=0.5, dropout_rate=0.1
)
STEM = replace(VISION, stem_channels=(8, 12), depth=1)
AUDIO = BEATsConfig(
    patch_size=4,
    patch_dim=12,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    position_kernel=6,
    position_groups=4,
    num_buckets=16,
    max_distance=12,
)
AUDIO_STEM = replace(AUDIO, stem_channels=(8, 12), mel_bins=8, depth=1)
TEXT = BERTConfig(vocab_size=50, max_length=12, width=16, depth=2, num_heads=2, mlp_dim=32)
VECTOR = VectorConfig(features=9, width=16, depth=2, mlp_dim=32, input_dropout_rate=0.2, dropout_rate=0.1)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def dropout_key(seed):
    return jax.random.key(seed, impl="rbg")  # compiles several times faster than the default


def text_inputs():
    ids = np.random.default_rng(0).integers(0, 50, (3, 12)).astype(np.int32)
    return jnp.asarray(ids), jnp.asarray(np.arange(12) < np.array([[12], [5], [1]]))


CASES = {
    "vision": (VisionTransformer, VISION, lambda: (normal(3, 16, 16, 3),), 17),
    "vision-stem": (VisionTransformer, STEM, lambda: (normal(3, 16, 16, 3),), 17),
    "audio": (BEATs, AUDIO, lambda: (normal(3, 20, 8),), 10),
    "audio-stem": (BEATs, AUDIO_STEM, lambda: (normal(3, 20, 8),), 5),
    "text": (BERT, TEXT, text_inputs, 12),
    "vector": (VectorEncoder, VECTOR, lambda: (normal(3, 9),), 1),
}
each = pytest.mark.parametrize("name", CASES)
each_kind = pytest.mark.parametrize("name", ["vision", "audio", "text", "vector"])


@pytest.fixture(scope="module")
def build(filled):
    @functools.cache
    def build(name, **options):
        encoder, config, inputs, _ = CASES[name]
        return filled(lambda: encoder(config, rngs=nnx.Rngs(0), **options)), inputs()

    return build


@functools.cache
def forward(name, **options):
    encoder, config, _, _ = CASES[name]
    graph = nnx.graphdef(nnx.eval_shape(lambda: encoder(config, rngs=nnx.Rngs(0), **options)))
    return jax.jit(
        lambda params, inputs, key: nnx.merge(graph, params)(
            *inputs, rngs=None if key is None else nnx.Rngs(dropout=key)
        )
    )


@functools.cache
def loss_and_gradient(name, **options):
    def loss(params, inputs):
        outputs = forward(name, **options)(params, inputs, None)
        # Unequal weights: after a LayerNorm an even sum has no gradient.
        return jnp.sum(normal(*outputs.shape) * outputs.astype(jnp.float32)), outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@each
def test_shape_of_the_output(name, build):
    model, inputs = build(name)
    outputs = forward(name)(nnx.state(model), inputs, None)
    assert outputs.shape == (3, CASES[name][3], 16)
    assert outputs.dtype == jnp.float32


@each
def test_jit_equals_eager(name, build):
    model, inputs = build(name)
    jitted = forward(name)(nnx.state(model), inputs, None)
    np.testing.assert_allclose(jitted, model(*inputs), atol=1e-5)


@each
def test_examples_do_not_mix(name, build):
    model, inputs = build(name)
    state = nnx.state(model)
    together = forward(name)(state, inputs, None)
    swapped = forward(name)(state, tuple(jnp.stack([x[0], x[0], x[2]]) for x in inputs), None)
    np.testing.assert_array_equal(swapped[::2], together[::2])
    np.testing.assert_array_equal(swapped[1], together[0])
    assert jnp.abs(together[1] - together[0]).max() > 0.1


@each
def test_gradient_reaches_every_parameter(name, build):
    model, inputs = build(name)
    for path, gradient in nnx.to_flat_state(loss_and_gradient(name)(nnx.state(model), inputs)[1]):
        size = float(jnp.abs(gradient[...]).max())
        if path[-2:] == ("key", "bias"):
            assert size < 1e-4, path  # softmax does not see what is the same for all keys
        else:
            assert size > 1e-4, path


@each
def test_parameters_are_a_plain_tree(name, build):
    model, _ = build(name)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    arrays = jax.tree.leaves(params)
    assert len({id(array) for array in arrays}) == len(arrays)
    assert all(array.dtype == jnp.float32 for array in arrays)


@each
def test_random_parts_need_rngs(name, build):
    model, inputs = build(name)
    run = functools.partial(forward(name), nnx.state(model), inputs)
    np.testing.assert_array_equal(run(None), run(None))
    one, again, other = (run(dropout_key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - other).max() > 0.1
    assert jnp.abs(one - run(None)).max() > 0.1


@each
def test_rates_of_zero_leave_nothing_random(name, build):
    encoder, config, inputs, _ = CASES[name]
    rates = {field: 0.0 for field in vars(config) if field.endswith("_rate")}
    assert len(rates) >= 2
    graph = nnx.graphdef(nnx.eval_shape(lambda: encoder(replace(config, **rates), rngs=nnx.Rngs(0))))
    model = nnx.merge(graph, nnx.state(build(name)[0]))
    jaxpr = jax.make_jaxpr(lambda key: model(*inputs(), rngs=nnx.Rngs(dropout=key)))(dropout_key(0))
    assert "random_bits" not in str(jaxpr)


@each_kind
def test_remat_changes_memory_only(name, build):
    model, inputs = build(name)
    params = nnx.state(model)
    plain, saved = (loss_and_gradient(name, **options)(params, inputs) for options in ({}, {"remat": True}))
    np.testing.assert_allclose(plain[0][1], saved[0][1], atol=1e-5)
    chex.assert_trees_all_close(plain[1], saved[1], atol=1e-3, rtol=1e-4)
    plain, saved = (forward(name, **options)(params, inputs, dropout_key(1)) for options in ({}, {"remat": True}))
    np.testing.assert_allclose(plain, saved, atol=1e-5)
    model, inputs = build(name, remat=True)
    jaxpr = jax.make_jaxpr(lambda: model(*inputs))()  # captured, not handed over: that must work too
    layers = sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns)
    assert layers == model.config.depth


@each
def test_bfloat16_computation_with_float32_parameters(name, build):
    model, inputs = build(name, dtype=jnp.bfloat16)
    expected = forward(name)(nnx.state(model), inputs, None)
    (_, outputs), gradient = loss_and_gradient(name, dtype=jnp.bfloat16)(nnx.state(model), inputs)
    assert outputs.dtype == jnp.bfloat16
    error = jnp.linalg.norm(outputs.astype(jnp.float32) - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
    assert 1e-4 < error.max() < 0.05
    chex.assert_tree_all_finite(gradient)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


@each_kind
def test_float64(name, build, x64):
    encoder, config, inputs, _ = CASES[name]
    graph = nnx.graphdef(nnx.eval_shape(lambda: encoder(config, rngs=nnx.Rngs(0), dtype=jnp.float64)))
    params = nnx.state(build(name)[0])
    outputs = jax.jit(lambda params, inputs: nnx.merge(graph, params)(*inputs))(params, inputs())
    assert outputs.dtype == jnp.float64
    error = jnp.abs(outputs - forward(name)(params, inputs(), None).astype(jnp.float64)).max()
    assert 1e-9 < error < 1e-5


@each
def test_gradients_stay_finite_on_constant_input(name, build):
    """Silence, black pictures and padding alone: nothing varies from token to token."""
    model, inputs = build(name)
    zeros = tuple(jnp.zeros_like(x) for x in inputs)
    chex.assert_tree_all_finite(loss_and_gradient(name)(nnx.state(model), zeros))


@pytest.mark.parametrize("name", ["audio", "audio-stem"])
@pytest.mark.parametrize("length", [7, 8, 20])
def test_padding_does_not_count(name, length, build):
    """Neither what it holds, nor how much of it there is, nor what its outputs are used for."""
    model, (fbank,) = build(name)
    state, run = nnx.state(model), forward(name)
    cut = -(-length // 4) * 4
    mask = jnp.tile(jnp.arange(20) < length, (3, 1))
    tokens = cut // 4 * (CASES[name][3] // 5)
    expected = run(state, (fbank[:, :cut], mask[:, :cut]), None)
    for garbage in (fbank, jnp.where(mask[..., None], fbank, 1e3)):
        np.testing.assert_allclose(run(state, (garbage, mask), None)[:, :tokens], expected, atol=2e-5)
    if length % 4 == 0:  # nothing is padded within a token
        np.testing.assert_allclose(expected, run(state, (fbank[:, :cut],), None), atol=2e-5)
    gradient = jax.grad(lambda x: jnp.sum(normal(*expected.shape) * run(state, (x, mask), None)[:, :tokens]))(fbank)
    np.testing.assert_array_equal(jnp.any(gradient != 0, axis=2), mask)


@pytest.mark.parametrize("name", ["audio", "audio-stem"])
def test_an_example_of_padding_alone_stays_finite(name, build):
    model, (fbank,) = build(name)
    mask = jnp.ones((3, 20), bool).at[1].set(False)
    chex.assert_tree_all_finite(loss_and_gradient(name)(nnx.state(model), (fbank, mask)))


IMAGE, IDS = jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 8), jnp.int32)


@pytest.mark.parametrize(
    ("name", "inputs", "error", "message"),
    [
        ("vision", (IMAGE[0],), ValueError, r"pixels must have shape \[batch, 16, 16, 3\].*got \(16, 16, 3\)"),
        ("vision", (IMAGE[:, :12],), ValueError, r"pixels .*got \(2, 12, 16, 3\)"),
        ("vision", (jnp.zeros((2, 3, 16, 16)),), ValueError, r"channels last.*got \(2, 3, 16, 16\)"),
        ("vision", (IMAGE.astype(jnp.uint8),), TypeError, "pixels must be floating point.*uint8"),
        ("audio", (jnp.zeros((2, 20)),), ValueError, r"fbank must have shape \[batch, time, mel\].*got \(2, 20\)"),
        ("audio", (jnp.zeros((2, 21, 8)),), ValueError, r"multiples of 4, got \(2, 21, 8\)"),
        ("audio", (jnp.zeros((2, 20, 6)),), ValueError, r"multiples of 4, got \(2, 20, 6\)"),
        ("audio", (jnp.zeros((2, 0, 8)),), ValueError, r"got \(2, 0, 8\)"),
        ("audio-stem", (jnp.zeros((2, 20, 4)),), ValueError, r"shape \[batch, time, 8\] .*got \(2, 20, 4\)"),
        ("audio-stem", (jnp.zeros((2, 21, 8)),), ValueError, r"time a multiple of 4, got \(2, 21, 8\)"),
        ("audio", (jnp.zeros((2, 20, 8), jnp.int32),), TypeError, "fbank must be floating point.*int32"),
        ("audio", (jnp.zeros((2, 20, 8)), jnp.ones((2, 10), bool)), ValueError, r"mask .*\(2, 20\), got \(2, 10\)"),
        ("audio", (jnp.zeros((2, 20, 8)), jnp.ones((2, 20))), TypeError, "mask must be bool.*float32"),
        ("vector", (jnp.zeros((2, 8)),), ValueError, r"vectors must have shape \[batch, 9\], got \(2, 8\)"),
        ("vector", (jnp.zeros((2, 9), jnp.int32),), TypeError, "vectors must be floating point.*int32"),
        ("text", (IDS[0], IDS[0] == 0), ValueError, r"ids must have shape \[batch, length\], got \(8,\)"),
        ("text", (jnp.zeros((2, 13), jnp.int32), jnp.ones((2, 13), bool)), ValueError, "13 tokens.*max_length=12"),
        ("text", (IDS, jnp.ones((2, 7), bool)), ValueError, r"mask must have the shape of ids, \(2, 8\).*got \(2, 7\)"),
        ("text", (IDS.astype(jnp.float32), IDS == 0), TypeError, "ids must be integers.*float32"),
        ("text", (IDS, IDS), TypeError, "mask must be bool.*int32"),
        ("text", (IDS + 50, IDS == 0), ValueError, r"ids must lie in \[0, vocab_size=50\), got 50 to 50"),
        ("text", (IDS - 1, IDS == 0), ValueError, r"ids must lie in .*got -1 to -1"),
    ],
)
def test_wrong_inputs_are_named(unchecked_signatures, build, name, inputs, error, message):
    with pytest.raises(error, match=message):
        build(name)[0](*inputs)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (VISION, {"image_size": 18}, "image_size must be a multiple of patch_size=4, got 18"),
        (VISION, {"num_heads": 3}, "width must be a multiple of num_heads=3, got 16"),
        (VISION, {"depth": 0}, "depth must be an integer >= 1, got 0"),
        (VISION, {"mlp_dim": -4}, "mlp_dim must be an integer >= 1, got -4"),
        (VISION, {"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        (VISION, {"stem_channels": (8,)}, "reduces the input 2 times, so patch_size must be that, got 4"),
        (VISION, {"stem_channels": (8, 0)}, "stem_channels must be integers >= 1"),
        (AUDIO, {"stem_channels": (8,)}, "reduces the input 2 times, so patch_size must be that, got 4"),
        (AUDIO, {"mel_bins": 0}, "mel_bins must be an integer >= 1"),
        (AUDIO, {"num_heads": 5}, "width must be a multiple of num_heads=5"),
        (AUDIO, {"position_groups": 3}, "width must be a multiple of position_groups=3"),
        (AUDIO, {"num_buckets": 7}, "num_buckets must be even"),
        (AUDIO, {"max_distance": 4}, "max_distance must exceed num_buckets / 4 = 4, got 4"),
        (AUDIO, {"layer_drop_rate": -0.1}, "layer_drop_rate must lie in"),
        (TEXT, {"vocab_size": 0}, "vocab_size must be an integer >= 1"),
        (TEXT, {"num_heads": 3}, "width must be a multiple of num_heads"),
        (TEXT, {"dropout_rate": 2.0}, "dropout_rate must lie in"),
        (VECTOR, {"features": 0}, "features must be an integer >= 1, got 0"),
        (VECTOR, {"depth": -1}, "depth must be an integer >= 1, got -1"),
        (VECTOR, {"input_dropout_rate": 1.0}, r"input_dropout_rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_configurations_are_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)
