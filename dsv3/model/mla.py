"""Multi-head latent attention (§2.1.1, Eq. 1-11).

    c^KV = norm(W^DKV h)   [C]        k^R = RoPE(W^KR h)     [R]   one rope key, shared by all heads
    k^C_i, v^C_i = W^UK_i c^KV, W^UV_i c^KV                 [H], [U]      k_i = [k^C_i ; k^R]
    c^Q  = norm(W^DQ h)    [Q]        q_i = [W^UQ_i c^Q ; RoPE(W^QR_i c^Q)]             [H + R]
    o_i  = sum_{j<=t} softmax_j(q_i · k_ij · scale) v_ij     u = W^O [o_1 ; ... ; o_N]

Only c^KV (after its norm) and k^R need caching at inference: C + R numbers a token. A query that
meets a cache need not expand it. W^UK and W^UV move to the query's side of both sums,

    q~_i = (W^UK_i)^T q^C_i  [C]           q_i · k_ij = q~_i · c^KV_j + q^R_i · k^R_j
    z_i  = sum_{j<=t} p_ij c^KV_j  [C]     o_i = W^UV_i z_i

which is attention with one key of C + R and one value of C for all heads: the absorbed form. It
costs 2 C + R products a pair and head instead of H + R + U, but no expansion, so it is for few
queries; prompts and training take the expanded form. W^UK and W^UV are then part of the core
attention and multiply as they are stored, in the compute dtype, whatever the dot rule.

The norms on the two latents are those that the report mentions in §4.2 without an equation; their
epsilon is 1e-6 in the released code and in transformers, whatever the other norms' is. Matrices
that read the same input are stored as one, with the checkpoint's row order: `kv_a` yields
[c^KV ; k^R], `q_b` yields [q^C_i ; q^R_i] head by head, `kv_b` yields [k^C_i ; v^C_i] head by head.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from dsv3.config import Model
from dsv3.model.layers import Linear, RMSNorm, save_as, together
from dsv3.model.rope import ROTATE, softmax_scale
from dsv3.numerics.attention import CORES
from dsv3.numerics.rule import DotRule

LATENT_EPS = 1e-6
KEY_BLOCK = 256  # cached positions that absorbed_attention reads at a time


class Mla(nnx.Module):
    """u_BTD = MLA(h_BTD), causal over the T positions."""

    def __init__(self, key: Array, config: Model, dot: DotRule):
        mla, std = config.mla, config.init_std
        keys = jax.random.split(key, 5)
        head_out = mla.nope_dim + mla.rope_dim
        if mla.query_latent is None:
            self.q_a = self.q_norm = None
        else:
            self.q_a = Linear(keys[0], config.width, mla.query_latent, std, dot)
            self.q_norm = RMSNorm(mla.query_latent, LATENT_EPS)
        query_in = mla.query_latent or config.width
        self.q_b = Linear(keys[1], query_in, mla.heads * head_out, std, dot)
        self.kv_a = Linear(keys[2], config.width, mla.kv_latent + mla.rope_dim, std, dot)
        self.kv_norm = RMSNorm(mla.kv_latent, LATENT_EPS)
        kv_out = mla.heads * (mla.nope_dim + mla.value_dim)
        self.kv_b = Linear(keys[3], mla.kv_latent, kv_out, std, dot)
        self.o = Linear(keys[4], mla.heads * mla.value_dim, config.width, std, dot.after_attention)
        self.config = mla
        self.core = CORES[mla.attention]

    def __call__(self, h_BTD: Array, rotation: tuple[Array, Array]) -> Array:
        return self.output(self.attend(*self.project(h_BTD, rotation)))

    def project(self, h_BTD: Array, rotation: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries q_BTNW, and what a cache holds: latents c_BTC and rope keys k_rope_BTR."""
        q_BTQ, joint = self.down_projections(h_BTD)
        return self.queries(q_BTQ, rotation), *self.latents(joint, rotation)

    def attend(self, q_BTNW: Array, c_BTC: Array, k_rope_BTR: Array) -> Array:
        """o_BTNU by the expanded form, causal over the T positions (Eq. 10)."""
        k_BSNW, v_BSNU = self.expand(c_BTC, k_rope_BTR)
        return self.core(q_BTNW, k_BSNW, v_BSNU, softmax_scale(self.config))

    def output(self, o_BTNU: Array) -> Array:
        """u_BTD (Eq. 11)."""
        return self.o(o_BTNU.reshape(*o_BTNU.shape[:2], -1))

    def down_projections(self, h_BTD: Array) -> tuple[Array, Array]:
        """The query latent, or h itself without one, and [c^KV ; k^R], before norms and turns."""
        if self.q_a is None:
            return h_BTD, save_as("latent", self.kv_a(h_BTD))
        q_BTQ, joint = together(h_BTD, self.q_a, self.kv_a)
        return save_as("latent", q_BTQ), save_as("latent", joint)

    def queries(self, q_BTQ: Array, rotation: tuple[Array, Array]) -> Array:
        """q_BTNW, W = H + R, the rope part turned (Eq. 6-9)."""
        c_BTQ = q_BTQ if self.q_norm is None else self.q_norm(q_BTQ)
        q_BTNW = self.q_b(c_BTQ).reshape(*q_BTQ.shape[:2], self.config.heads, -1)
        q_nope, q_rope = jnp.split(q_BTNW, [self.config.nope_dim], axis=-1)
        q_rope = ROTATE[self.config.rope_layout](q_rope, *rotation)
        return jnp.concatenate([q_nope, q_rope], axis=-1)

    def latents(self, joint: Array, rotation: tuple[Array, Array]) -> tuple[Array, Array]:
        """c_BTC after its norm and k_rope_BTR after its turn (Eq. 1, 3): what a cache holds."""
        c_BTC, k_rope_BTR = jnp.split(joint, [self.config.kv_latent], axis=-1)
        k_rope_BT1R = ROTATE[self.config.rope_layout](k_rope_BTR[:, :, None, :], *rotation)
        return self.kv_norm(c_BTC), k_rope_BT1R[:, :, 0, :]

    def expand(self, c_BSC: Array, k_rope_BSR: Array) -> tuple[Array, Array]:
        """k_BSNW and v_BSNU from the latents (Eq. 2, 4, 5)."""
        kv = self.kv_b(c_BSC).reshape(*c_BSC.shape[:2], self.config.heads, -1)
        k_nope_BSNH, v_BSNU = jnp.split(kv, [self.config.nope_dim], axis=-1)
        shared = (*k_nope_BSNH.shape[:3], self.config.rope_dim)
        k_rope_BSNR = jnp.broadcast_to(k_rope_BSR[:, :, None, :], shared)
        return jnp.concatenate([k_nope_BSNH, k_rope_BSNR], axis=-1), v_BSNU

    def absorb(self, q_BTNW: Array) -> tuple[Array, Array]:
        """q~_BTNC, the queries of the latents, and q_rope_BTNR, those of the rope keys."""
        q_BTNH, q_BTNR = jnp.split(q_BTNW, [self.config.nope_dim], axis=-1)
        w_CNH = self._up_projections()[..., : self.config.nope_dim].astype(q_BTNW.dtype)
        return _summed("btnh,cnh->btnc", q_BTNH, w_CNH).astype(q_BTNW.dtype), q_BTNR

    def values(self, z_BTNC: Array) -> Array:
        """o_BTNU from the mean latents that each head attended to."""
        w_CNU = self._up_projections()[..., self.config.nope_dim :].astype(z_BTNC.dtype)
        return _summed("btnc,cnu->btnu", z_BTNC, w_CNU).astype(z_BTNC.dtype)

    def _up_projections(self) -> Array:
        return self.kv_b.w[...].reshape(self.config.kv_latent, self.config.heads, -1)


