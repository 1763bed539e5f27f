"""DeepSeekMoE against the loop over experts: values and gradients for any routing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.model.moe import MoeFfn, RoutedExperts, experts_loop
from dsv3.numerics.dot import PlainDot

X, K, E = 14, 3, 8
ROUTINGS = {
    "random": np.stack([np.random.default_rng(x).permutation(E)[:K] for x in range(X)]),
    "all to the same": np.tile([5, 0, 3], (X, 1)),
    "half of the experts idle": np.stack([np.random.default_rng(x).permutation(4)[:K] * 2
                                          for x in range(X)]),
}  # fmt: skip


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def experts(small, fill):
    return fill(lambda key: RoutedExperts(key, small, PlainDot()))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, experts, u_XD, experts_XK, gates_XK, dy_XD):
    y_XD, pullback = jax.vjp(lambda e, u, g: function(e, u, experts_XK, g), experts, u_XD, gates_XK)
    return y_XD, pullback(dy_XD.astype(y_XD.dtype))


@pytest.mark.parametrize("experts_XK", ROUTINGS.values(), ids=ROUTINGS)
def test_routed_experts_are_the_loop(experts, small, experts_XK):
    operands = random(0, X, small.width), experts_XK.astype(np.int32), np.abs(random(1, X, K))
    dy_XD = random(2, X, small.width)
    ours = value_and_gradients(RoutedExperts.__call__, experts, *operands, dy_XD)
    wanted = value_and_gradients(experts_loop, experts, *operands, dy_XD)
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5)  # FP32 sums in another order


def test_routed_experts_in_bf16_stay_near_the_loop(experts, small):
    u_XD, dy_XD = (jnp.asarray(random(s, X, small.width), jnp.bfloat16) for s in (0, 2))
    operands = ROUTINGS["random"].astype(np.int32), np.abs(random(1, X, K))
    y_XD, (de, du_XD, dg_XK) = value_and_gradients(
        RoutedExperts.__call__, experts, u_XD, *operands, dy_XD
    )
    wanted, (we, _, wg_XK) = value_and_gradients(experts_loop, experts, u_XD, *operands, dy_XD)
    assert (y_XD.dtype, du_XD.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (de.gate[...].dtype, dg_XK.dtype) == (jnp.float32, jnp.float32)
    for mine, right in [(y_XD, wanted), (de.gate[...], we.gate[...]), (dg_XK, wg_XK)]:
        error = np.linalg.norm(np.float64(mine) - np.float64(right)) / np.linalg.norm(right)
        assert error < 2**-6  # a few roundings of 2^-9, none of them systematic


def test_tokens_may_come_in_any_order(experts, small):
    order = np.random.default_rng(0).permutation(X)
    u_XD, experts_XK, gates_XK = random(0, X, small.width), ROUTINGS["random"], random(1, X, K)
    run = jax.jit(RoutedExperts.__call__)
    here = run(experts, u_XD[order], experts_XK[order], gates_XK[order])
    np.testing.assert_allclose(here, run(experts, u_XD, experts_XK, gates_XK)[order], atol=1e-5)


def test_an_empty_batch_of_gates_gives_nothing(experts, small):
    zero = jax.jit(RoutedExperts.__call__)(
        experts, random(0, X, small.width), ROUTINGS["random"], np.zeros((X, K), np.float32)
    )
    np.testing.assert_array_equal(zero, 0)


def test_the_layer_is_equation_12(small, fill):
    """Shared experts see every token, and the gate scale touches the routed ones only."""
    ffn = fill(lambda key: MoeFfn(key, small, PlainDot()))
    u_BTD = random(0, 2, 7, small.width)
    y_BTD, routing = jax.jit(MoeFfn.__call__)(ffn, u_BTD, np.ones((2, 7), bool))
    u_XD = u_BTD.reshape(-1, small.width)
    routed_XD = experts_loop(ffn.routed, u_XD, routing.experts_XK, routing.gates_XK)
    gate, up, down = (
        np.asarray(m.w[...]) for m in (ffn.shared.gate, ffn.shared.up, ffn.shared.down)
    )
    wide, narrow = 2 * small.moe.expert_width, small.moe.expert_width
    assert gate.shape[1] == wide
    shared_XD = np.zeros_like(u_XD)
    for first in (0, narrow):  # two experts of their own, side by side
        mine = slice(first, first + narrow)
        pre = u_XD @ gate[:, mine]
        shared_XD += (pre / (1 + np.exp(-pre)) * (u_XD @ up[:, mine])) @ down[mine]
    wanted = np.asarray(routed_XD) + shared_XD
    np.testing.assert_allclose(y_BTD.reshape(-1, small.width), wanted, atol=2e-5)
    assert routing.counts_E.sum() == 14 * small.moe.experts_per_token
