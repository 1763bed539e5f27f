"""One transformer block: pre-norm MLA, then pre-norm FFN (§2.1, Fig. 2)."""

import jax
from flax import nnx
from jax import Array

from dsv3.config import Model
from dsv3.model.layers import RMSNorm, SwigluMlp, save_as
from dsv3.model.mla import Mla
from dsv3.model.moe import MoeFfn
from dsv3.model.router import Routing
from dsv3.numerics.rule import DotRule
from dsv3.parallel.shard import ALONE, Shard


class Block(nnx.Module):
    """x + MLA(norm x), then + FFN(norm x); the FFN is dense or DeepSeekMoE."""

    def __init__(
        self, key: Array, config: Model, dot: DotRule, shard: Shard = ALONE, *, routed: bool
    ):
        k_attention, k_ffn = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Mla(k_attention, config, dot)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        if routed:
            self.ffn = MoeFfn(k_ffn, config, dot, shard)
        else:
            self.ffn = SwigluMlp(k_ffn, config.width, config.dense_width, config.init_std, dot)

    def __call__(
        self, x_BTD: Array, rotation: tuple[Array, Array], valid_BT: Array
    ) -> tuple[Array, Routing | None]:
        """The block's output and, where it has experts, their routing."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation)
        u_BTD = self.ffn_norm(save_as("residual", x_BTD))
        if isinstance(self.ffn, MoeFfn):
            y_BTD, routing = self.ffn(u_BTD, valid_BT)
        else:
            y_BTD, routing = self.ffn(u_BTD), None
        return x_BTD + y_BTD, routing
