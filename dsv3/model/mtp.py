"""Multi-token prediction (§2.2, Eq. 21-25).

Depth k has its own block and projection, and shares embedding and head with the main model:

    h'^k_i = M_k [ norm(Emb(t_{i+k})) ; norm(h^{k-1}_i) ]                                   (21)
    h^k    = Block_k(h'^k)                 causal over positions, so the full chain is kept (22)
    P^k_{i+k+1} = softmax(Head(norm_k(h^k_i)))       position i predicts t_{i+k+1}          (23)

The embedding comes first, as the released `eh_proj` wants it (Eq. 21 prints the other order).
h^0 is the main model's hidden state after its final norm, as vLLM and Megatron feed the released
weights; between depths the state travels before `norm`, the depth's own norm in front of the head.
Depth k exists for positions i < T - k only: it reads t_{i+k}. The other positions are computed, for
an even shape, but masked from the loss, the expert counts and the balance loss; being at the tail
they influence no position before them.

Embedding and head are passed in as arguments: nothing is shared by reference.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3.config import Model
from dsv3.model.block import Block
from dsv3.model.layers import Linear, RMSNorm
from dsv3.model.router import Routing
from dsv3.numerics.dot import PlainDot
from dsv3.numerics.rule import DotRule
from dsv3.parallel.shard import ALONE, Shard


class MtpModule(nnx.Module):
    """One depth: h^k_BTD from h^{k-1}_BTD and the embeddings of the tokens k ahead."""

    def __init__(self, key: Array, config: Model, dot: DotRule, shard: Shard = ALONE):
        k_project, k_block = jax.random.split(key)
        self.embedding_norm = RMSNorm(config.width, config.norm_eps)
        self.hidden_norm = RMSNorm(config.width, config.norm_eps)
        high = PlainDot()  # stays BF16 in the released checkpoint
        self.project = Linear(k_project, 2 * config.width, config.width, config.init_std, high)
        self.block = Block(k_block, config, dot, shard, routed=True)
        self.norm = RMSNorm(config.width, config.norm_eps)

    def __call__(
        self, h_BTD: Array, ahead_BTD: Array, rotation: tuple[Array, Array], valid_BT: Array
    ) -> tuple[Array, Routing | None]:
        return self.block(self.join(h_BTD, ahead_BTD), rotation, valid_BT)

    def join(self, h_BTD: Array, ahead_BTD: Array) -> Array:
        """h'^k_BTD, what the block works on (Eq. 21)."""
        parts = [self.embedding_norm(ahead_BTD), self.hidden_norm(h_BTD)]
        return self.project(jnp.concatenate(parts, axis=-1))


def tokens_ahead(tokens_BT: Array, depth: int) -> Array:
    """t_{i+depth} at position i, 0 where there is none: int32 [B, T]."""
    return jnp.pad(tokens_BT[:, depth:], ((0, 0), (0, depth)))


def valid_at(valid_BT: Array, depth: int) -> Array:
    """Positions i < T - depth whose token and token `depth` ahead are both valid: bool [B, T]."""
    return valid_BT & jnp.pad(valid_BT[:, depth:], ((0, 0), (0, depth)))
