"""What is wrong with a folder of the hub is said in one line that names it."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3.checkpoint import huggingface
from dsv3.checkpoint.weights import INDEX
from tests.checkpoint.folders import edit_config, edit_index, edit_tensors, refusal, rewrite

YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "DeepseekV3ForCausalLM"]),
        ({"architectures": None, "model_type": "deepseek_v2"}, ["deepseek_v2"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"scoring_func": "softmax"}, ["scoring_func = 'softmax'", "'sigmoid'"]),
        ({"topk_method": "greedy"}, ["topk_method = 'greedy'", "'noaux_tc'"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings = True"]),
        ({"num_key_value_heads": 1}, ["num_key_value_heads = 1"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "'llama3'"]),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, ["rope_scaling.factor", "'4'"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, ["truncate"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.1}}, ["1.1"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, ["full_attention"]),
        ({"hidden_size": "32"}, ["hidden_size", "int", "'32'"]),
        ({"n_group": 3}, ["n_group = 3", "16 routed experts"]),
        ({"topk_group": 5}, ["topk_group = 5", "n_group = 4"]),
        ({"n_group": None}, ["n_group", "None"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers = 10000000", "the files have "]),
        ({"n_routed_experts": 4 * 10**6}, ["n_routed_experts = 4000000", "the files have "]),
        ({"rope_interleave": "no"}, ["rope_interleave wants bool or None, got 'no'"]),
        ({"num_nextn_predict_layers": []}, ["num_nextn_predict_layers wants int or None, got []"]),
        ({"num_nextn_predict_layers": None, "num_mtp_layers": "1"}, ["num_mtp_layers", "'1'"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings = 0 is no length"]),
        ({"max_position_embeddings": 10**400}, ["max_position_embeddings = 1000"]),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": -1}}, ["-1 is no length"]),
        ({"rope_scaling": YARN, "max_position_embeddings": 0}, ["max_position_embeddings = 0"]),
        ({"rms_norm_eps": float("inf")}, ["Infinity is no finite number"]),
        ({"rope_theta": "x", "rope_parameters": None}, ["rope_theta", "'x'"]),
    ],
)
def test_unsupported_fields_are_named(folder, fields, named):
    edit_config(folder, **fields)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert all(part in message for part in named), message


def test_a_missing_field_is_named(folder):
    fields = json.loads((folder / "config.json").read_text())
    del fields["kv_lora_rank"]
    (folder / "config.json").write_text(json.dumps(fields))
    assert "kv_lora_rank" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", ""])
def test_a_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_no_config_and_no_folder(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    assert "nowhere" in refusal(folder / "nowhere")


def test_missing_and_surplus_tensors_are_counted_and_named(folder):
    def edit(tensors):
        for expert in range(5):
            del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_a_proj.bias"] = np.zeros(24, np.float32)

    edit_tensors(folder, edit)
    message = refusal(folder)
    assert "lacks 5 tensors: model.layers.1.mlp.experts.0.up_proj.weight, " in message
    assert "surplus 1 tensor: model.layers.0.self_attn.q_a_proj.bias" in message


def test_a_name_that_does_not_print_is_shown_escaped(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"\x1b[2J": np.zeros(4, np.float32)}))
    assert r"a tensor is named '\x1b[2J'" in refusal(folder)


def test_old_rotary_buffers_are_ignored(folder):
    before = huggingface.load(folder)[1]
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.zeros(4, np.float32)}))
    after = huggingface.load(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_wrong_shape_is_named(folder):
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :-1].copy()}))
    message = refusal(folder)
    assert f"{name} in model.safetensors has shape [32, 23], not [32, 24]" in message


def test_a_wrong_dtype_is_named(folder):
    edit_tensors(
        folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype("f8")})
    )
    assert "model.norm.weight in model.safetensors has dtype F64" in refusal(folder)


WEIGHT = "model.layers.0.self_attn.q_a_proj.weight"  # [136, 160]: four blocks, three partial
SCALES = f"{WEIGHT}_scale_inv"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method = 'gptq'"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported, only 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static'"),
        ({"weight_block_size": None}, "weight_block_size = None"),
        ({"weight_block_size": [128, 0]}, "weight_block_size = [128, 0]"),
        ({"weight_block_size": [128, 128, 128]}, "weight_block_size"),
        ({"scale_fmt": "e5m3"}, "scale_fmt = 'e5m3'"),
        (None, "is in FP8, but config.json has no quantization_config"),
        (7, "quantization_config wants dict, got 7"),
    ],
)
def test_unsupported_quantization_is_named(fp8_folder, fields, named):
    found = json.loads((fp8_folder / "config.json").read_text())["quantization_config"]
    edited = found | fields if isinstance(fields, dict) else fields
    edit_config(fp8_folder, quantization_config=edited)
    assert named in refusal(fp8_folder)


def float32(value):
    return lambda tensors: tensors[SCALES].__setitem__((0, 1), value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(SCALES), f"{WEIGHT} is in FP8 without its scales, {SCALES}"),
        (lambda t: t.pop(WEIGHT), f"{WEIGHT} has scales, but is no tensor in FP8"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].astype("f4")}), "has scales, but is no tensor"),
        (lambda t: t.update({SCALES: t[SCALES][:1]}), "is F32 [1, 2], not F32 [2, 2]"),
        (lambda t: t.update({SCALES: t[SCALES].astype("f2")}), "is F16 [2, 2], not F32 [2, 2]"),
        (float32(np.nan), f"{SCALES} holds nan, no positive number"),
        (float32(np.inf), f"{SCALES} holds inf, no positive number"),
        (float32(0), f"{SCALES} holds 0.0, no positive number"),
        (float32(2**-127), f"{SCALES} holds 5.877471754111438e-39, no usable scale"),
        (float32(2.0**120), f"{SCALES} holds 1.329227995784916e+36, no usable scale"),
        (float32(-1), f"{SCALES} holds -1.0, no positive number"),
        (lambda t: t[WEIGHT].view("u1").__setitem__((135, 159), 0xFF), f"{WEIGHT} holds NaN"),
        (
            lambda t: t.update({NORM: t[WEIGHT][0], "model.norm.weight_scale_inv": t[SCALES]}),
            f"{NORM} is in FP8, but no matrix",
        ),
    ],
)
def test_what_is_wrong_with_fp8_is_named(fp8_folder, edit, named):
    rewrite(fp8_folder, edit)
    assert named in refusal(fp8_folder)


def test_quantization_announced_but_not_there_is_no_fault(folder):
    before = huggingface.load(folder)[1]
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_config(folder, quantization_config=said)
    jax.tree.map(np.testing.assert_array_equal, before, huggingface.load(folder)[1])


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in refusal(folder)


def test_pickles_are_refused_unopened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin is a pickle" in message and "model.safetensors" in message


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("../model.safetensors", "outside the folder"),
        ("/etc/model.safetensors", "outside the folder"),
        (7, "outside the folder"),
        ("a\0.safetensors", "no printable name"),
        ("\ud800.safetensors", "no printable name"),
        ("pytorch_model-00001-of-00002.bin", "no safetensors"),
        ("model-00009-of-00009.safetensors", "missing"),
        ("model-00001-of-00004.safetensors", "lacks it"),
    ],
)
def test_an_index_that_misleads_is_refused(sharded, file, named):
    name = "model.layers.0.input_layernorm.weight"
    assert json.loads((sharded / INDEX).read_text())["weight_map"][name] != file
    edit_index(sharded, name, file)
    message = refusal(sharded)
    assert named in message and repr(file).strip("'").split("/")[-1] in message


def test_mtp_copies_must_be_copies_but_may_be_absent(sharded):
    _, whole = huggingface.load(sharded)
    copy = "model.layers.3.embed_tokens.weight"
    index = json.loads((sharded / INDEX).read_text())
    file = sharded / index["weight_map"][copy]
    tensors = load_file(file)
    tensors[copy][3, 5] += 1
    save_file(tensors, file)
    assert f"{copy} is no copy of model.embed_tokens.weight" in refusal(sharded)
    del tensors[copy], index["weight_map"][copy]
    save_file(tensors, file)
    (sharded / INDEX).write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, whole, huggingface.load(sharded)[1])


def test_an_incomplete_mtp_layer_is_refused(sharded):
    edit_config(sharded, num_nextn_predict_layers=2)
    message = refusal(sharded)
    assert "lacks" in message and "model.layers.4." in message
    edit_config(sharded, num_nextn_predict_layers=0)
    assert "surplus" in refusal(sharded)


def test_a_link_out_of_the_folder_is_refused_but_for_the_cache_of_the_hub(folder, tmp_path):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    (folder / "model.safetensors").rename(blobs / "77")
    (folder / "model.safetensors").symlink_to(blobs / "77")
    assert "model.safetensors is a link that leads outside the folder" in refusal(folder)
    shutil.copytree(folder, snapshot, symlinks=True)
    huggingface.load(snapshot)


def test_a_tensor_in_two_files_is_refused(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    first, second = (load_file(file) for file in files[:2])
    name = next(iter(first))
    save_file(second | {name: first[name]}, files[1])
    assert f"{name} stands in {files[0].name} and in {files[1].name}" in refusal(sharded)


def test_a_vocabulary_that_is_not_the_configured_is_named(folder):
    edit_config(folder, vocab_size=65)
    assert "model.embed_tokens.weight in model.safetensors has shape [64, 32], not [65, 32]" in (
        refusal(folder)
    )
