"""Training the released model: half precision, recomputation, random parts, and parameters divided over devices."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import nnx
from jax.sharding import AbstractMesh

from gramjax import losses, stack_modalities
from gramjax.models import GramModel, LossParameters, gram_large, gram_tiny
from gramjax.training import create_train_state, data_mesh, make_train_step, parameter_shardings, shard_batch

TINY = gram_tiny()
# Compilation is what takes time here. Audio goes through the same code, and its tower's own tests.
CONFIG = replace(
    TINY,
    towers={
        "vision": replace(TINY.towers["vision"], depth=2, image_size=28, mlp_dim=64),
        "text": replace(TINY.towers["text"], depth=1),
    },
    modalities={"caption": "text", "vision": "vision"},
    joint_heads={},
    condition_frames={"vision": 4},
)
ROWS = 8


def make_batch():
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(1, 97, (ROWS, 6)).astype(np.int32), rng.integers(2, 7, (ROWS, 1))
    return {
        "caption": {"ids": ids, "mask": np.arange(6) < lengths},
        "vision": rng.normal(size=(ROWS, 2, 28, 28, 3)).astype(np.float32),
    }


def interleave(x):
    """Every row and the next one, in turn."""
    return rearrange(jnp.stack([x, jnp.roll(x, -1, axis=0)], axis=1), "b two l -> (b two) l")


def objective(model, scalars, batch, rngs):
    """Volumes, and matching with the next clip's text as the negative."""
    tokens = model.encode(batch, rngs=rngs)
    stacked, _ = stack_modalities(model.project(tokens, batch))
    loss = losses.gram_loss(stacked, temperature=scalars.temperature)
    condition = model.condition(tokens, ["vision"])
    # Two texts a clip, its own and the next clip's: side by side, so that each device keeps its clips.
    texts = jax.tree.map(interleave, batch["caption"])
    logits = model.match(texts, condition, rngs=rngs)
    matching = losses.matching_loss(logits, jnp.tile(jnp.array([1, 0]), ROWS))
    return loss + 0.1 * matching, {"matching": matching}


@pytest.fixture(scope="module")
def half(filled):
    model = filled(lambda: GramModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat=True))
    graph = nnx.graphdef(model)

    @jax.jit
    def loss_and_gradient(params, key):
        def loss(params):
            return objective(nnx.merge(graph, params), LossParameters(), make_batch(), nnx.Rngs(dropout=key))

        return jax.value_and_grad(loss, has_aux=True)(params)

    return model, loss_and_gradient


def dropout_key(seed):
    return jax.random.key(seed, impl="rbg")  # compiles several times faster than the default


@pytest.mark.slow
def test_half_precision_trains_every_parameter_in_float32(half):
    model, loss_and_gradient = half
    (loss, _), gradient = loss_and_gradient(nnx.state(model), dropout_key(0))
    assert loss.dtype == jnp.float32
    chex.assert_tree_all_finite((loss, gradient))
    for path, value in nnx.to_flat_state(gradient):
        assert value.dtype == jnp.float32
        # A key bias shifts all logits of a query alike; no objective here has a use for words.
        unused = path[-2:] == ("key", "bias") or "language_head" in path
        assert unused or np.abs(value[...]).max() > 0, path