class Keys(Protocol):
    """Latents and rope keys of positions `start` to `start` + `size`: c_BsC and k_rope_BsR."""

    def __call__(self, start: Array, size: int) -> tuple[Array, Array]: ...


def absorbed_attention(
    q_BTNC: Array, q_BTNR: Array, keys: Keys, length: int, position_BT: Array, scale: float
) -> Array:
    """z_BTNC: the mean of the latents that a query at `position_BT` sees, j <= its position.

    `keys` holds `length` positions, a power of two, of which those up to the largest of
    `position_BT` are read: in blocks, softmax and sums in FP32 and rescaled to the running maximum.
    What lies beyond a query's own position adds exactly nothing, however long its neighbours are.
    Each of the few positions is multiplied on its own, which rounds alike for any number of them.
    """
    block = min(KEY_BLOCK, length)

    def over(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest_BTN1, sum_BTN1, z_BTNC = carry
        c_BsC, k_rope_BsR = keys(index * block, block)
        s_BTNs = _each_position("bnc,bsc->bns", q_BTNC, c_BsC)
        s_BTNs = (s_BTNs + _each_position("bnr,bsr->bns", q_BTNR, k_rope_BsR)) * scale
        visible_BTs = (index * block + jnp.arange(block))[None, None] <= position_BT[:, :, None]
        s_BTNs = jnp.where(visible_BTs[:, :, None, :], s_BTNs, -jnp.inf)
        now_BTN1 = jnp.maximum(largest_BTN1, s_BTNs.max(axis=-1, keepdims=True))
        p_BTNs, kept_BTN1 = jnp.exp(s_BTNs - now_BTN1), jnp.exp(largest_BTN1 - now_BTN1)
        z_BTNC *= kept_BTN1
        z_BTNC += _each_position("bns,bsc->bnc", p_BTNs.astype(c_BsC.dtype), c_BsC)
        return now_BTN1, sum_BTN1 * kept_BTN1 + p_BTNs.sum(axis=-1, keepdims=True), z_BTNC

    one_BTN1 = jnp.zeros((*q_BTNC.shape[:3], 1), jnp.float32)
    start = (one_BTN1 - jnp.inf, one_BTN1, jnp.zeros(q_BTNC.shape, jnp.float32))
    if block == length:
        _, sum_BTN1, z_BTNC = over(jnp.int32(0), start)
    else:
        blocks = jnp.max(position_BT) // block + 1
        _, sum_BTN1, z_BTNC = lax.fori_loop(0, blocks, over, start)
    return (z_BTNC / sum_BTN1).astype(q_BTNC.dtype)


def _each_position(equation: str, x_BT: Array, y: Array) -> Array:
    return jnp.stack([_summed(equation, x, y) for x in x_BT.swapaxes(0, 1)], axis=1)


def _summed(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
