"""Kernels for Hopper without one: GPU interpret mode, which also finds races."""

import contextlib

import jax.experimental.pallas.mosaic_gpu as plgpu
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call


@contextlib.contextmanager
def interpreted():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert not interpret_pallas_call.get_races().races_found  # jax 0.12 raises where it finds one


@pytest.fixture
def interpret():
    """The context in which a kernel runs on a CPU; leaving it fails if there was a race."""
    return interpreted
