"""SwiGLU as an operand: its roundings, and what differentiating it keeps."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.numerics.operand import Swiglu, value
from tests.numerics.measures import random


def test_it_rounds_once_and_again_after_the_weight():
    gate, up = (random(seed, 50, 3, dtype=jnp.bfloat16) for seed in (0, 1))
    exact = np.float64(gate) / (1 + np.exp(-np.float64(gate))) * np.float64(up)
    once = jnp.asarray(exact, jnp.bfloat16)
    np.testing.assert_array_equal(value(Swiglu(gate, up)), once)
    weight = random(2, 50, 1)
    twice = jnp.asarray(np.float64(once) * np.float64(weight), jnp.bfloat16)
    np.testing.assert_array_equal(value(Swiglu(gate, up, weight)), twice)


def test_its_gradients_are_those_of_the_formula_from_the_inputs_alone():
    x, dy = Swiglu(random(0, 50, 3), random(1, 50, 3), random(2, 50, 1)), random(3, 50, 3)
    _, vjp = jax.vjp(value, x)
    _, wanted = jax.vjp(lambda x: jax.nn.silu(x.gate) * x.up * x.weight, x)
    for got, right in zip(jax.tree.leaves(vjp(dy)), jax.tree.leaves(wanted(dy)), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    assert len(jax.tree.leaves(vjp)) == len(x)
