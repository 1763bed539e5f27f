"""What follows from a model's configuration alone: parameters, cache and arithmetic (§1.1, §4.2).

Everything learnable is counted, and the router bias, which is stored with it. `parameters` is what
a model holds, `activated` what one token passes through: the same parts with `experts_per_token`
routed experts in place of all. An MTP module counts what is its own; the embedding and the head
that it shares are counted once, and once more as `mtp_copies`, since the released checkpoint
stores them with every depth.

Arithmetic is the model's, not the machine's: rows that pad experts to blocks and activations that
are recomputed add nothing to it.
"""

from typing import NamedTuple

from dsv3.config import Model


class Parameters(NamedTuple):
    """Numbers of parameters by part; `attention` includes all norms of a block."""

    embedding: int
    attention: int
    dense: int  # feed-forward networks of the dense layers
    router: int
    routed: int
    shared: int
    norm: int  # in front of the head
    head: int
    mtp: int  # all MTP modules, without embedding and head
    mtp_copies: int  # of embedding and head

    @property
    def main(self) -> int:
        """The model without MTP: 671B."""
        return sum(self[: self._fields.index("mtp")])

    @property
    def total(self) -> int:
        """What `Transformer` holds: embedding and head once."""
        return self.main + self.mtp


def parameters(model: Model) -> Parameters:
    """All that is stored."""
    return _parameters(model, model.moe.routed_experts)


def activated(model: Model) -> Parameters:
    """What one token passes through: 37B."""
    return _parameters(model, model.moe.experts_per_token)


def _parameters(model: Model, routed_experts: int) -> Parameters:
    moe, width = model.moe, model.width
    expert = 3 * width * moe.expert_width
    router = width * moe.routed_experts + moe.routed_experts
    attention = _attention(model) + 2 * width
    table = model.vocab * width
    project = 2 * width * width
    module = (
        attention + router + (routed_experts + moe.shared_experts) * expert + project + 3 * width
    )
    return Parameters(
        embedding=table,
        attention=model.layers * attention,
        dense=model.dense_layers * 3 * width * model.dense_width,
        router=model.moe_layers * router,
        routed=model.moe_layers * routed_experts * expert,
        shared=model.moe_layers * moe.shared_experts * expert,
        norm=width,
        head=table,
        mtp=model.mtp_depths * module,
        mtp_copies=model.mtp_depths * 2 * table,
    )


def _attention(model: Model) -> int:
    """MLA of one layer with the norms of its latents."""
    mla = model.mla
    query = mla.heads * (mla.nope_dim + mla.rope_dim)
    queries = model.width * query
    if mla.query_latent is not None:
        queries = mla.query_latent * (model.width + 1 + query)
    keys_values = mla.kv_latent * (1 + mla.heads * (mla.nope_dim + mla.value_dim))
    compress = model.width * (mla.kv_latent + mla.rope_dim)
    return queries + compress + keys_values + mla.heads * mla.value_dim * model.width


def cache_elements(model: Model, drafts: int = 0) -> int:
    """Numbers cached for a token at inference: latent and rope key of every main layer, and of the
    MTP modules that draft."""
    return (model.layers + drafts) * (model.mla.kv_latent + model.mla.rope_dim)


def cache_bytes(model: Model, bytes_each: int = 2, drafts: int = 0) -> int:
    """Bytes cached for a token, in BF16 unless told otherwise."""
    return bytes_each * cache_elements(model, drafts)


def fp8_cache_bytes(model: Model, drafts: int = 0) -> int:
    """Bytes that the FP8 cache takes for a token: a latent's E4M3 numbers, an FP32 scale for every
    128 of them, the rope key in BF16. 656 a layer for V3."""
    mla = model.mla
    one = mla.kv_latent + 4 * -(-mla.kv_latent // 128) + 2 * mla.rope_dim
    return (model.layers + drafts) * one


def training_flops(model: Model, sequence_length: int) -> float:
    """Floating-point operations of training on one token, forward and backward:

        6 · (P + layers · N (H + R + U) · (T + 1) / 2)

    P are the activated parameters but for the embedding table, which is looked up; the head counts
    again for every MTP depth, which also is a layer. (T + 1) / 2 positions are visible to a query
    in the mean. A multiplication and an addition are 2, and the backward pass is twice the forward.
    """
    run = activated(model)
    multiplied = run.total - run.embedding + model.mtp_depths * run.head
    return 6.0 * multiplied + attention_flops(model, sequence_length)


def attention_flops(model: Model, sequence_length: int) -> float:
    """The part of `training_flops` that is core attention, the second summand."""
    mla, layers = model.mla, model.layers + model.mtp_depths
    pair = mla.heads * (mla.nope_dim + mla.rope_dim + mla.value_dim)
    return 6.0 * layers * pair * (sequence_length + 1) / 2
