"""States to save, what must be true of them when restored, and a call that fails."""

import jax
import jax.numpy as jnp
import numpy as np


def mixed(seed=0):
    """Every dtype a state holds, with the values that a lossy path would change."""
    rng = np.random.default_rng(seed)
    odd_bf16 = np.array([0x7FA1, 0xFFC3, 0x8000, 0x0001, 0x7F80], np.uint16)  # NaNs, -0, denormal
    odd_f32 = np.array([0x7FA00001, 0xFFC12345, 0x80000000, 1], np.uint32)
    return {
        "w": rng.standard_normal((16, 32), dtype=np.float32),
        "odd": {"bf16": odd_bf16.view(jnp.bfloat16.dtype), "f32": odd_f32.view(np.float32)},
        "fp8": rng.standard_normal(8).astype(jnp.float8_e4m3fn.dtype),
        "count": np.int32(seed),
        "key": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "mask": np.array([True, False, True]),
        "empty": (np.zeros((0, 3), np.float32), np.zeros(0, jnp.bfloat16.dtype)),
        "long": np.array(2**40 + seed),
    }


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small(step):
    return {"a": np.full((8, 8), step, np.float32), "b": np.arange(step, step + 9, dtype=np.int32)}


def fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail
