"""Placement of batches and parameters."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from gramjax.training import data_mesh, replicate, shard_batch


def test_the_mesh_is_of_auto_type_over_all_devices():
    mesh = data_mesh()
    assert mesh.shape == {"data": jax.device_count()}
    assert mesh.axis_types == (AxisType.Auto,)


def test_each_device_holds_its_rows():
    mesh = data_mesh(jax.devices()[:4])
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = shard_batch({"x": rows}, mesh)["x"]
    for i, shard in enumerate(sorted(placed.addressable_shards, key=lambda shard: shard.device.id)):
        np.testing.assert_array_equal(shard.data, rows[2 * i : 2 * i + 2])


def test_rows_that_do_not_divide_are_refused_by_name():
    with pytest.raises(ValueError, match=r"batch\['text'\]\['ids'\] must have .* 4 devices, got shape \(6, 2\)"):
        shard_batch({"text": {"ids": np.zeros((6, 2), np.int32)}}, data_mesh(jax.devices()[:4]))


def test_replicate_puts_a_copy_on_every_device():
    mesh = data_mesh()
    tree = replicate({"w": np.ones(3, np.float32), "key": jax.random.key(0)}, mesh)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))
    assert len(tree["w"].addressable_shards) == jax.device_count()
