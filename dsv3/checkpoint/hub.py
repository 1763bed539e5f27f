"""What the hub calls things: the names of DeepSeek-V3's released layout (spec §8.1, 8.2).

Two tables say it, and each is read in either direction: FIELDS pairs the fields of `config.Model`
with those of config.json, and TOP, BLOCK and MTP pair the parameters of the model with the tensors
of the checkpoint. What differs besides the name is regular, so it is no column of the tables:

- The hub stores a matrix [outputs, inputs]; here it is [inputs, outputs]. Embeddings are rows both
  here and there.
- The hub has a tensor for each layer and expert; here those of a kind are stacked, [L, ...] or
  [L, E, ...]. Layers are numbered through: dense, MoE, then one for each MTP depth.
- An MTP layer carries copies of embedding and head under its own names (`copies`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dsv3.bindings import apply
from dsv3.config import Config, Mla, Model, Moe, Yarn
from dsv3.errors import CheckpointError, ConfigError
from dsv3.schema import conform, field_types

ARCHITECTURE = "DeepseekV3ForCausalLM"

# --- config.json -------------------------------------------------------------------------------

FIELDS = {
    "model.vocab": "vocab_size",
    "model.width": "hidden_size",
    "model.layers": "num_hidden_layers",
    "model.dense_layers": "first_k_dense_replace",
    "model.dense_width": "intermediate_size",
    "model.norm_eps": "rms_norm_eps",
    "model.mla.heads": "num_attention_heads",
    "model.mla.query_latent": "q_lora_rank",
    "model.mla.kv_latent": "kv_lora_rank",
    "model.mla.nope_dim": "qk_nope_head_dim",
    "model.mla.rope_dim": "qk_rope_head_dim",
    "model.mla.value_dim": "v_head_dim",
    "model.moe.routed_experts": "n_routed_experts",
    "model.moe.shared_experts": "n_shared_experts",
    "model.moe.experts_per_token": "num_experts_per_tok",
    "model.moe.groups": "n_group",
    "model.moe.groups_per_token": "topk_group",
    "model.moe.expert_width": "moe_intermediate_size",
    "model.moe.gate_scale": "routed_scaling_factor",
    "model.moe.normalize_gates": "norm_topk_prob",
}
YARN = {
    "model.mla.yarn.factor": "factor",
    "model.mla.yarn.original_length": "original_max_position_embeddings",
    "model.mla.yarn.beta_fast": "beta_fast",
    "model.mla.yarn.beta_slow": "beta_slow",
    "model.mla.yarn.mscale": "mscale",
    "model.mla.yarn.mscale_all_dim": "mscale_all_dim",
}
ONLY = {  # fields of which one value is implemented; absent or null means that one
    "attention_bias": False,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
}
ONLY_ROPE = {"truncate": True, "partial_rotary_factor": 1}
SECTIONS = {"model": Model, "model.mla": Mla, "model.moe": Moe, "model.mla.yarn": Yarn}
QUANTIZED = (
    "quantized weights are not imported yet; convert to BF16 first, "
    "as DeepSeek's fp8_cast_bf16.py does"
)


def config_of(fields: Mapping[str, Any], origin: str) -> Config:
    """The configuration that a config.json, in the hub's spelling or transformers 5's, stands for.

    `model.mtp_depths` is what the file announces. `training.sequence_length` becomes the length
    before YaRN's stretching. Raises CheckpointError naming `origin` and the field for another
    architecture, a missing or ill-typed field, and for what is not implemented.
    """
    try:
        _require_supported(fields)
        return apply(Config(), _bindings(fields) | _rope(fields))
    except KeyError as missing:
        raise CheckpointError(f"{origin} lacks the field {missing.args[0]!r}") from None
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {_in_hub_words(str(error))}") from None


def _require_supported(fields: Mapping[str, Any]) -> None:
    architectures = fields.get("architectures") or [fields.get("model_type")]
    if architectures not in ([ARCHITECTURE], ["deepseek_v3"]):
        raise ConfigError(f"architectures = {architectures} is not {[ARCHITECTURE]}")
    for name, only in ONLY.items():
        if fields.get(name) not in (None, only):
            raise ConfigError(f"{name} = {fields[name]!r} is not supported, only {only!r}")
    heads, kv_heads = fields["num_attention_heads"], fields.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ConfigError(
            f"num_key_value_heads = {kv_heads!r} is not num_attention_heads = {heads}"
        )
    if fields.get("quantization_config"):
        raise ConfigError(f"quantization_config: {QUANTIZED}")


def _bindings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all of `Model` but its rotary positions, each of the type that it becomes."""
    fields = dict(fields) | {"n_shared_experts": fields.get("n_shared_experts") or 0}
    values = {path: conform(fields[name], _type(path), name) for path, name in FIELDS.items()}
    layers, experts = values["model.layers"], values["model.moe.routed_experts"]
    in_group = experts // max(values["model.moe.groups"], 1)
    depths = fields.get("num_nextn_predict_layers", fields.get("num_mtp_layers"))
    return values | {
        "model.dense_layers": min(values["model.dense_layers"], layers),
        "model.moe.group_score_experts": max(min(2, in_group), 1),
        "model.mtp_depths": depths or 0,
    }


