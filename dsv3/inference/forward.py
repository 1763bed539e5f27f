"""The model's forward pass over a latent cache.

    begin     the prompt: all its tokens at once, attention in expanded form as in training, what a
              cache holds written from position 0 on
    extend    T more tokens of every sequence, each at its own position: attention in absorbed form
              over the cache. T is 1, or 1 + drafts where some are verified
    propose   an MTP module over a window of positions, likewise

All are pure functions of (model, cache, tokens) with the sequences as leading axis; positions lie
within the cache. The layers are scanned with the whole cache in the carry, which is then updated
where it is. On a mesh each is what one device does with its sequences, as `model.shard` says.

What came of it besides is which experts the tokens chose. Tokens that are not `live`, padding and
rows that ended, go to none: they cost nothing behind the router and load no device.

**One row counts like many.** Matrix products of one row take another path on CPUs than those of
several, and round differently; a token decoded alone and the same token verified beside a draft
would then differ in the last bit, and a tie might break otherwise. So at least MIN_ROWS rows go
through every product: copies of the first sequences fill up, which asks for no other expert. They
do not attend: their share is copied as well.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from dsv3.inference.absorbed import OVER
from dsv3.inference.cache import LatentCache
from dsv3.model.block import Block
from dsv3.model.mla import Mla
from dsv3.model.moe import MoeFfn
from dsv3.model.rope import rotation, softmax_scale
from dsv3.model.transformer import Transformer

MIN_ROWS = 4
Carry = tuple[Array, LatentCache]
Attend = Callable[[Mla, Array, LatentCache, Array | int], Carry]


class Passed(NamedTuple):
    """What a pass leaves: states behind the final norm, or before a module's own; the cache; and
    for each MoE layer that was passed the experts chosen, int32."""

    h_BTD: Array
    cache: LatentCache
    experts_LBTK: Array


def begin(
    model: Transformer, cache: LatentCache, tokens_BP: Array, live_BP: Array, drafts: int
) -> Passed:
    """Positions 0 to P - 1 of the main model and of the first `drafts` MTP modules, whose experts
    come behind; module k's last k positions are void."""
    attend = _expanded(rotation(model.config.mla, jnp.arange(tokens_BP.shape[1])))
    x_BPD = model.embedding(tokens_BP, cache.dtype)
    h_BPD, cache, experts_LBPK = _main(model, x_BPD, cache, live_BP, attend)
    through_BPD, experts = h_BPD, [experts_LBPK]
    for depth in range(1, drafts + 1):
        ahead_BP = jnp.pad(tokens_BP[:, depth:], ((0, 0), (0, depth)))
        through_BPD, cache, experts_1BPK = _module(
            model, depth, through_BPD, ahead_BP, cache, live_BP, attend
        )
        experts.append(experts_1BPK)
    return Passed(h_BPD, cache, jnp.concatenate(experts))


def extend(
    model: Transformer, cache: LatentCache, tokens_BT: Array, position_BT: Array, live_BT: Array
) -> Passed:
    """T tokens at `position_BT`, through the main model."""
    sequences, row_B = _filled(tokens_BT.shape)
    attend = _absorbed(model, position_BT, row_B)
    x_BTD = model.embedding(tokens_BT[row_B], cache.dtype)
    return _unfilled(sequences, _main(model, x_BTD, cache, live_BT[row_B], attend))


def propose(
    model: Transformer, depth: int, cache: LatentCache, h_BWD: Array, ahead_BW: Array,
    position_BW: Array, live_BW: Array,
) -> Passed:  # fmt: skip
    """h^depth_BWD from h^(depth-1) and the tokens `depth` ahead."""
    sequences, row_B = _filled(ahead_BW.shape)
    attend = _absorbed(model, position_BW, row_B)
    return _unfilled(sequences, _module(
        model, depth, h_BWD[row_B], ahead_BW[row_B], cache, live_BW[row_B], attend
    ))  # fmt: skip


def logits(model: Transformer, h_BTD: Array, vocab: int) -> Array:
    """float32 [B, T, vocab] by the head, in FP32; ids from `vocab` on are padding."""
    sequences, row_B = _filled(h_BTD.shape[:2])
    return model.head(h_BTD[row_B].astype(jnp.float32))[:sequences, :, :vocab]


