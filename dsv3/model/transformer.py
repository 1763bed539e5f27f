"""DeepSeek-V3 as a whole (§2, Fig. 2 and 3).

    x = Emb(tokens);  dense blocks;  MoE blocks;  h = norm(x);  logits = Head(h);  then MTP on h

Blocks of a kind are stacked along a leading layer axis and run by `lax.scan`, so the program is as
long as one block. A scan body returns activations and statistics, never parameters. Statistics are
returned, not collected on the side: one row of expert counts for each MoE layer, then one for each
MTP depth.

What the backward pass keeps is a policy over named activations (`remat`), applied to each block.
'report' is §3.2.3: norms, MLA up-projections and the SwiGLU product are recomputed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from dsv3.config import Model
from dsv3.model.block import Block
from dsv3.model.layers import Embedding, Linear, RMSNorm
from dsv3.model.mtp import MtpModule, tokens_ahead, valid_at
from dsv3.model.rope import rotation
from dsv3.model.router import Routing
from dsv3.numerics import dot
from dsv3.parallel.shard import ALONE, Shard


def remat(policy: str, block: Callable, kept: tuple[str, ...]) -> Callable:
    """`block` under a rematerialisation policy; `kept` names what the dot rule wants cached."""
    if policy == "none":
        return block
    names = ("latent", "residual", "routing", *kept) if policy == "report" else ()
    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(*names))


class Stats(NamedTuple):
    """What the routers report; rows are the MoE layers in order, then the MTP depths."""

    counts_LE: Array  # int32 [L_moe + J, E]: valid tokens sent to each expert
    balance_loss: Array  # float32 scalar, summed over rows


class Hidden(NamedTuple):
    """Normed states in front of the head: the main model's and one for each MTP depth."""

    main_BTD: Array
    mtp: tuple[Array, ...]
    stats: Stats


class Output(NamedTuple):
    logits_BTV: Array  # position i scores t_{i+1}
    mtp_logits: tuple[Array, ...]  # depth k, position i scores t_{i+k+1}; the last k are void
    stats: Stats


class Transformer(nnx.Module):
    """Built from a key; called with int32 tokens [B, T]: the batch, or a `shard`'s part of it."""

    def __init__(self, key: Array, config: Model, shard: Shard = ALONE):
        keys = jax.random.split(key, 5)
        rule = dot.build(config.dot)
        std = config.init_std
        self.embedding = Embedding(keys[0], config.vocab, config.width, std)
        self.dense = stack(keys[1], config.dense_layers, config, rule, shard, routed=False)
        self.moe = stack(keys[2], config.moe_layers, config, rule, shard, routed=True)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(keys[3], config.width, config.vocab, std, dot.PlainDot())
        mtp_keys = jax.random.split(keys[4], max(config.mtp_depths, 1))[: config.mtp_depths]
        self.mtp = nnx.List([MtpModule(k, config, rule, shard) for k in mtp_keys])
        self.config = config
        self.shard = shard

    def __call__(
        self, tokens_BT: Array, valid_BT: Array | None = None, dtype: jnp.dtype | None = None
    ) -> Output:
        """Logits for every position, in `dtype` (default: the parameters').

        `valid_BT` (bool) marks real tokens; padding must follow them. It keeps padding out of the
        statistics; causality already keeps it out of the logits before it.
        """
        hidden = self.hidden(tokens_BT, valid_BT, dtype)
        mtp_logits = tuple(self.head(h_BTD) for h_BTD in hidden.mtp)
        return Output(self.head(hidden.main_BTD), mtp_logits, hidden.stats)

    def hidden(
        self, tokens_BT: Array, valid_BT: Array | None = None, dtype: jnp.dtype | None = None
    ) -> Hidden:
        """Everything but the head."""
        if valid_BT is None:
            valid_BT = jnp.ones(tokens_BT.shape, bool)
        turn = rotation(self.config.mla, jnp.arange(tokens_BT.shape[1]))
        x_BTD = self.embedding(tokens_BT, dtype)
        x_BTD, _ = self._run("dense.", self.dense, x_BTD, turn, valid_BT)
        x_BTD, routing = self._run("moe.", self.moe, x_BTD, turn, valid_BT)
        main_BTD = self.norm(x_BTD)
        mtp, mtp_routing = self._mtp(main_BTD, tokens_BT, turn, valid_BT)
        return Hidden(main_BTD, mtp, self._stats([routing, *mtp_routing]))

    def _run(self, name: str, blocks: Block | None, x_BTD: Array, turn, valid_BT: Array):
        if blocks is None:
            return x_BTD, None

        def body(x_BTD, block):
            return self.shard.layer(name, block)(x_BTD, turn, valid_BT)

        return lax.scan(self._remat(body), x_BTD, blocks)

    def _remat(self, block: Callable) -> Callable:
        return remat(self.config.remat, block, dot.build(self.config.dot).kept)

    def _mtp(self, h_BTD: Array, tokens_BT: Array, turn, valid_BT: Array):
        states, routings = [], []
        for depth, module in enumerate(self.mtp, start=1):
            ahead_BTD = self.embedding(tokens_ahead(tokens_BT, depth), h_BTD.dtype)
            body = self._remat(lambda m, *args: m(*args))
            h_BTD, routing = body(module, h_BTD, ahead_BTD, turn, valid_at(valid_BT, depth))
            states.append(module.norm(h_BTD))
            routings.append(jax.tree.map(lambda leaf: leaf[None], routing))
        return tuple(states), routings

    def _stats(self, routings: list[Routing | None]) -> Stats:
        found = [r for r in routings if r is not None]
        if not found:
            no_layer = (0, self.config.moe.routed_experts)
            return Stats(jnp.zeros(no_layer, jnp.int32), jnp.zeros((), jnp.float32))
        counts_LE = jnp.concatenate([r.counts_E for r in found])
        losses = [jnp.sum(r.balance_loss) for r in found]
        return Stats(counts_LE, jnp.stack(losses).sum())


def stack(
    key: Array, layers: int, config: Model, rule, shard: Shard = ALONE, *, routed: bool
) -> Block | None:
    """`layers` blocks with a leading layer axis on every parameter; None for no layer."""
    if layers == 0:
        return None
    make = jax.vmap(lambda k: Block(k, config, rule, shard, routed=routed))
    return make(jax.random.split(key, layers))
