"""Settings every test runs under: shapes checked, promotions strict, eight simulated devices."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Every annotated signature in gramjax is checked at run time here; in production the annotations cost nothing.
install_import_hook("gramjax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def unchecked_signatures():
    """Turns the run-time shape checks off, so that a test sees the error a user would see."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
