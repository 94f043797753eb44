"""State and step: learning, randomness, donation, devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gramjax.models import LossParameters
from gramjax.training import adamw, create_train_state, data_mesh, make_train_step, merge, replicate, shard_batch


class TwoTowers(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.left = nnx.Linear(6, 8, rngs=rngs)
        self.right = nnx.Linear(5, 8, rngs=rngs)
        self.dropout_rate = dropout

    def __call__(self, batch, rngs):
        left, right = self.left(batch["left"]), self.right(batch["right"])
        if self.dropout_rate:
            keep = jax.random.bernoulli(rngs.dropout(), 1 - self.dropout_rate, left.shape)
            left = jnp.where(keep, left, jnp.zeros_like(left))
        return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (left, right)]


def contrastive(model, scalars, batch, rngs):
    left, right = model(batch, rngs)
    logits = left @ right.T / scalars.temperature
    labels = jnp.arange(logits.shape[0])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, {"temperature": scalars.temperature}


def make_batch(rows=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "left": rng.normal(size=(rows, 6)).astype(np.float32),
        "right": rng.normal(size=(rows, 5)).astype(np.float32),
    }


def start(loss=contrastive, learning_rate=0.02, dropout=0.0, mesh=None):
    optimizer = adamw(learning_rate, weight_decay=0.1)
    graphdef, state = create_train_state(
        TwoTowers(nnx.Rngs(0), dropout), LossParameters(temperature=0.3), optimizer, seed=1
    )
    if mesh is not None:
        state = replicate(state, mesh)
    return graphdef, state, make_train_step(graphdef, optimizer, loss)


def test_overfits_a_small_batch_and_compiles_once():
    _, state, step = start()
    batch = make_batch()
    losses = []
    for _ in range(400):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(state.step) == 400
    assert step._cache_size() == 1


def test_one_step_is_adamw_by_hand():
    _, state, step = start(learning_rate=0.01)
    batch = make_batch()
    graphdef, state, step = start(learning_rate=0.01)
    before = jax.tree.map(np.array, state.params)

    def loss(params):
        both = nnx.merge(graphdef, params, state.rest)
        return contrastive(both["model"], both["loss"], batch, None)[0]

    gradient = jax.tree.map(lambda g: np.asarray(g, np.float64), jax.grad(loss)(state.params))
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)

    def by_hand(path, p, g):
        g = g * min(1.0, 1.0 / norm)
        decay = 0.1 if "kernel" in jax.tree_util.keystr(path) else 0.0
        # First step: bias-corrected running mean and square are g and g^2.
        return p - 0.01 * (g / (np.abs(g) + 1e-6) + decay * p)

    expected = jax.tree_util.tree_map_with_path(by_hand, before, gradient)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, state.params), expected, atol=1e-6)


def test_randomness_depends_on_seed_and_step_alone():
    """Two runs agree; and a run stopped after two steps and taken up again from a copy agrees with itself."""
    batch = make_batch()
    _, state, step = start(dropout=0.5)
    losses = []
    copies = {}
    for i in range(4):
        copies[i] = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 4
    state = copies[2]
    for i in (2, 3):
        state, metrics = step(state, batch)
        assert float(metrics["loss"]) == losses[i]


def test_dropout_differs_from_step_to_step():
    _, state, step = start(dropout=0.5, learning_rate=0.0)
    _, first = step(jax.tree.map(jnp.copy, state), make_batch())
    later = jax.tree.map(jnp.copy, state)
    later = type(later)(later.step + 1, later.params, later.rest, later.opt_state, later.rng)
    _, second = step(later, make_batch())
    assert float(first["loss"]) != float(second["loss"])


def test_the_state_is_donated_and_the_callers_model_is_not():
    model = TwoTowers(nnx.Rngs(0))
    optimizer = adamw(0.1)
    graphdef, state = create_train_state(model, LossParameters(), optimizer)
    make_train_step(graphdef, optimizer, contrastive)(state, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(TwoTowers(nnx.Rngs(0))))


def test_merge_gives_the_trained_model_and_scalars():
    graphdef, state, step = start()
    for _ in range(5):
        state, metrics = step(state, make_batch())
    model, scalars = merge(graphdef, state)
    before = float(contrastive(model, scalars, make_batch(), None)[0])
    _, metrics = step(state, make_batch())
    np.testing.assert_allclose(before, metrics["loss"], rtol=1e-6)
    assert isinstance(model, TwoTowers)
    assert isinstance(scalars, LossParameters)


class WithStatistics(TwoTowers):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)

    def __call__(self, batch, rngs):
        return super().__call__({**batch, "left": self.norm(batch["left"], use_running_average=False)}, rngs)


def test_running_statistics_are_carried_from_step_to_step():
    optimizer = adamw(0.0)
    graphdef, state = create_train_state(WithStatistics(nnx.Rngs(0)), LossParameters(), optimizer)
    step = make_train_step(graphdef, optimizer, contrastive)
    batch = make_batch()
    for _ in range(2):
        state, _ = step(state, batch)
    mean = np.asarray(merge(graphdef, state)[0].norm.mean[...])
    np.testing.assert_allclose(mean, 0.75 * batch["left"].mean(0), atol=1e-6)  # 0 -> m/2 -> 3m/4


@pytest.mark.parametrize("devices", [2, 8])
def test_many_devices_give_the_losses_of_one(devices):
    batches = [make_batch(seed=i) for i in range(5)]
    runs = []
    for count in (1, devices):
        mesh = data_mesh(jax.devices()[:count])
        _, state, step = start(dropout=0.3, mesh=mesh)
        losses = []
        for batch in batches:
            state, metrics = step(state, shard_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
        runs.append((losses, jax.tree.map(np.asarray, state.params)))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-5)
    chex.assert_trees_all_close(runs[0][1], runs[1][1], atol=1e-5)
