"""Settings every test runs under: shapes checked, promotions strict, eight simulated devices."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Workers, subprocesses and later runs share what XLA has compiled.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jaxlib
import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# Every annotated signature in gramjax is checked at run time here; in production the annotations cost nothing.
install_import_hook("gramjax", "beartype.beartype")

# Most of the suite's time is XLA compiling small functions that run once. What is compared with figures to the last
# digits is compiled as users have it too (`also_optimized`).
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Quick tests compile in half the time where XLA has a choice of emitters; slow ones do it as users have it."""
    if config.getoption("markexpr") == "not slow" and jaxlib.version.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_are_dropped():
    """What one module has compiled is of no use to the next, and a process would grow to gigabytes with it."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked_signatures():
    """Turns the run-time shape checks off, so that a test sees the error a user would see."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["quick", "optimized"])
def also_optimized(request):
    """Repeats a test with XLA's optimisations, which about double the time it takes to compile."""
    if not request.param:
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # of what was compiled without
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
