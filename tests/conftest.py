"""What every test runs under: the CPU, strict shapes, repeatable examples.

Warnings are errors (pyproject.toml) and broadcasting between ranks raises, so a shape that only
happens to fit fails here. `JAX_PLATFORMS=cuda make test` runs the same tests on another platform.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is first imported
# Tests compile far longer than they compute: leave out what makes code fast and compiling slow.
# Eight virtual devices for tests of meshes; whatever names no mesh runs on the first alone.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8",
)

from pathlib import Path

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
MOST_MAPS = 20_000

hypothesis.settings.register_profile(
    "short", deadline=None, max_examples=25, derandomize=True, database=None
)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("short")  # --hypothesis-profile=long overrides it


@pytest.fixture(autouse=True)
def no_compilation_cache_is_left_behind():
    """train.py and eval.py, called in a test, switch on theirs for the process."""
    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(autouse=True, scope="module")
def few_programs_are_kept():
    """Every program that XLA:CPU compiled keeps some maps of memory, and Linux allows a process
    65,530; beyond that XLA crashes. So a process forgets its programs in time."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPS:
        jax.clear_caches()
