"""MLA against Eq. 1-11 written out in float64, causality by gradient, and what must be equal."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Mla as MlaConfig
from dsv3.config import Yarn
from dsv3.model.mla import Mla, absorbed_attention
from dsv3.model.rope import frequencies, rotation, softmax_scale
from dsv3.numerics.attention import CORES, causal_attention
from dsv3.numerics.dot import PlainDot

B, T = 2, 7
VARIANTS = {
    "as in V3": {},
    "without query latent": {"query_latent": None},
    "with YaRN": {"yarn": Yarn(original_length=8, mscale=1.0, mscale_all_dim=0.5)},
}
ABSORBED = {
    "as in V3": {},
    "all others": VARIANTS["without query latent"] | VARIANTS["with YaRN"]
    | {"rope_layout": "half"},
}  # fmt: skip


def with_mla(model, **changes):
    return dataclasses.replace(model, mla=dataclasses.replace(model.mla, **changes))


def build(fill, model):
    return fill(lambda key: Mla(key, model, PlainDot()))


@jax.jit
def run(mla, h_BTD):
    return mla(h_BTD, rotation(mla.config, jnp.arange(h_BTD.shape[1])))


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def literal(mla: Any, h_TD, eps):
    """u_TD for one sequence, position by position and head by head, in the report's letters."""
    c: MlaConfig = mla.config
    n, d_h, d_r, d_v, d_c = c.heads, c.nope_dim, c.rope_dim, c.value_dim, c.kv_latent
    W = {
        name: np.asarray(getattr(mla, name).w[...], float).T
        for name in ("q_b", "kv_a", "kv_b", "o")
    }

    def norm(x, module):
        return x / np.sqrt(np.mean(x * x) + eps) * np.asarray(module.gain[...], float)

    def rope(x, t):
        m, m_all = 1.0, 1.0
        if c.yarn is not None:
            m, m_all = (0.1 * s * np.log(c.yarn.factor) + 1
                        for s in (c.yarn.mscale, c.yarn.mscale_all_dim))  # fmt: skip
        z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * t * frequencies(c)) * m / m_all
        return np.stack([z.real, z.imag], -1).reshape(-1)

    scale = (d_h + d_r) ** -0.5
    if c.yarn is not None:
        scale *= (0.1 * c.yarn.mscale_all_dim * np.log(c.yarn.factor) + 1) ** 2
    W_DKV, W_KR = W["kv_a"][:d_c], W["kv_a"][d_c:]
    W_UK_UV = W["kv_b"].reshape(n, d_h + d_v, d_c)
    W_UQ_QR = W["q_b"].reshape(n, d_h + d_r, -1)
    keys, values, out = [], [], []
    for t, h in enumerate(h_TD.astype(float)):
        c_kv, k_r = norm(W_DKV @ h, mla.kv_norm), rope(W_KR @ h, t)  # (1), (3)
        k_c, v_c = W_UK_UV[:, :d_h] @ c_kv, W_UK_UV[:, d_h:] @ c_kv  # (2), (5)
        keys.append([np.concatenate([k_c[i], k_r]) for i in range(n)])  # (4)
        values.append(v_c)
        c_q = h
        if c.query_latent is not None:
            c_q = norm(np.asarray(mla.q_a.w[...], float).T @ h, mla.q_norm)  # (6)
        o_t = []
        for i in range(n):
            q_c, q_r = W_UQ_QR[i, :d_h] @ c_q, rope(W_UQ_QR[i, d_h:] @ c_q, t)  # (7), (8)
            q = np.concatenate([q_c, q_r])  # (9)
            e = np.exp([scale * q @ keys[j][i] for j in range(t + 1)])
            o_t.append(sum(p * values[j][i] for j, p in enumerate(e / e.sum())))  # (10)
        out.append(W["o"] @ np.concatenate(o_t))  # (11)
    return np.array(out)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_mla_is_equations_1_to_11(small, fill, changes):
    model = dataclasses.replace(with_mla(small, **changes), norm_eps=0.1)  # not for the latents
    mla, h_BTD = build(fill, model), random(0, B, T, model.width)
    wanted = np.stack([literal(mla, h_TD, eps=1e-6) for h_TD in h_BTD])
    np.testing.assert_allclose(run(mla, h_BTD), wanted, atol=2e-5)  # FP32 at values of order 1


def test_causal_by_gradient(small, fill):
    mla, h_TD = build(fill, small), random(0, T, small.width)

    @jax.jit
    def reach(mla, h_TD):
        weight_D = jnp.asarray(random(1, small.width))
        return jnp.abs(jax.jacrev(lambda h: run(mla, h[None])[0] @ weight_D)(h_TD)).sum(-1)

    reached_TS = np.asarray(reach(mla, h_TD)) > 0
    np.testing.assert_array_equal(reached_TS, np.tril(np.ones((T, T), bool)))


def test_sequences_do_not_mix(small, fill):
    mla, h_BTD = build(fill, small), random(0, B, T, small.width)
    alone = np.stack([run(mla, h_BTD[b : b + 1])[0] for b in range(B)])
    np.testing.assert_allclose(run(mla, h_BTD), alone, atol=1e-5)


