"""Processes of `jax.distributed`, each with devices and rows of its own, compute what one device does."""

import functools

import numpy as np
import pytest

from tests import multiprocess_worker
from tests.processes import free_address, started

one_device = functools.cache(multiprocess_worker.compute)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_processes_together_compute_what_one_device_does(tmp_path, processes, devices):
    address = free_address()
    paths = [tmp_path / f"{index}.npz" for index in range(processes)]
    commands = [
        ("-m", "tests.multiprocess_worker", address, str(processes), str(index), str(path))
        for index, path in enumerate(paths)
    ]
    with started(commands, devices) as group:
        group.finish(timeout=600)
    expected = one_device()
    for path in paths:
        with np.load(path) as results:
            assert set(results.files) == set(expected)
            for name, value in expected.items():
                if value.dtype == np.float32:
                    np.testing.assert_allclose(
                        results[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name
                    )
                else:
                    np.testing.assert_array_equal(results[name], value, err_msg=name)
