"""The DeepSeekMoE feed-forward layer (§2.1.2, Eq. 12).

    h' = u + sum_s FFN_s(u) + sum_i g_i FFN_i(u)          (the residual u is added by the block)

Shared experts see every token and are one SwiGLU as wide as all of them together. Routed experts
work on rows sorted by expert and padded to blocks (`parallel.dispatch`), so that their products are
dense blocks on every platform and no token is dropped. The gate multiplies an expert's hidden
activation rather than its output: the same sum, on fewer numbers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3.config import Model
from dsv3.model.layers import SwigluMlp, normal, save_as
from dsv3.model.router import Router, Routing
from dsv3.numerics.operand import Swiglu
from dsv3.numerics.rule import DotRule
from dsv3.parallel.dispatch import combine, dispatch, dispatch_gates, layout_of
from dsv3.parallel.shard import ALONE, Shard


class RoutedExperts(nnx.Module):
    """E SwiGLU networks of hidden width M, each token through K of them.

    Under a `shard` of several devices the module holds the experts of its own device only.
    """

    def __init__(self, key: Array, config: Model, dot: DotRule, shard: Shard = ALONE):
        moe, std = config.moe, config.init_std
        k_gate, k_up, k_down = jax.random.split(key, 3)
        into = (moe.routed_experts, config.width, moe.expert_width)
        self.gate = nnx.Param(normal(k_gate, into, std))
        self.up = nnx.Param(normal(k_up, into, std))
        self.down = nnx.Param(normal(k_down, (into[0], into[2], into[1]), std))
        self.dot = dot
        self.block = moe.block
        self.shard = shard

    def __call__(self, u_XD: Array, experts_XK: Array, gates_XK: Array) -> Array:
        work = functools.partial(experts_here, self.dot, self.block)
        weights = self.gate[...], self.up[...], self.down[...]
        return self.shard.experts(self.dot, work, weights, u_XD, experts_XK, gates_XK)


def experts_here(
    dot: DotRule, block: int, weights, most: int, u_XD: Array, experts_XK: Array, gates_XK: Array
) -> Array:
    """y_XD: for each token the sum over its experts, all of `weights`; see `exchange`."""
    gate_EDM, up_EDM, down_EMD = weights
    tokens, experts = u_XD.shape[0], gate_EDM.shape[0]
    if tokens < block:  # so decoding: as long as an expert's even share
        share = experts_XK.size // experts + 1
        block = min(block, -(-share // dot.least_block) * dot.least_block)
    layout = layout_of(experts_XK, experts, block, most)
    layout = jax.tree.map(functools.partial(save_as, "routing"), layout)
    x_PD = save_as("dispatch", dispatch(dot.wire, u_XD, layout))
    both_PM = dot.after_dispatch.grouped(x_PD, (gate_EDM, up_EDM), layout.expert_Z)
    gate_PM, up_PM = (save_as("swiglu_in", y_PM) for y_PM in both_PM)
    hidden_PM = Swiglu(gate_PM, up_PM, dispatch_gates(gates_XK, layout)[:, None])
    [y_PD] = dot.before_combine.grouped(hidden_PM, [down_EMD], layout.expert_Z)
    return combine(dot.gradient_wire, y_PD, layout)


class MoeFfn(nnx.Module):
    """Shared plus routed experts; returns their sum and the routing's statistics."""

    def __init__(self, key: Array, config: Model, dot: DotRule, shard: Shard = ALONE):
        k_router, k_routed, k_shared = jax.random.split(key, 3)
        moe = config.moe
        self.router = Router(k_router, config, shard)
        self.routed = RoutedExperts(k_routed, config, dot, shard)
        hidden = moe.shared_experts * moe.expert_width
        self.shared = (
            SwigluMlp(k_shared, config.width, hidden, config.init_std, dot) if hidden else None
        )

    def __call__(self, u_BTD: Array, valid_BT: Array) -> tuple[Array, Routing]:
        routing = self.router(u_BTD, valid_BT)
        return self.through(u_BTD, routing.experts_XK, routing.gates_XK), routing

    def through(self, u_BTD: Array, experts_XK: Array, gates_XK: Array) -> Array:
        """The sum for tokens that were routed; numbers from E on are no expert."""
        u_XD = u_BTD.reshape(-1, u_BTD.shape[-1])
        y_BTD = self.routed(u_XD, experts_XK, gates_XK).reshape(u_BTD.shape)
        return y_BTD if self.shared is None else y_BTD + self.shared(u_BTD)


def experts_loop(experts: RoutedExperts, u_XD: Array, experts_XK: Array, gates_XK: Array) -> Array:
    """The oracle of `RoutedExperts`: a loop over experts, every token through each, FP32."""
    u_XD = u_XD.astype(jnp.float32)
    y_XD = jnp.zeros_like(u_XD)
    for expert in range(experts.gate.shape[0]):
        hidden_XM = jax.nn.silu(u_XD @ experts.gate[expert]) * (u_XD @ experts.up[expert])
        weight_X = jnp.sum(jnp.where(experts_XK == expert, gates_XK, 0.0), axis=-1)
        y_XD += weight_X[:, None] * (hidden_XM @ experts.down[expert])
    return y_XD
