"""What the hub calls tensors: the names of DeepSeek-V3's released layout (spec §8.1).

TOP, BLOCK and MTP pair the parameters of the model with the tensors of the checkpoint; each table
is read in either direction. What differs besides the name is regular, so it is no column of them:

- The hub stores a matrix [outputs, inputs]; here it is [inputs, outputs]. Embeddings are rows both
  here and there.
- The hub has a tensor for each layer and expert; here those of a kind are stacked, [L, ...] or
  [L, E, ...]. Layers are numbered through: dense, MoE, then one for each MTP depth.
- An MTP layer carries copies of embedding and head under its own names (`copies`).
- Projections of attention and experts are released in FP8 with scales beside them, the selection
  bias in FP32, all else in BF16 (`released_dtype`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dsv3.config import Model

TOP = {
    "embedding.table": "model.embed_tokens.weight",
    "norm.gain": "model.norm.weight",
    "head.w": "lm_head.weight",
}
BLOCK = {  # below model.layers.L
    "attention_norm.gain": "input_layernorm.weight",
    "attention.q_a.w": "self_attn.q_a_proj.weight",
    "attention.q_norm.gain": "self_attn.q_a_layernorm.weight",
    "attention.q_b.w": "self_attn.q_b_proj.weight",
    "attention.kv_a.w": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.gain": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b.w": "self_attn.kv_b_proj.weight",
    "attention.o.w": "self_attn.o_proj.weight",
    "ffn_norm.gain": "post_attention_layernorm.weight",
    "ffn.gate.w": "mlp.gate_proj.weight",
    "ffn.up.w": "mlp.up_proj.weight",
    "ffn.down.w": "mlp.down_proj.weight",
    "ffn.router.w": "mlp.gate.weight",
    "ffn.router.bias": "mlp.gate.e_score_correction_bias",
    "ffn.shared.gate.w": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up.w": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down.w": "mlp.shared_experts.down_proj.weight",
    "ffn.routed.gate": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.routed.up": "mlp.experts.{expert}.up_proj.weight",
    "ffn.routed.down": "mlp.experts.{expert}.down_proj.weight",
}
DIRECT_QUERIES = {"attention.q_b.w": "self_attn.q_proj.weight"}  # without a query latent
MTP = {  # also below model.layers.L, beside the block's
    "embedding_norm.gain": "enorm.weight",
    "hidden_norm.gain": "hnorm.weight",
    "project.w": "eh_proj.weight",
    "norm.gain": "shared_head.norm.weight",
}
COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
SCALES = "_scale_inv"  # despite the name, what the weight is multiplied by
QUANTIZED = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight")
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # of old exports


class Piece(NamedTuple):
    """A tensor of the hub and where it lies in the model: `parameter[index]`, maybe transposed."""

    tensor: str
    shape: tuple[int, ...]  # of the tensor
    parameter: str  # dotted path, as `manifest.name_leaves` gives it
    index: tuple[int, ...]  # (), (layer,), (expert,) or (layer, expert)
    transposed: bool


def pieces(config: Model, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    """Every tensor that the model's parameters, given by path and shape, are made of."""
    for parameter, shape in shapes.items():
        for index, tensor in _tensors_of(config, parameter):
            rest = shape[len(index) :]
            transposed = len(rest) == 2 and parameter != "embedding.table"
            yield Piece(tensor, rest[::-1] if transposed else rest, parameter, index, transposed)


def _tensors_of(config: Model, parameter: str) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into the parameter, hub's name) of each tensor stacked in it."""
    block = BLOCK if config.mla.query_latent else BLOCK | DIRECT_QUERIES
    match parameter.split(".", maxsplit=2):
        case ["dense", *below]:
            layers, name = enumerate(range(config.dense_layers)), block[".".join(below)]
        case ["moe", *below]:
            layers = enumerate(range(config.dense_layers, config.layers))
            name = block[".".join(below)]
        case ["mtp", depth, below]:
            own = MTP | {f"block.{path}": name for path, name in block.items()}
            layers, name = [(None, config.layers + int(depth))], own[below]
        case _:
            yield (), TOP[parameter]
            return
    for row, layer in layers:
        index = () if row is None else (row,)
        experts = range(config.moe.routed_experts) if "{expert}" in name else [None]
        for expert in experts:
            full = f"model.layers.{layer}.{name.format(expert=expert)}"
            yield index if expert is None else (*index, expert), full


def copies(config: Model) -> dict[str, str]:
    """Names under which MTP layers may repeat a tensor of the main model, and that tensor's."""
    layers = range(config.layers, config.layers + config.mtp_depths)
    return {f"model.layers.{i}.{name}": main for i in layers for name, main in COPIES.items()}


def in_mtp_layer(config: Model, tensor: str) -> bool:
    """Whether the tensor lies behind the main model's layers."""
    return config.layers <= layer_of(tensor) < math.inf


def layer_of(tensor: str) -> float:
    """The number of the layer that it belongs to; -1 for the embedding, inf for norm and head."""
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(layer[1]) if layer else -1 if "embed_tokens" in tensor else math.inf


def scale_of(tensor: str) -> str:
    """The name of the scales beside a weight in FP8."""
    return f"{tensor}{SCALES}"


def released_dtype(tensor: str) -> str:
    """The precision of a tensor in the released checkpoint, as safetensors writes it."""
    if QUANTIZED.fullmatch(tensor):
        return "F8_E4M3"
    return "F32" if tensor.endswith("e_score_correction_bias") else "BF16"
