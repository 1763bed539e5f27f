"""The small parts against their formulas, and what they compute in FP32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.model.layers import Embedding, Linear, RMSNorm, SwigluMlp, save_as
from dsv3.numerics.dot import PlainDot

RULE = PlainDot()


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rms_norm(x, gain, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * gain


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_is_its_formula(fill, scale):
    norm, x = fill(lambda _: RMSNorm(6, 1e-6)), scale * random(0, 2, 3, 6)
    wanted = rms_norm(x.astype(float), np.asarray(norm.gain[...]), 1e-6)
    np.testing.assert_allclose(norm(x), wanted, rtol=1e-5)


def test_rms_norm_computes_in_fp32_and_rounds_once():
    x = jnp.asarray(3 * random(0, 64, 40), jnp.bfloat16)
    y = RMSNorm(40, 1e-6)(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), rms_norm(np.float64(x), 1.0, 1e-6), rtol=1.01 * 2**-8)


def test_the_multiplication_by_the_gain_comes_before_rounding():
    norm = RMSNorm(2, 0.0)
    norm.gain[...] = jnp.array([1.01, 1.0])
    y = norm(jnp.array([[1.0, 1.004]], jnp.bfloat16))
    exact = rms_norm(np.float64(jnp.array([[1.0, 1.004]], jnp.bfloat16)), [1.01, 1.0], 0)
    np.testing.assert_array_equal(y, jnp.asarray(exact, jnp.bfloat16))


def test_linear_is_x_times_w(fill):
    linear, x = fill(lambda key: Linear(key, 6, 5, 1.0, RULE)), random(0, 2, 3, 6)
    np.testing.assert_allclose(linear(x), x @ np.asarray(linear.w[...]), atol=1e-5)


def test_embedding_looks_up_and_sets_the_dtype(fill):
    embedding, tokens = fill(lambda key: Embedding(key, 9, 4, 1.0)), np.array([[3, 8, 3]])
    np.testing.assert_array_equal(embedding(tokens)[0], embedding.table[...][tokens[0]])
    assert embedding(tokens, jnp.bfloat16).dtype == jnp.bfloat16
    counts = jax.grad(lambda m: m(tokens).sum())(embedding).table[...]
    np.testing.assert_array_equal(counts[:, 0], [0, 0, 0, 2, 0, 0, 0, 0, 1])


def test_swiglu_mlp_is_its_formula(fill):
    mlp, x = fill(lambda key: SwigluMlp(key, 6, 8, 1.0, RULE)), random(0, 2, 3, 6)
    gate, up, down = (np.asarray(m.w[...], float) for m in (mlp.gate, mlp.up, mlp.down))
    wanted = (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(x), wanted, atol=1e-5)


def test_naming_an_activation_changes_nothing():
    x = random(0, 3)
    np.testing.assert_array_equal(save_as("latent", x), x)
