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

**A token comes out the same beside any others.** On CPUs the number of rows in a product decides
how it is blocked, and so how its sums round. A token decoded alone and the same token verified
beside a draft would differ in the last bit, and a tie might break otherwise; in BF16 near ties are
many. Products of MIN_ROWS to MAX_ROWS rows were found to round alike. So fewer tokens than that are
filled up with copies of the first sequences, which asks for no other expert, and more are done one
position of all sequences after the other, which are the very products of plain decoding. This is
for all that is done with each token on its own; attention multiplies position by position anyway.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.inference.absorbed import OVER
from dsv3.inference.cache import LatentCache
from dsv3.model.block import Block
from dsv3.model.mla import Mla
from dsv3.model.moe import MoeFfn
from dsv3.model.rope import rotation, softmax_scale
from dsv3.model.transformer import Transformer

MIN_ROWS, MAX_ROWS = 4, 32
Carry = tuple[Array, LatentCache]


class Way(NamedTuple):
    """How a block meets the cache: attend(mla, h, cache, layer), and each(function, *parts) for
    what is done with every token on its own."""

    attend: Callable[[Mla, Array, LatentCache, Array | int], Carry]
    each: Callable[..., Any]


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
    way = _expanded(rotation(model.config.mla, jnp.arange(tokens_BP.shape[1])))
    x_BPD = model.embedding(tokens_BP, cache.dtype)
    h_BPD, cache, experts_LBPK = _main(model, x_BPD, cache, live_BP, way)
    through_BPD, experts = h_BPD, [experts_LBPK]
    for depth in range(1, drafts + 1):
        ahead_BP = jnp.pad(tokens_BP[:, depth:], ((0, 0), (0, depth)))
        through_BPD, cache, experts_1BPK = _module(
            model, depth, through_BPD, ahead_BP, cache, live_BP, way
        )
        experts.append(experts_1BPK)
    return Passed(h_BPD, cache, jnp.concatenate(experts))


def extend(
    model: Transformer, cache: LatentCache, tokens_BT: Array, position_BT: Array, live_BT: Array
) -> Passed:
    """T tokens at `position_BT`, through the main model."""
    x_BTD = model.embedding(tokens_BT, cache.dtype)
    return _main(model, x_BTD, cache, live_BT, _absorbed(model, position_BT))


def propose(
    model: Transformer, depth: int, cache: LatentCache, h_BWD: Array, ahead_BW: Array,
    position_BW: Array, live_BW: Array,
) -> Passed:  # fmt: skip
    """h^depth_BWD from h^(depth-1) and the tokens `depth` ahead."""
    way = _absorbed(model, position_BW)
    return _module(model, depth, h_BWD, ahead_BW, cache, live_BW, way)


def logits(model: Transformer, h_BTD: Array, vocab: int) -> Array:
    """float32 [B, T, vocab] by the head, in FP32; ids from `vocab` on are padding."""
    return each_token(lambda h_BTD: model.head(h_BTD.astype(jnp.float32)), h_BTD)[:, :, :vocab]


def each_token(function: Callable[..., Any], *parts_BT: Array) -> Any:
    """`function` of arrays [B, T, ...], which treats every token on its own; see above."""
    alike = functools.partial(_alike, function)
    return lax.platform_dependent(*parts_BT, cpu=alike, default=function)