def test_half_layout_is_the_same_map_with_permuted_rope_columns(small, fill):
    mla, h_BTD = build(fill, small), random(0, B, T, small.width)
    wanted = run(mla, h_BTD)
    half = build(fill, with_mla(small, rope_layout="half"))
    c = small.mla
    split = np.r_[0 : c.rope_dim : 2, 1 : c.rope_dim : 2]
    of_head = np.r_[: c.nope_dim, c.nope_dim + split]
    all_heads = (np.arange(c.heads)[:, None] * (c.nope_dim + c.rope_dim) + of_head).ravel()
    half.q_b.w[...] = mla.q_b.w[...][:, all_heads]
    half.kv_a.w[...] = mla.kv_a.w[...][:, np.r_[: c.kv_latent, c.kv_latent + split]]
    np.testing.assert_allclose(run(half, h_BTD), wanted, atol=1e-5)


def test_a_cache_holds_latent_and_rope_key(small, fill):
    """What `latents` gives is all that `expand` needs, C + R numbers a token."""
    mla, h_BTD = build(fill, small), random(0, B, T, small.width)
    c_BTC, k_rope_BTR = mla.latents(mla.kv_a(h_BTD), rotation(small.mla, jnp.arange(T)))
    assert c_BTC.shape == (B, T, small.mla.kv_latent)
    assert k_rope_BTR.shape == (B, T, small.mla.rope_dim)
    k_BSNW, v_BSNU = mla.expand(c_BTC, k_rope_BTR)
    np.testing.assert_array_equal(k_BSNW[:, :, 0, small.mla.nope_dim :], k_rope_BTR)
    np.testing.assert_array_equal(k_BSNW[:, :, 1, small.mla.nope_dim :], k_rope_BTR)
    assert v_BSNU.shape == (B, T, small.mla.heads, small.mla.value_dim)


def test_scores_and_softmax_are_fp32_under_bf16_compute():
    """Scores of 100 and 100.25 are one number in BF16, where two values would then weigh alike."""
    q_BTNW, k_BSNW = (
        jnp.asarray(rows, jnp.bfloat16)[None, :, None]
        for rows in ([[0, 0], [10, 1]], [[10, 0], [10, 0.25]])
    )
    v_BSNU = jnp.asarray([[1], [0]], jnp.bfloat16)[None, :, None]
    o_BTNU = causal_attention(q_BTNW, k_BSNW, v_BSNU, 1.0)
    assert o_BTNU.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(o_BTNU[0, 1, 0]), 1 / (1 + np.exp(0.25)), rtol=2**-7)


@pytest.mark.parametrize("name", CORES)
def test_the_core_is_the_one_that_is_configured(small, fill, name):
    assert build(fill, with_mla(small, attention=name)).core is CORES[name]


def absorbed(mla, h_BTD):
    """u_BTD by the absorbed form over a cache that holds all of h's latents."""
    turn = rotation(mla.config, jnp.arange(h_BTD.shape[1]))
    q_BTNW, c_BTC, k_rope_BTR = mla.project(h_BTD, turn)
    spare = 16 - h_BTD.shape[1]  # positions that hold something not to be seen
    held = [
        jnp.pad(x, ((0, 0), (0, spare), (0, 0)), constant_values=9) for x in (c_BTC, k_rope_BTR)
    ]

    def keys(start, size):
        return tuple(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in held)

    position_BT = jnp.broadcast_to(jnp.arange(h_BTD.shape[1])[None], h_BTD.shape[:2])
    z_BTNC = absorbed_attention(
        *mla.absorb(q_BTNW), keys, 16, position_BT, softmax_scale(mla.config)
    )
    return mla.output(mla.values(z_BTNC))


@pytest.mark.parametrize("changes", ABSORBED.values(), ids=ABSORBED)
def test_absorbed_is_expanded(small, fill, monkeypatch, changes):
    mla, h_BTD = build(fill, with_mla(small, **changes)), random(0, B, T, small.width)
    for block in (16, 4):  # one block, and two of the four that there is room for
        monkeypatch.setattr("dsv3.model.mla.KEY_BLOCK", block)
        # two FP32 orders of summation of values of order 1
        found = jax.jit(lambda *arguments: absorbed(*arguments))(mla, h_BTD)
        np.testing.assert_allclose(found, run(mla, h_BTD), atol=2e-5)


def test_absorbed_is_expanded_in_bf16(small, fill):
    mla, h_BTD = build(fill, small), jnp.asarray(random(0, B, T, small.width), jnp.bfloat16)
    u_BTD = jax.jit(absorbed)(mla, h_BTD)
    assert u_BTD.dtype == jnp.bfloat16
    # a few roundings to 8 bits of values up to 3
    np.testing.assert_allclose(np.float32(u_BTD), np.float32(run(mla, h_BTD)), atol=0.1)


def test_a_longer_neighbour_changes_no_bit(small, fill, monkeypatch):
    """Blocks of keys beyond a query's own position are read for its neighbour's sake alone."""
    monkeypatch.setattr("dsv3.model.mla.KEY_BLOCK", 4)
    rng = np.random.default_rng(0)
    q_BTNC, q_BTNR, c_BSC, k_BSR = (
        jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32)
        for shape in [(1, 2, 9), (1, 2, 6), (16, 9), (16, 6)]
    )

    @jax.jit
    def attend(position_BT):
        def keys(start, size):
            return tuple(
                jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (c_BSC, k_BSR)
            )

        return absorbed_attention(q_BTNC, q_BTNR, keys, 16, position_BT, 0.3)

    short, long = (attend(jnp.array([[5], [other]])) for other in (2, 15))
    np.testing.assert_array_equal(short[0], long[0])
    assert not np.array_equal(short[1], long[1])
