"""The router's invariants, and Eq. 17-20 against a literal version."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsv3.config import AuxFree, AuxLoss, Moe, NoBalance
from dsv3.model import router
from dsv3.model.layers import RMSNorm
from dsv3.model.router import Router, RouterBias, choose, gates, imbalance, updated_bias
from dsv3.parallel.dispatch import count

MOE = Moe(routed_experts=16, experts_per_token=4, groups=4, groups_per_token=2)
X = 12
V3 = Moe(routed_experts=256, experts_per_token=8, groups=8, groups_per_token=4)


@functools.partial(jax.jit, static_argnums=2)
def routed(scores_XE, bias_E, config):
    experts_XK = choose(scores_XE, bias_E, config)
    return experts_XK, gates(scores_XE, experts_XK, config)


scores = arrays(np.float32, (X, 16), elements=st.floats(2**-6, 1, width=32))
biases = arrays(np.float32, 16, elements=st.floats(-2, 2, width=32, allow_subnormal=False))


@given(scores_XE=scores, bias_E=biases)
def test_every_choice_is_legal(scores_XE, bias_E):
    experts_XK, gates_XK = (np.array(x) for x in routed(scores_XE, bias_E, MOE))
    assert all(len(set(chosen)) == MOE.experts_per_token for chosen in experts_XK)
    assert all(len(set(chosen // 4)) <= MOE.groups_per_token for chosen in experts_XK)
    assert experts_XK.min() >= 0 and experts_XK.max() < MOE.routed_experts
    np.testing.assert_allclose(gates_XK.sum(-1), MOE.gate_scale, rtol=1e-6)
    biased_XK = np.take_along_axis(scores_XE + bias_E, experts_XK, axis=1)
    assert np.all(np.diff(biased_XK, axis=1) <= 0)  # best first


@given(scores_XE=scores, bias_E=biases)
def test_the_bias_changes_who_is_chosen_and_not_the_gates_of_a_set(scores_XE, bias_E):
    experts_XK, gates_XK = map(np.asarray, routed(scores_XE, bias_E, MOE))
    mine_XK = np.take_along_axis(scores_XE.astype(float), experts_XK, axis=1)
    np.testing.assert_allclose(gates_XK, 2.5 * mine_XK / mine_XK.sum(-1, keepdims=True), rtol=1e-5)


def test_a_bias_changes_the_selection():
    scores_XE = np.random.default_rng(0).uniform(size=(64, 16)).astype(np.float32)
    favour_0_and_1 = np.where(np.arange(16) < 2, 5.0, 0.0).astype(np.float32)
    before, _ = routed(scores_XE, np.zeros(16, np.float32), MOE)
    after, _ = routed(scores_XE, favour_0_and_1, MOE)
    counts = [count(chosen, 16) for chosen in (before, after)]
    assert counts[0][0] < 32 and counts[1][0] == counts[1][1] == 64


def test_a_bias_common_to_all_experts_changes_nothing():
    scores_XE = np.random.default_rng(0).uniform(size=(64, 16)).astype(np.float32)
    plain, shifted = (routed(scores_XE, np.full(16, b, np.float32), MOE)[0] for b in (0.0, -1.5))
    np.testing.assert_array_equal(plain, shifted)


def test_selection_at_the_reports_size():
    """256 experts in 8 groups, against a loop over tokens in float64."""
    rng = np.random.default_rng(0)
    scores_XE = rng.uniform(size=(50, 256)).astype(np.float32)
    bias_E = rng.normal(size=256).astype(np.float32) - 1
    experts_XK, _ = routed(scores_XE, bias_E, V3)
    for s_E, chosen_K in zip(scores_XE, np.asarray(experts_XK), strict=True):
        c = (s_E.astype(float) + bias_E).reshape(8, 32)
        kept = np.argsort(-np.sort(c, axis=1)[:, -2:].sum(1))[:4]
        c[~np.isin(np.arange(8), kept)] = -np.inf
        np.testing.assert_array_equal(chosen_K, np.argsort(-c.ravel())[:8])


# --- gradients ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routing_router(small, fill):
    return fill(lambda key: Router(key, small))


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_no_gradient_reaches_the_bias(routing_router, small):
    u_BTD, weight_XK = random(0, 2, 6, small.width), random(1, 12, 3)

    @jax.jit
    def gradient(module):
        def loss(module):
            routing = module(u_BTD, jnp.ones((2, 6), bool))
            return jnp.vdot(routing.gates_XK, weight_XK) + routing.balance_loss

        return jax.grad(loss)(module)

    dmodule = gradient(routing_router)
    assert not np.any(dmodule.bias[...])
    assert np.all(np.any(np.asarray(dmodule.w[...]) != 0, axis=0))  # each expert learns
    kinds = {type(leaf) for leaf in (routing_router.w, routing_router.bias)}
    assert kinds == {type(RMSNorm(1, 1.0).gain), RouterBias}


def test_gates_have_the_gradient_of_normalised_sigmoids(routing_router, small):
    u_BTD, weight_XK = random(0, 1, 6, small.width), random(1, 6, 3)
    valid_BT = np.ones((1, 6), bool)
    experts_XK = jax.jit(Router.__call__)(routing_router, u_BTD, valid_BT).experts_XK

    def plain(w):
        s_XE = jax.nn.sigmoid(u_BTD[0] @ w)
        mine_XK = jnp.take_along_axis(s_XE, experts_XK, axis=1)
        return jnp.vdot(2.5 * mine_XK / mine_XK.sum(-1, keepdims=True), weight_XK)

    def ours(w):
        s_XE = jax.nn.sigmoid(u_BTD[0] @ w)
        return jnp.vdot(gates(s_XE, experts_XK, small.moe), weight_XK)

    wanted, mine = (jax.jit(jax.grad(f))(routing_router.w[...]) for f in (plain, ours))
    np.testing.assert_allclose(mine, wanted, atol=1e-5)


def test_scores_are_fp32_whatever_the_compute_dtype(routing_router, small):
    u_BTD = jnp.asarray(random(0, 2, 6, small.width), jnp.bfloat16)
    scores_BTE = routing_router.scores(u_BTD)
    logits_BTE = np.asarray(u_BTD, float) @ np.asarray(routing_router.w[...], float)
    exact = 1 / (1 + np.exp(-logits_BTE))
    assert scores_BTE.dtype == jnp.float32
    np.testing.assert_allclose(scores_BTE, exact, rtol=1e-5)


# --- the auxiliary loss ------------------------------------------------------------------------

B, T, E, K = 3, 10, 16, 4
imbalance_of = jax.jit(imbalance, static_argnums=2)
loss_of = jax.jit(router.balance_loss, static_argnums=2)


def literal_sum_of_f_p(scores_TE):
    """sum_i f_i P_i of one sequence, Eq. 18-20 term by term."""
    tokens = len(scores_TE)
    f, p = np.zeros(E), np.zeros(E)
    for s_E in scores_TE.astype(float):
        for i in range(E):
            f[i] += E / (K * tokens) * (i in np.argsort(-s_E)[:K])
            p[i] += s_E[i] / s_E.sum() / tokens
    return np.sum(f * p)


def some_scores():
    return np.random.default_rng(0).uniform(size=(B, T, E)).astype(np.float32)


def some_padding():
    return np.arange(T)[None] < np.array([T, 7, 4])[:, None]


def test_imbalance_is_equations_18_to_20():
    wanted = np.mean([literal_sum_of_f_p(s_TE) for s_TE in some_scores()])
    got = imbalance_of(some_scores(), np.ones((B, T), bool), MOE)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_padding_is_not_balanced():
    pairs = zip(some_scores(), some_padding(), strict=True)
    wanted = np.mean([literal_sum_of_f_p(s_TE[valid_T]) for s_TE, valid_T in pairs])
    np.testing.assert_allclose(imbalance_of(some_scores(), some_padding(), MOE), wanted, rtol=1e-5)
    padded_with_nonsense = np.where(some_padding()[..., None], some_scores(), 0.99)
    got = imbalance_of(padded_with_nonsense, some_padding(), MOE)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_imbalance_is_one_when_loads_are_even():
    rotating = np.stack([np.roll(np.linspace(1, 0.1, E), t) for t in range(E)])
    flat = np.full((1, E, E), 0.3)
    for scores_BTE in (rotating[None], flat):
        got = imbalance_of(scores_BTE.astype(np.float32), np.ones((1, E), bool), MOE)
        np.testing.assert_allclose(got, 1.0, rtol=1e-5)


def test_imbalance_grows_when_all_tokens_agree():
    peaked = np.where(np.arange(E) < K, 0.9, 0.001).astype(np.float32)
    got = imbalance_of(np.tile(peaked, (B, T, 1)), np.ones((B, T), bool), MOE)
    np.testing.assert_allclose(got, E / K, rtol=1e-2)  # f = E/K on the chosen, who hold all of P


def with_balance(balance):
    return dataclasses.replace(MOE, balance=balance)


def test_each_way_of_balancing_asks_for_its_own_loss():
    scores_BTE, valid_BT = some_scores(), np.ones((B, T), bool)
    by_sequence = np.mean([literal_sum_of_f_p(s_TE) for s_TE in scores_BTE])
    by_batch = literal_sum_of_f_p(scores_BTE.reshape(-1, E))
    assert abs(by_sequence - by_batch) > 1e-3
    for balance, wanted in [
        (AuxFree(sequence_alpha=0.1), 0.1 * by_sequence),
        (AuxFree(sequence_alpha=0.0), 0.0),
        (AuxLoss(alpha=0.2, scope="sequence"), 0.2 * by_sequence),
        (AuxLoss(alpha=0.2, scope="batch"), 0.2 * by_batch),
        (NoBalance(), 0.0),
    ]:
        got = loss_of(scores_BTE, valid_BT, with_balance(balance))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_loss_pulls_through_p_alone():
    """f is an indicator: the gradient is that of sum_i f_i P_i with f held."""
    scores_TE = some_scores()[0]
    best_TK = np.argsort(-scores_TE, axis=1)[:, :K]
    f_E = np.bincount(best_TK.ravel(), minlength=E) * E / (K * T)

    def held(s_TE):
        return jnp.sum(f_E * (s_TE / s_TE.sum(-1, keepdims=True)).mean(0))

    ours = jax.jit(jax.grad(lambda s: imbalance(s, jnp.ones((1, T), bool), MOE)))(scores_TE[None])
    np.testing.assert_allclose(ours[0], jax.grad(held)(scores_TE), atol=1e-6)


def test_the_loss_sees_neither_bias_nor_groups(small, fill):
    """Eq. 18 counts the best of the scores as they are."""
    model = dataclasses.replace(small, moe=dataclasses.replace(small.moe, groups_per_token=2))
    module = fill(lambda key: Router(key, model))
    u_BTD, valid_BT = random(0, 2, 6, small.width), np.ones((2, 6), bool)
    run = jax.jit(Router.__call__)
    first = run(module, u_BTD, valid_BT)
    module.bias[...] = -module.bias[...] * 3
    second = run(module, u_BTD, valid_BT)
    assert np.any(first.experts_XK != second.experts_XK)
    assert first.balance_loss == second.balance_loss


# --- the bias ----------------------------------------------------------------------------------


def test_the_bias_update_is_exact_at_the_reports_batch_size():
    """63M tokens to 8 of 256 experts: 256 times such a load is no int32."""
    tokens = 15_360 * 4096
    counts_E = np.zeros(256, np.int32)
    counts_E[:8] = tokens
    moved = updated_bias(jnp.zeros(256), jnp.asarray(counts_E), 0.001)
    np.testing.assert_array_equal(moved, np.where(counts_E > 0, -0.001, 0.001).astype(np.float32))


@given(arrays(np.int32, (2, 8), elements=st.integers(0, 60_000_000)))
def test_the_bias_moves_by_the_sign_rule(counts_LE):
    moved = updated_bias(jnp.zeros((2, 8)), jnp.asarray(counts_LE), 1.0)
    exact = [[int(np.sign(sum(map(int, row)) - 8 * int(c))) for c in row] for row in counts_LE]
    np.testing.assert_array_equal(moved, exact)


def test_the_bias_brings_loads_together():
    """MaxVio = (max load - mean) / mean of fresh tokens falls from above 1.5 to below 0.2."""
    skew_E = jnp.asarray(1.5 * random(0, 16))

    def step(bias_E, key):
        scores_XE = jax.nn.sigmoid(jax.random.normal(key, (1024, 16)) + skew_E[None])
        counts_E = count(choose(scores_XE, bias_E, MOE), 16)
        violation = counts_E.max() / counts_E.mean() - 1
        return updated_bias(bias_E, counts_E, 0.01), violation

    keys = jax.random.split(jax.random.key(0), 300)
    _, violations = jax.jit(lambda keys: jax.lax.scan(step, jnp.zeros(16), keys))(keys)
    assert violations[:10].min() > 1.5
    assert violations[-50:].mean() < 0.2