def _type(path: str) -> Any:
    section, _, name = path.rpartition(".")
    return field_types(SECTIONS[section])[name]


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Bindings of rotary positions: `rope_scaling` with `rope_theta` beside it, or transformers 5's
    `rope_parameters`, which holds both; absent entries mean what they mean to transformers."""
    spelling = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = conform(fields.get(spelling) or {}, dict, spelling)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"{spelling}.rope_type = {kind!r} is not supported, only 'yarn'")
    known = {"rope_type", "type", "rope_theta", *YARN.values()}
    for name, value in rope.items():
        if name not in known and value not in (None, ONLY_ROPE.get(name)):
            raise ConfigError(f"{spelling}.{name} = {value!r} is not supported")
    length = conform(fields.get("max_position_embeddings", 4096), int, "max_position_embeddings")
    half = fields.get("rope_interleave") is False
    bindings = {
        "model.mla.rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
        "model.mla.rope_layout": "half" if half else "interleaved",
        "training.sequence_length": length,
    }
    if kind == "default":
        return bindings | {"model.mla.yarn": None}
    given = {n: conform(rope.get(n), _type(p) | None, f"{spelling}.{n}") for p, n in YARN.items()}
    full = _with_yarn_defaults(given, length)
    bindings["training.sequence_length"] = full["original_max_position_embeddings"]
    return bindings | {"model.mla.yarn": "yarn"} | {path: full[n] for path, n in YARN.items()}


def _with_yarn_defaults(given: Mapping[str, Any], length: int) -> dict[str, Any]:
    """YaRN's entries with None or 0 replaced by what transformers takes then.

    cos and sin are scaled by m(mscale) / m(mscale_all_dim), m(x) = 0.1 x ln(factor) + 1, and by
    m(1) where either is not given; the softmax by m(mscale_all_dim)² where that is.
    """
    original = given["original_max_position_embeddings"] or length
    factor = given["factor"] or length / original
    mscale, all_dim = given["mscale"], given["mscale_all_dim"] or 0.0
    if not all_dim:
        mscale = 1.0
    elif not mscale:
        mscale = 1 + all_dim * (1 + 0.1 * math.log(max(factor, 1)))  # m(mscale) = m(1) m(all_dim)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": given["beta_fast"] or 32.0,
        "beta_slow": given["beta_slow"] or 1.0,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }


def _in_hub_words(message: str) -> str:
    """The message of a ConfigError with our paths replaced by config.json's field names."""
    others = {
        "model.mtp_depths": "num_nextn_predict_layers",
        "model.mla.rope_theta": "rope_theta",
    }
    words = FIELDS | YARN | others
    return re.sub(r"model(\.\w+)+", lambda path: words.get(path[0], path[0]), message)


# --- tensors -----------------------------------------------------------------------------------

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
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    return layer is not None and int(layer[1]) >= config.layers
