"""The attention kernels in interpret mode against the oracle, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.numerics.attention import causal_attention
from dsv3.numerics.kernels.attention import Tuning, attention
from tests.numerics.kernels.arrays import apart, random

SCALE = 0.2


def results(core, inputs, do_BTNU):
    """o, and the gradients of queries, keys and values."""
    o_BTNU, vjp = jax.vjp(functools.partial(core, scale=SCALE), *inputs)
    return o_BTNU, *vjp(do_BTNU)


@pytest.mark.parametrize(
    ("shape", "W", "U"),
    [((1, 133, 1), 192, 128), ((2, 40, 2), 64, 64)],
    ids=["the report's widths, an odd length", "several heads, less than a tile"],
)
def test_values_and_gradients_are_the_oracles(interpret, shape, W, U):
    inputs = random(0, *shape, W), random(1, *shape, W), random(2, *shape, U)
    do_BTNU = random(3, *shape, U)
    with interpret():
        mine = results(attention, inputs, do_BTNU)
    exact = [x.astype(jnp.float32) for x in (*inputs, do_BTNU)]
    assert all(x.dtype == jnp.bfloat16 for x in mine)
    # p and ds are rounded to 8 bits on their way to the tensor cores, and so are the results
    assert apart(mine, results(causal_attention, exact[:3], exact[3])) <= 2**-7


def test_large_scores_do_not_overflow(interpret):
    q, v = random(0, 1, 72, 1, 64) * 30, random(1, 1, 72, 1, 64)
    with interpret():
        o = attention(q, q, v, SCALE)
    exact = causal_attention(*(x.astype(jnp.float32) for x in (q, q, v)), SCALE)
    np.testing.assert_allclose(np.float32(o), exact, atol=2**-5)


def inputs_of(W=64, k_W=64, U=64, T=8, v_T=8, dtype=jnp.bfloat16):
    return (
        jnp.zeros((1, T, 1, W), dtype),
        jnp.zeros((1, T, 1, k_W), dtype),
        jnp.zeros((1, v_T, 1, U), dtype),
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: inputs_of(W=96), "q_BTNW is 96 wide"),
        (lambda: inputs_of(k_W=128), "k_BTNW is 128 wide, q_BTNW 64"),
        (lambda: inputs_of(U=80), "v_BTNU is 80 wide"),
        (lambda: inputs_of(v_T=16), r"v_BTNU is \(1, 16, 1, 64\): q_BTNW wants \(1, 8, 1\)"),
        (lambda: inputs_of(dtype=jnp.float32), "q_BTNW is float32"),
    ],
)
def test_a_refusal_names_the_dimension(make, says):
    with pytest.raises(ValueError, match=says):
        attention(*make(), SCALE)


@pytest.mark.parametrize(
    ("tuning", "says"),
    [({"keys": 0}, r"tuning\.keys = 0"), ({"forward": 12}, r"attention: tuning\.stages = 12")],
)
def test_a_tuning_that_cannot_be_is_refused(tuning, says):
    with pytest.raises(ValueError, match=says):
        attention(*inputs_of(), SCALE, tuning=Tuning(**tuning))
