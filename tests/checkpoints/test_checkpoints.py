"""Trees and series of checkpoints: what comes back, what is kept, and kills in the middle."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gramjax.checkpoints import Checkpointer, restore, save
from gramjax.training import adamw, create_train_state, data_mesh, replicate


def make_tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=4), jnp.bfloat16),
        "layers": [jnp.arange(3), jnp.float32(seed)],
        "key": jax.random.key(seed),
    }


def make_state(seed):
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(seed))
    return create_train_state(model, nnx.Linear(1, 1, rngs=nnx.Rngs(seed)), adamw(0.1), seed=seed)[1]


def without_keys(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


@pytest.mark.parametrize("tree", [make_tree(), make_state(0)], ids=["dictionary", "train state"])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, tree):
    save(tmp_path / "tree", tree)
    again = restore(tmp_path / "tree", jax.tree.map(jnp.zeros_like, tree))
    chex.assert_trees_all_equal_structs(again, tree)
    chex.assert_trees_all_equal_dtypes(again, tree)
    chex.assert_trees_all_equal(without_keys(again), without_keys(tree))


def test_without_target_it_is_named_numpy_arrays(tmp_path):
    tree = make_tree()
    save(tmp_path / "tree", tree)
    again = restore(tmp_path / "tree")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(again))
    np.testing.assert_array_equal(again["kernel"], tree["kernel"])
    np.testing.assert_array_equal(again["layers"][0], tree["layers"][0])


def test_an_existing_path_is_only_replaced_when_asked(tmp_path):
    save(tmp_path / "tree", {"x": jnp.zeros(2)})
    with pytest.raises(ValueError, match="path must not exist unless overwrite=True"):
        save(tmp_path / "tree", {"x": jnp.ones(2)})
    save(tmp_path / "tree", {"x": jnp.ones(2)}, overwrite=True)
    np.testing.assert_array_equal(restore(tmp_path / "tree")["x"], 1)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ValueError, match="path must be one to be replaced"):
        save(tmp_path, {"x": jnp.ones(2)}, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_restoring_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a checkpoint"):
        restore(tmp_path / "none")
    with Checkpointer(tmp_path / "run") as checkpoints, pytest.raises(FileNotFoundError, match="has steps none"):
        checkpoints.restore(make_tree())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"x": jnp.zeros(3)}, r"\(3,\) is not compatible with the stored shape: \(2,\)"),
        ({"y": jnp.zeros(2)}, "do not match"),
    ],
)
def test_a_target_that_does_not_fit_is_an_error(tmp_path, target, message):
    save(tmp_path / "tree", {"x": jnp.zeros(2)})
    with pytest.raises(ValueError, match=message):
        restore(tmp_path / "tree", target)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(4, 2), (1, 8), (8, 1)])
def test_restoring_on_another_number_of_devices(tmp_path, saved_on, restored_on):
    """Divided or replicated arrays alike, and random keys."""

    def place(tree, count):
        mesh = data_mesh(jax.devices()[:count])
        divided = jax.device_put(tree["kernel"], NamedSharding(mesh, PartitionSpec("data")))
        return {**replicate(tree, mesh), "kernel": divided}

    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, place(make_tree(1), saved_on))
    target = place(make_tree(2), restored_on)
    with Checkpointer(tmp_path) as checkpoints:
        again = checkpoints.restore(target)
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, target)
    chex.assert_trees_all_equal(*(without_keys(jax.device_get(without_keys(t))) for t in (again, make_tree(1))))


def test_the_latest_and_the_best_are_kept(tmp_path):
    recalls = {1: 0.2, 2: 0.5, 3: None, 4: 0.5, 5: 0.3, 6: None}
    with Checkpointer(tmp_path, best_metric="recall") as checkpoints:
        for step, recall in recalls.items():
            checkpoints.save(step, {"x": jnp.full(2, step)}, metrics=None if recall is None else {"recall": recall})
    for read_only in (False, True):  # as another process finds it
        with Checkpointer(tmp_path, best_metric="recall", read_only=read_only) as checkpoints:
            assert (checkpoints.latest_step, checkpoints.best_step) == (6, 4)
            assert checkpoints.metrics(4) == {"recall": 0.5}
            assert checkpoints.restore({"x": jnp.zeros(2, int)}, step="best")["x"][0] == 4
            assert checkpoints.restore({"x": jnp.zeros(2, int)})["x"][0] == 6
            with pytest.raises(FileNotFoundError, match=r"got 2; .* has steps \[4, 6\]"):
                checkpoints.restore({"x": jnp.zeros(2, int)}, step=2)


def test_several_latest_ones_are_kept_when_asked(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, step)})
        checkpoints.wait()
        assert checkpoints.latest_step == 3
        assert checkpoints.best_step is None
        assert checkpoints.restore({"x": jnp.zeros(2, int)}, step=2)["x"][0] == 2


def test_no_best_one_without_its_metric(tmp_path):
    with Checkpointer(tmp_path, best_metric="recall") as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)}, metrics={"loss": 1.0})
        checkpoints.wait()
        assert checkpoints.best_step is None
        with pytest.raises(FileNotFoundError, match="'best'"):
            checkpoints.restore({"x": jnp.zeros(2)}, step="best")


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        checkpoints.save(1, {"x": jnp.ones(2)})
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore({"x": jnp.ones(2)})["x"], 0)


def test_a_read_only_one_makes_nothing(tmp_path):
    with Checkpointer(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.latest_step is None
        with pytest.raises(ValueError, match="save needs a Checkpointer with read_only=False"):
            checkpoints.save(2, {"x": jnp.zeros(2)})
    assert not (tmp_path / "run").exists()


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The write goes on in the background, of the values at the time of the call."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = [jnp.zeros((256, 1024)) for _ in range(8)]
    with Checkpointer(tmp_path, keep=20) as checkpoints:
        for number in range(1, 21):
            state = step(state)
            if number % 5 == 0:
                checkpoints.save(number, state)
        for number in (5, 10, 15, 20):
            for leaf in checkpoints.restore(state, step=number):
                np.testing.assert_array_equal(leaf, number)


@pytest.mark.parametrize("kind", ["loader", "dataset"])
def test_a_grain_iterator_goes_on_where_it_was(tmp_path, kind):
    def make():
        if kind == "loader":
            sampler = grain.samplers.IndexSampler(20, shuffle=True, seed=3, num_epochs=2)
            return iter(grain.DataLoader(data_source=range(100, 120), sampler=sampler))
        return iter(grain.MapDataset.source(range(100, 120)).seed(3).shuffle().repeat(2).to_iter_dataset())

    iterator = make()
    seen = [int(next(iterator)) for _ in range(7)]
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(7, {"x": jnp.zeros(1)}, iterator=iterator)
        seen += [int(next(iterator)) for _ in range(20)]
    fresh = make()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.restore({"x": jnp.zeros(1)}, iterator=fresh)
    assert [int(next(fresh)) for _ in range(20)] == seen[7:]


SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp
from gramjax.checkpoints import Checkpointer

with Checkpointer(sys.argv[1]) as checkpoints:
    step = checkpoints.latest_step or 0
    while True:
        step += 1
        checkpoints.save(step, {name: jnp.full((64, 64), step) for name in "abcdefgh"})
        checkpoints.wait()
        print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(tmp_path)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        complete = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        complete += [int(line) for line in process.communicate()[0].split()]
        left = sorted(tmp_path.rglob("*"))
        with Checkpointer(tmp_path, read_only=True) as checkpoints:
            latest = checkpoints.latest_step
            assert latest in (complete[-1], complete[-1] + 1)
            for leaf in checkpoints.restore({name: jnp.zeros((64, 64), int) for name in "abcdefgh"}).values():
                np.testing.assert_array_equal(leaf, latest)
        assert sorted(tmp_path.rglob("*")) == left
    with Checkpointer(tmp_path) as checkpoints:  # what is half written is in nobody's way
        checkpoints.save(latest + 1, {"a": jnp.full((64, 64), latest + 1)})
        checkpoints.wait()
        assert checkpoints.latest_step == latest + 1
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.zeros((64, 64), int)})["a"], latest + 1)
