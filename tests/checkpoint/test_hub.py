"""The tables of the hub's names: all 91,991 tensors of the released checkpoint, and config.json."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import deepseek_v3
from dsv3 import counts
from dsv3.bindings import apply
from dsv3.checkpoint import exporting, hub_config
from dsv3.config import Config, Yarn
from dsv3.errors import CheckpointError
from dsv3.model import rope
from tests.checkpoint.folders import CASES, GOLDEN


def test_tensors_and_bytes_of_the_released_checkpoint():
    """What an export of the 671B model in FP8 is going to write, against spec §1.8 and 2.6."""
    model = deepseek_v3.get_config().model
    pieces = exporting.in_file_order(model)
    quantization = hub_config.Quantization(hub_config.DEEPSEEK_FP8)
    entries = exporting.plan(pieces, "BF16", quantization, exporting.projections(pieces))
    scales = [name for name in entries if name.endswith("_scale_inv")]
    assert (len(entries), len(scales)) == (91_991, 45_808)
    bytes_of = dict.fromkeys(("F8_E4M3", "BF16", "F32"), 0)
    for entry in entries.values():
        bytes_of[entry.dtype] += entry.nbytes
    assert bytes_of == {
        "F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560 * 2, "F32": 41_555_600 * 4,
    }  # fmt: skip
    assert sum(bytes_of.values()) == 688_574_839_360
    parts = exporting.in_files(entries, exporting.SHARD_BYTES).values()
    assert [name for part in parts for name in part] == list(entries)
    assert all(sum(e.nbytes for e in part.values()) <= exporting.SHARD_BYTES for part in parts)
    assert all(name.removesuffix("_scale_inv") in part for part in parts for name in part)

    layer = "model.layers.60"
    shapes = {
        "model.embed_tokens.weight": ("BF16", (129280, 7168)),
        "lm_head.weight": ("BF16", (129280, 7168)),
        "model.layers.0.self_attn.q_b_proj.weight": ("F8_E4M3", (24576, 1536)),
        "model.layers.0.self_attn.q_b_proj.weight_scale_inv": ("F32", (192, 12)),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", (576, 7168)),
        f"{layer}.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (5, 56)),
        f"{layer}.self_attn.o_proj.weight": ("F8_E4M3", (7168, 16384)),
        "model.layers.2.mlp.down_proj.weight_scale_inv": ("F32", (56, 144)),
        "model.layers.3.mlp.gate.weight": ("BF16", (256, 7168)),
        "model.layers.3.mlp.gate.e_score_correction_bias": ("F32", (256,)),
        f"{layer}.mlp.experts.255.down_proj.weight": ("F8_E4M3", (7168, 2048)),
        "model.layers.61.mlp.experts.0.gate_proj.weight": ("F8_E4M3", (2048, 7168)),
        "model.layers.61.embed_tokens.weight": ("BF16", (129280, 7168)),
        "model.layers.61.shared_head.head.weight": ("BF16", (129280, 7168)),
        "model.layers.61.eh_proj.weight": ("BF16", (7168, 14336)),
        "model.layers.61.shared_head.norm.weight": ("BF16", (7168,)),
    }
    assert {name: tuple(entries[name]) for name in shapes} == shapes


def test_files_are_filled_in_order_and_a_large_tensor_stands_alone():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 2, "d_scale_inv": 1, "e": 2, "f": 1, "f_scale_inv": 1}
    entries = {name: exporting.Entry("F8_E4M3", (size,)) for name, size in sizes.items()}
    assert {file: list(part) for file, part in exporting.in_files(entries, 6).items()} == {
        "model-00001-of-00004.safetensors": ["a", "b"],
        "model-00002-of-00004.safetensors": ["c"],
        "model-00003-of-00004.safetensors": ["d", "d_scale_inv", "e"],
        "model-00004-of-00004.safetensors": ["f", "f_scale_inv"],
    }
    assert exporting.in_files({}, 6) == {"model.safetensors": {}}


def test_released_config():
    """config.json of the hub (spec §8.2), but for quantization_config."""
    fields = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
        "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "vocab_size": 129280, "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
                         "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096},
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    config = hub_config.config_of(fields, "config.json")
    report = deepseek_v3.get_config().model
    # the released files are those after context extension; the report trains without it
    assert counts.parameters(config.model) == counts.parameters(report)
    assert config.model.mla.yarn == Yarn(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.training.sequence_length == 4096
    assert rope.softmax_scale(config.model.mla) == pytest.approx(0.1352337789)

    scaling = fields.pop("rope_scaling")
    kind, theta = scaling.pop("type"), fields.pop("rope_theta")
    fields["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **scaling}
    fields["dtype"] = fields.pop("torch_dtype")
    assert hub_config.config_of(fields, "config.json") == config


M1 = 1 + 0.1 * np.log(4.0)  # m(1) of the docstring at factor 4


@pytest.mark.parametrize(
    ("entries", "size", "temperature"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, M1),
        ({"mscale": 0.0, "mscale_all_dim": 0.0}, M1, 1.0),
        ({}, M1, 1.0),
        ({"mscale": 0.707}, M1, 1.0),
        ({"mscale_all_dim": 0.707}, M1, 1 + 0.0707 * np.log(4.0)),
    ],
)
def test_absent_yarn_entries_mean_what_they_mean_to_transformers(entries, size, temperature):
    fields = json.loads((GOLDEN / "yarn" / "config.json").read_text())
    bare = {k: v for k, v in fields["rope_parameters"].items() if not k.startswith("mscale")}
    mla = hub_config.config_of(fields | {"rope_parameters": bare | entries}, "c").model.mla
    cos, _ = rope.rotation(mla, jnp.zeros(1))
    np.testing.assert_allclose(cos, size, rtol=1e-6)
    plain = (mla.nope_dim + mla.rope_dim) ** -0.5
    assert rope.softmax_scale(mla) == pytest.approx(plain * temperature**2)


def test_more_dense_layers_than_layers():
    fields = json.loads((GOLDEN / "groups" / "config.json").read_text())
    assert hub_config.config_of(fields | {"first_k_dense_replace": 9}, "c").model.dense_layers == 3


# --- config.json written -----------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, "fp8"])
def test_a_config_written_and_read_is_the_same(case):
    fields = json.loads((GOLDEN / case / "config.json").read_text())
    config = hub_config.config_of(fields, "c")
    quantization = hub_config.quantization_of(fields, "c")
    written = json.loads(json.dumps(hub_config.fields_of(config, "bfloat16", quantization)))
    assert hub_config.config_of(written, "c").model == config.model
    assert hub_config.quantization_of(written, "c") == quantization
    if "torch_dtype" in fields:  # the hub's spelling: all that was read is written back
        unused = {"torch_dtype", "aux_loss_alpha", "seq_aux"}
        unused |= {"pretraining_tp", "transformers_version"}
        for name in fields.keys() - unused:
            assert name.endswith("_token_id") or written[name] == fields[name], name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.moe.group_score_experts": 1}, "model.moe.group_score_experts = 1"),
        ({"model.mla.yarn": "yarn", "model.mla.yarn.mscale": 0.0}, "model.mla.yarn.mscale = 0.0"),
    ],
)
def test_what_config_json_cannot_say_is_refused(change, named):
    with pytest.raises(CheckpointError, match=f"the hub's layout cannot say {named}"):
        hub_config.fields_of(apply(Config(), change), "bfloat16", None)


def test_how_a_model_was_trained_is_not_said():
    change = {"model.moe.balance": "aux_loss", "model.dot": "fp8", "model.remat": "full"}
    config = apply(Config(), change | {"model.moe.block": 64})
    back = hub_config.config_of(hub_config.fields_of(config, "float32", None), "c").model
    assert back.mla == config.model.mla and back.moe.groups == config.model.moe.groups
