"""What the hub calls a configuration: config.json of DeepSeek-V3's released layout (spec §8.2).

FIELDS and YARN pair our fields with those of config.json, and each table is read in either
direction: `config_of` reads the hub's spelling or that of transformers 5, `fields_of` writes the
hub's, which transformers 5 reads too. Weights in FP8 are announced by `quantization_config`, kept
as it was found (`Quantization`): a checkpoint that is imported and exported again says the same.
"""

import functools
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsv3.bindings import apply, difference
from dsv3.config import Config, Mla, Model, Moe, Yarn
from dsv3.errors import CheckpointError, ConfigError
from dsv3.schema import conform, field_types

ARCHITECTURE = "DeepseekV3ForCausalLM"
FIELDS = {
    "model.vocab": "vocab_size",
    "model.width": "hidden_size",
    "model.layers": "num_hidden_layers",
    "model.dense_layers": "first_k_dense_replace",
    "model.dense_width": "intermediate_size",
    "model.norm_eps": "rms_norm_eps",
    "model.init_std": "initializer_range",
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
ONLY_QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
LONGEST = 1 << 31
SCALE_FORMATS = (None, "ue8m0")
DEEPSEEK_FP8 = {**ONLY_QUANTIZED, "weight_block_size": [128, 128]}


class Quantization(NamedTuple):
    """How weights are kept in FP8: E4M3 blocks [outputs, inputs] with an FP32 scale each."""

    fields: Mapping[str, Any]  # of quantization_config

    @property
    def block(self) -> tuple[int, int]:
        rows, columns = self.fields["weight_block_size"]
        return rows, columns

    @property
    def power_of_two(self) -> bool:
        """Whether scales are powers of two (UE8M0, still written as FP32)."""
        return self.fields.get("scale_fmt") == "ue8m0"


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


def _bindings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values of all of `Model` but its rotary positions, each of the type that it becomes."""
    fields = dict(fields) | {
        "n_shared_experts": fields.get("n_shared_experts") or 0,
        "initializer_range": fields.get("initializer_range") or Model().init_std,
    }
    values = {path: conform(fields[name], _type(path), name) for path, name in FIELDS.items()}
    layers, experts = values["model.layers"], values["model.moe.routed_experts"]
    in_group = experts // max(values["model.moe.groups"], 1)
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        depths = conform(fields.get(name), int | None, name)
        if depths is not None:
            break
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
    if not 0 < length < LONGEST:
        raise ConfigError(f"max_position_embeddings = {reprlib.repr(length)} is no length")
    interleave = conform(fields.get("rope_interleave"), bool | None, "rope_interleave")
    bindings = {
        "model.mla.rope_theta": rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
        "model.mla.rope_layout": "half" if interleave is False else "interleaved",
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
    if not 0 < original < LONGEST:
        name = "original_max_position_embeddings"
        raise ConfigError(f"rope_scaling.{name} = {reprlib.repr(original)} is no length")
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
        "training.sequence_length": "max_position_embeddings",
    }
    words = FIELDS | YARN | others
    return re.sub(r"(model|training)(\.\w+)+", lambda path: words.get(path[0], path[0]), message)


def quantization_of(fields: Mapping[str, Any], origin: str) -> Quantization | None:
    """What `quantization_config` of a config.json announces, None without one.

    Raises CheckpointError naming `origin` and the entry for anything but E4M3 blocks.
    """
    found = fields.get("quantization_config")
    if not found:
        return None
    try:
        found = conform(found, dict, "quantization_config")
        for name, only in ONLY_QUANTIZED.items():
            given = found.get(name, only if name != "quant_method" else None)
            if given != only:
                raise ConfigError(f"{name} = {given!r} is not supported, only {only!r}")
        if found.get("scale_fmt") not in SCALE_FORMATS:
            raise ConfigError(f"scale_fmt = {found['scale_fmt']!r} is not supported, only 'ue8m0'")
        block = found.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(map(_positive, block))):
            raise ConfigError(f"weight_block_size = {block!r} is no block, as [128, 128] is")
    except ConfigError as error:
        where = "" if str(error).startswith("quantization_config") else "quantization_config."
        raise CheckpointError(f"{origin}: {where}{error}") from None
    return Quantization(found)


def _positive(size: Any) -> bool:
    return type(size) is int and size > 0


# --- the other direction -----------------------------------------------------------------------

WRITTEN = {  # what every file says, beside ONLY
    "architectures": [ARCHITECTURE],
    "model_type": "deepseek_v3",
    "attention_dropout": 0.0,
    "ep_size": 1,
    "use_cache": True,
}
NOT_IN_THE_LAYOUT = (  # as they do not change what a model computes
    "model.dot", "model.remat", "model.moe.balance", "model.moe.block", "model.mla.attention",
    "model.mla.decoding",
)  # fmt: skip


def fields_of(config: Config, dtype: str, quantization: Quantization | None) -> dict[str, Any]:
    """config.json of a model, in the hub's spelling; `dtype` is that of unquantised tensors.

    Raises CheckpointError where the layout has no word for something in `config`.
    """
    mla, yarn = config.model.mla, config.model.mla.yarn
    length = config.training.sequence_length
    fields = dict(WRITTEN) | ONLY | {name: _value(config, path) for path, name in FIELDS.items()}
    fields |= {
        "num_key_value_heads": mla.heads,
        "num_nextn_predict_layers": config.model.mtp_depths,
        "max_position_embeddings": round(yarn.original_length * yarn.factor) if yarn else length,
        "rope_theta": mla.rope_theta,
        "rope_scaling": yarn and {"type": "yarn"} | {n: _value(config, p) for p, n in YARN.items()},
        "torch_dtype": dtype,
    }
    if mla.rope_layout == "half":
        fields["rope_interleave"] = False
    if quantization is not None:
        fields["quantization_config"] = dict(quantization.fields)
    _require_said(config, fields)
    return dict(sorted(fields.items()))


def _value(config: Config, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def _require_said(config: Config, fields: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless reading `fields` gives the same forward pass."""
    back = difference(config, config_of(fields, "config.json"))
    unsaid = [p for p in back if p.startswith("model.") and not p.startswith(NOT_IN_THE_LAYOUT)]
    if unsaid:
        path = unsaid[0]
        raise CheckpointError(f"the hub's layout cannot say {path} = {back[path]!r}")