@pytest.mark.slow
def test_random_parts_reach_the_whole_model(half):
    model, loss_and_gradient = half
    ((first, parts), _), ((again, _), _), ((other, others), _) = (
        loss_and_gradient(nnx.state(model), dropout_key(seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert abs(first - other) > 1e-3
    assert abs(parts["matching"] - others["matching"]) > 1e-4


def test_every_kind_of_input_is_dropped_out(filled):
    """Each alone: texts, pictures, clips, and texts that read."""
    towers = {
        "vision": replace(CONFIG.towers["vision"], depth=1, dropout_rate=0.1),
        "text": replace(CONFIG.towers["text"], dropout_rate=0.1),
    }
    model = filled(lambda: GramModel(replace(CONFIG, towers=towers), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    batch = jax.tree.map(lambda x: jnp.asarray(x[:2]), make_batch())
    read = jax.random.normal(jax.random.key(0), (2, 3, towers["text"].width))

    @jax.jit
    def outputs(params, key):
        model = nnx.merge(graph, params)
        return {
            "text": model.encode({"caption": batch["caption"]}, rngs=nnx.Rngs(dropout=key)),
            "picture": model.encode({"vision": batch["vision"][:, 0]}, rngs=nnx.Rngs(dropout=key)),
            "clip": model.encode({"vision": batch["vision"]}, rngs=nnx.Rngs(dropout=key)),
            "match": model.match(batch["caption"], read, rngs=nnx.Rngs(dropout=key)),
        }

    first, again, other = (outputs(params, dropout_key(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    for name in first:
        for one, another in zip(jax.tree.leaves(first[name]), jax.tree.leaves(other[name]), strict=True):
            assert np.abs(one - another).max() > 1e-3, name


def test_every_block_of_every_tower_is_recomputed(filled):
    model = filled(lambda: GramModel(TINY, rngs=nnx.Rngs(0), remat=True))
    batch = {
        "caption": {"ids": jnp.ones((2, 6), jnp.int32), "mask": jnp.ones((2, 6), bool)},
        "vision": jnp.zeros((2, 2, 42, 42, 3)),
        "audio": jnp.zeros((2, 1, 32, 32)),
    }

    def match():
        rngs = nnx.Rngs(0)
        tokens = model.encode(batch, rngs=rngs)
        return model.match(batch["caption"], model.condition(tokens, ("vision", "audio")), rngs=rngs)

    jaxpr = jax.make_jaxpr(match)()
    blocks = sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns)
    assert blocks == 4 * 3  # vision, audio, captions alone, and captions that read


@pytest.mark.slow
def test_divided_parameters_take_the_same_step(filled):
    """Plain gradient descent with rate 1: the parameters after a step show the gradient."""
    towers = {name: replace(tower, depth=1) for name, tower in CONFIG.towers.items()}
    model = filled(lambda: GramModel(replace(CONFIG, towers=towers), rngs=nnx.Rngs(0)))
    optimizer = optax.sgd(1.0)

    def loss(model, scalars, batch, rngs):
        return objective(model, scalars, batch, None)

    def start():
        return create_train_state(model, LossParameters(), optimizer)

    graphdef, state = start()
    batch = make_batch()
    expected, expected_metrics = make_train_step(graphdef, optimizer, loss)(state, jax.tree.map(jnp.asarray, batch))

    mesh = data_mesh()
    _, state = start()
    shardings = parameter_shardings(state, mesh, min_size=512)
    step = make_train_step(graphdef, optimizer, loss, shardings=shardings)
    state, metrics = step(jax.device_put(state, shardings), shard_batch(batch, mesh))
    chex.assert_trees_all_close(dict(metrics), dict(expected_metrics), rtol=1e-4)
    chex.assert_trees_all_close(state.params, expected.params, atol=1e-4)
    large = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= 512 and any(n % 8 == 0 for n in leaf.shape)]
    assert len(large) > 20
    for leaf in large:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}


@pytest.fixture(scope="module")
def large():
    """Shapes of the released model; blocks are alike, so one of each will do."""
    config = gram_large()
    config = replace(config, towers={name: replace(tower, depth=1) for name, tower in config.towers.items()})
    return nnx.state(nnx.eval_shape(lambda: GramModel(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize(
    ("shape", "names", "parts"),
    [((8,), ("data",), 8), ((2, 128), ("replica", "data"), 128), ((16, 16), ("data", "model"), 16)],
)
def test_the_released_model_divides(large, shape, names, parts):
    """No large parameter stays whole, neither on 8 devices nor on 256."""
    mesh = AbstractMesh(shape, names)
    shardings = parameter_shardings(large, mesh, axes=[name for name in names if name != "replica"])
    divided = kept = 0
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(large), jax.tree.leaves(shardings)):
        size = int(np.prod(leaf.shape))
        shard = int(np.prod(sharding.shard_shape(leaf.shape)))
        assert (size // shard >= parts) if size >= 2**16 else (size == shard), jax.tree_util.keystr(path)
        if size >= 2**16:
            divided, kept = divided + size, kept + shard
    assert divided / kept > 0.8 * mesh.size / mesh.shape.get("replica", 1)


def test_axes_must_be_the_meshs():
    with pytest.raises(ValueError, match=r"axes must be among the mesh's \('data',\), got \['model'\]"):
        parameter_shardings({}, AbstractMesh((8,), ("data",)), axes=["data", "model"])
