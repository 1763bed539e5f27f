"""Random operands, and how far a product is from another."""

import jax.numpy as jnp
import numpy as np


def random(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(got, wanted):
    """Frobenius, relative."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def unlikeness(got, wanted):
    """DeepGEMM's measure: 1 - 2 <x, y> / (|x|^2 + |y|^2)."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return 1 - 2 * (got * wanted).sum() / ((got**2).sum() + (wanted**2).sum())
