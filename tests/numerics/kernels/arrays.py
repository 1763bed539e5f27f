"""Operands for kernels, and how far their results are from what is wanted."""

import jax
import jax.numpy as jnp
import numpy as np


def random(seed: int, *shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def apart(mine, wanted) -> float:
    """The largest relative distance, in the Frobenius norm, between arrays of two trees; NaN where
    there is any."""

    def one(a, b):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    return float(np.max(jax.tree.leaves(jax.tree.map(one, mine, wanted))))