def _alike(function: Callable[..., Any], *parts_BT: Array) -> Any:
    sequences, width = parts_BT[0].shape[:2]
    if sequences * width <= MAX_ROWS:
        rows = max(sequences, -(-MIN_ROWS // width))
        filled = [jnp.resize(x, (rows, *x.shape[1:])) for x in parts_BT]
        return jax.tree.map(lambda y: y[:sequences], function(*filled))
    apart = [x.swapaxes(0, 1)[:, :, None] for x in parts_BT]
    done = lax.map(lambda position: function(*position), apart)
    return jax.tree.map(lambda y: y[:, :, 0].swapaxes(0, 1), done)


def _main(model: Transformer, x_BTD: Array, cache: LatentCache, live_BT: Array, way: Way) -> Passed:
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
            return _block(model.shard.layer(stack, block), number, carry, live_BT, way)

        (x_BTD, cache), found = lax.scan(body, (x_BTD, cache), (blocks, numbers))
        experts_LBTK = experts_LBTK if found is None else found
    return Passed(model.norm(x_BTD), cache, experts_LBTK)


def _module(
    model: Transformer, depth: int, h_BTD: Array, ahead_BT: Array, cache: LatentCache,
    live_BT: Array, way: Way,
) -> Passed:  # fmt: skip
    module, layer = model.mtp[depth - 1], model.config.layers + depth - 1
    x_BTD = module.join(h_BTD, model.embedding(ahead_BT, h_BTD.dtype))
    (x_BTD, cache), experts_BTK = _block(module.block, layer, (x_BTD, cache), live_BT, way)
    assert experts_BTK is not None  # a module has experts
    return Passed(x_BTD, cache, experts_BTK[None])


def _block(
    block: Block, layer: Array | int, carry: Carry, live_BT: Array, way: Way
) -> tuple[Carry, Array | None]:
    """`Block` over a cache, and the experts that it chose."""
    x_BTD, cache = carry
    u_BTD, cache = way.attend(block.attention, block.attention_norm(x_BTD), cache, layer)
    x_BTD = x_BTD + u_BTD
    ffn = block.ffn
    if not isinstance(ffn, MoeFfn):
        return (x_BTD + way.each(ffn, block.ffn_norm(x_BTD)), cache), None

    def fed(u_BTD: Array, live_BT: Array) -> tuple[Array, Array]:
        experts_XK, gates_XK, *_ = ffn.router(u_BTD, live_BT)
        nowhere = ffn.router.config.routed_experts
        sent_XK = jnp.where(live_BT.reshape(-1, 1), experts_XK, nowhere)
        y_BTD = ffn.through(u_BTD, sent_XK, gates_XK)
        return y_BTD, experts_XK.reshape(*live_BT.shape, -1)

    y_BTD, experts_BTK = way.each(fed, block.ffn_norm(x_BTD), live_BT)
    return (x_BTD + y_BTD, cache), experts_BTK


def _expanded(turn: tuple[Array, Array]) -> Way:
    """A prompt from position 0 on."""

    def attend(mla: Mla, h_BPD: Array, cache: LatentCache, layer: Array | int) -> Carry:
        q_BPNW, c_BPC, k_rope_BPR = mla.project(h_BPD, turn)
        u_BPD = mla.output(mla.attend(q_BPNW, c_BPC, k_rope_BPR))
        return u_BPD, cache.begin(layer, c_BPC, k_rope_BPR)

    return Way(attend, lambda function, *parts: function(*parts))


def _absorbed(model: Transformer, position_BT: Array) -> Way:
    """Tokens at `position_BT` and all that is cached before them."""
    turn = rotation(model.config.mla, position_BT)
    scale, row_B = softmax_scale(model.config.mla), jnp.arange(position_BT.shape[0])
    over = OVER[model.config.mla.decoding]

    def attend(mla: Mla, h_BTD: Array, cache: LatentCache, layer: Array | int) -> Carry:
        def before(h_BTD: Array, cos: Array, sin: Array) -> tuple[Array, ...]:
            q_BTNW, c_BTC, k_rope_BTR = mla.project(h_BTD, (cos, sin))
            return *mla.absorb(q_BTNW), c_BTC, k_rope_BTR

        q_BTNC, q_BTNR, c_BTC, k_rope_BTR = each_token(before, h_BTD, *turn)
        cache = cache.write(layer, row_B, position_BT, c_BTC, k_rope_BTR)
        z_BTNC = over(q_BTNC, q_BTNR, cache, layer, position_BT, scale)
        return each_token(lambda z_BTNC: mla.output(mla.values(z_BTNC)), z_BTNC), cache

    return Way(attend, each_token)