def _filled(shape: tuple[int, ...]) -> tuple[int, Array]:
    """B, and the sequence that each of B or more takes so that there are MIN_ROWS rows."""
    sequences, width = shape
    rows = max(sequences, -(-MIN_ROWS // width))
    return sequences, jnp.arange(rows) % sequences


def _unfilled(sequences: int, passed: Passed) -> Passed:
    return Passed(passed.h_BTD[:sequences], passed.cache, passed.experts_LBTK[:, :sequences])


def _main(
    model: Transformer, x_BTD: Array, cache: LatentCache, live_BT: Array, attend: Attend
) -> Passed:
    dense, layers = model.config.dense_layers, model.config.layers
    experts_LBTK = jnp.zeros((0, *live_BT.shape, model.config.moe.experts_per_token), jnp.int32)
    for stack, blocks, numbers in (
        ("dense.", model.dense, jnp.arange(dense)),
        ("moe.", model.moe, jnp.arange(dense, layers)),
    ):
        if blocks is None:
            continue

        def body(carry: Carry, layer: tuple[Block, Array], stack: str = stack):
            block, number = layer
            return _block(model.shard.layer(stack, block), number, carry, live_BT, attend)

        (x_BTD, cache), found = lax.scan(body, (x_BTD, cache), (blocks, numbers))
        experts_LBTK = experts_LBTK if found is None else found
    return Passed(model.norm(x_BTD), cache, experts_LBTK)


def _module(
    model: Transformer, depth: int, h_BTD: Array, ahead_BT: Array, cache: LatentCache,
    live_BT: Array, attend: Attend,
) -> Passed:  # fmt: skip
    module, layer = model.mtp[depth - 1], model.config.layers + depth - 1
    x_BTD = module.join(h_BTD, model.embedding(ahead_BT, h_BTD.dtype))
    (x_BTD, cache), experts_BTK = _block(module.block, layer, (x_BTD, cache), live_BT, attend)
    assert experts_BTK is not None  # a module has experts
    return Passed(x_BTD, cache, experts_BTK[None])


def _block(
    block: Block, layer: Array | int, carry: Carry, live_BT: Array, attend: Attend
) -> tuple[Carry, Array | None]:
    """`Block` over a cache, and the experts that it chose."""
    x_BTD, cache = carry
    u_BTD, cache = attend(block.attention, block.attention_norm(x_BTD), cache, layer)
    x_BTD = x_BTD + u_BTD
    u_BTD = block.ffn_norm(x_BTD)
    if not isinstance(block.ffn, MoeFfn):
        return (x_BTD + block.ffn(u_BTD), cache), None
    experts_XK, gates_XK, *_ = block.ffn.router(u_BTD, live_BT)
    nowhere = block.ffn.router.config.routed_experts
    sent_XK = jnp.where(live_BT.reshape(-1, 1), experts_XK, nowhere)
    x_BTD = x_BTD + block.ffn.through(u_BTD, sent_XK, gates_XK)
    return (x_BTD, cache), experts_XK.reshape(*live_BT.shape, -1)


def _expanded(turn: tuple[Array, Array]) -> Attend:
    def attend(mla: Mla, h_BPD: Array, cache: LatentCache, layer: Array | int):
        q_BPNW, c_BPC, k_rope_BPR = mla.project(h_BPD, turn)
        u_BPD = mla.output(mla.attend(q_BPNW, c_BPC, k_rope_BPR))
        return u_BPD, cache.begin(layer, c_BPC, k_rope_BPR)

    return attend


def _absorbed(model: Transformer, position_BT: Array, row_B: Array) -> Attend:
    turn = rotation(model.config.mla, position_BT[row_B])
    scale, sequences = softmax_scale(model.config.mla), position_BT.shape[0]
    over = OVER[model.config.mla.decoding]

    def attend(mla: Mla, h_BTD: Array, cache: LatentCache, layer: Array | int):
        q_BTNW, c_BTC, k_rope_BTR = mla.project(h_BTD, turn)
        cache = cache.write(layer, row_B, position_BT[row_B], c_BTC, k_rope_BTR)
        q_BTNC, q_BTNR = mla.absorb(q_BTNW)

        z_BTNC = over(q_BTNC[:sequences], q_BTNR[:sequences], cache, layer, position_BT, scale)
        return mla.output(mla.values(z_BTNC[row_B])), cache

    return attend
