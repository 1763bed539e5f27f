"""The model's forward pass over a latent cache.

    begin     the prompt: all its tokens at once, attention in expanded form as in training, what a
              cache holds written from position 0 on
    extend    T more tokens of every sequence, each at its own position: attention in absorbed form
              over the cache. T is 1, or 1 + drafts where some are verified
    propose   an MTP module over a window of positions, likewise

All are pure functions of (model, cache, tokens) with the sequences as leading axis; positions lie
within the cache. The layers are scanned with the whole cache in the carry, which is then updated
where it is.

**One row counts like many.** Matrix products of one row take another path on CPUs than those of
several, and round differently; a token decoded alone and the same token verified beside a draft
would then differ in the last bit, and a tie might break otherwise. So at least MIN_ROWS rows go
through every product: copies of the first sequences fill up, which asks for no other expert. They
do not attend: their share is copied as well.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from dsv3.inference.absorbed import OVER
from dsv3.inference.cache import LatentCache
from dsv3.model.block import Block
from dsv3.model.mla import Mla
from dsv3.model.rope import rotation, softmax_scale
from dsv3.model.transformer import Transformer

MIN_ROWS = 4
Attend = Callable[[Mla, Array, LatentCache, Array | int], tuple[Array, LatentCache]]


def begin(
    model: Transformer, cache: LatentCache, tokens_BP: Array, drafts: int
) -> tuple[Array, LatentCache]:
    """h_BPD behind the final norm, and the cache with the main model's and the first `drafts` MTP
    modules' positions 0 to P - 1 (module k's last k of them are void)."""
    attend = _expanded(rotation(model.config.mla, jnp.arange(tokens_BP.shape[1])))
    h_BPD, cache = _main(model, model.embedding(tokens_BP, cache.dtype), cache, attend)
    through_BPD = h_BPD
    for depth in range(1, drafts + 1):
        ahead_BP = jnp.pad(tokens_BP[:, depth:], ((0, 0), (0, depth)))
        through_BPD, cache = _module(model, depth, through_BPD, ahead_BP, cache, attend)
    return h_BPD, cache


def extend(
    model: Transformer, cache: LatentCache, tokens_BT: Array, position_BT: Array
) -> tuple[Array, LatentCache]:
    """h_BTD behind the final norm for tokens at `position_BT`, and the cache with them."""
    sequences, row_B = _filled(tokens_BT.shape)
    attend = _absorbed(model, position_BT, row_B)
    x_BTD = model.embedding(tokens_BT[row_B], cache.dtype)
    h_BTD, cache = _main(model, x_BTD, cache, attend)
    return h_BTD[:sequences], cache


def propose(
    model: Transformer, depth: int, cache: LatentCache, h_BWD: Array, ahead_BW: Array,
    position_BW: Array,
) -> tuple[Array, LatentCache]:  # fmt: skip
    """h^depth_BWD before its norm, from h^(depth-1) and the tokens `depth` ahead."""
    sequences, row_B = _filled(ahead_BW.shape)
    attend = _absorbed(model, position_BW, row_B)
    h_BWD, cache = _module(model, depth, h_BWD[row_B], ahead_BW[row_B], cache, attend)
    return h_BWD[:sequences], cache


def logits(model: Transformer, h_BTD: Array, vocab: int) -> Array:
    """float32 [B, T, vocab] by the head, in FP32; ids from `vocab` on are padding."""
    sequences, row_B = _filled(h_BTD.shape[:2])
    return model.head(h_BTD[row_B].astype(jnp.float32))[:sequences, :, :vocab]


def _filled(shape: tuple[int, ...]) -> tuple[int, Array]:
    """B, and the sequence that each of B or more takes so that there are MIN_ROWS rows."""
    sequences, width = shape
    rows = max(sequences, -(-MIN_ROWS // width))
    return sequences, jnp.arange(rows) % sequences


def _main(
    model: Transformer, x_BTD: Array, cache: LatentCache, attend: Attend
) -> tuple[Array, LatentCache]:
    def body(carry: tuple[Array, LatentCache], layer: tuple[Block, Array]):
        return _block(*layer, *carry, attend=attend), None

    dense, layers = model.config.dense_layers, model.config.layers
    for blocks, numbers in (
        (model.dense, jnp.arange(dense)),
        (model.moe, jnp.arange(dense, layers)),
    ):
        if blocks is not None:
            (x_BTD, cache), _ = lax.scan(body, (x_BTD, cache), (blocks, numbers))
    return model.norm(x_BTD), cache


def _module(
    model: Transformer, depth: int, h_BTD: Array, ahead_BT: Array, cache: LatentCache,
    attend: Attend,
) -> tuple[Array, LatentCache]:  # fmt: skip
    module = model.mtp[depth - 1]
    x_BTD = module.join(h_BTD, model.embedding(ahead_BT, h_BTD.dtype))
    return _block(module.block, model.config.layers + depth - 1, x_BTD, cache, attend=attend)


def _block(
    block: Block, layer: Array | int, x_BTD: Array, cache: LatentCache, *, attend: Attend
) -> tuple[Array, LatentCache]:
    u_BTD, cache = attend(block.attention, block.attention_norm(x_BTD), cache, layer)
    x_BTD, _ = block.feed_forward(x_BTD + u_BTD, jnp.ones(x_BTD.shape[:2], bool))
    return x_BTD, cache


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
