"""The hub's layout: parity with transformers (tests/golden), and what is wrong with a folder."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import deepseek_v3
from dsv3 import counts
from dsv3.checkpoint import hub, hub_config, huggingface
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.trained import from_workdir
from dsv3.config import Model, Yarn
from dsv3.errors import CheckpointError
from dsv3.model import rope
from dsv3.model.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{case}.npz"))


UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiles in a third of the time


@functools.partial(jax.jit, compiler_options=UNOPTIMISED)
def loss_logits_gradients(model: Transformer, tokens_BT):
    """Mean next-token cross-entropy, the output and the loss's gradients by parameter."""

    def loss(model):
        output = model(tokens_BT)
        log_p = jax.nn.log_softmax(output.logits_BTV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1)), output

    (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return value, output, name_leaves(gradients)


def in_hub_layout(model: Model, leaves: dict) -> dict[str, np.ndarray]:
    """The tables in the other direction: tensors of the hub from arrays of the model."""
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    tensors = {}
    for piece in hub.pieces(model, {name: array.shape for name, array in arrays.items()}):
        part = arrays[piece.parameter][piece.index]
        tensors[piece.tensor] = part.T if piece.transposed else part
    return tensors


# --- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(case):
    """Logits to 1e-4 (they reach 10; two FP32 orders of summation differ by 1e-5), every gradient
    to 1e-3 of its tensor's largest entry."""
    wanted = golden(case)
    config, model = huggingface.load(GOLDEN / case, dtype="float32")
    loss, output, gradients = loss_logits_gradients(model, wanted["tokens"])
    np.testing.assert_allclose(output.logits_BTV, wanted["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)

    found = in_hub_layout(config.model, gradients)
    names = [name.removeprefix("grad/") for name in wanted if name.startswith("grad/")]
    kinds = {piece.parameter for piece in _pieces(config.model) if piece.tensor in names}
    own = {p for p in name_leaves(model) if not p.startswith("mtp") and not p.endswith("bias")}
    assert kinds == own
    for name in names:
        gradient = wanted[f"grad/{name}"]
        atol = 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=atol, err_msg=name)
    if "mtp_logits" in wanted:
        [mtp_BTV] = output.mtp_logits
        np.testing.assert_allclose(mtp_BTV[:, :-1], wanted["mtp_logits"], rtol=0, atol=1e-4)
    else:
        assert output.mtp_logits == ()


def test_bf16_computes_as_well_as_transformers_does():
    wanted = golden("bf16")
    _, model = huggingface.load(GOLDEN / "bf16")
    bias, rest = {}, {}
    for name, leaf in name_leaves(model).items():
        (bias if name.endswith("router.bias") else rest)[name] = leaf.dtype
    assert set(bias.values()) == {jnp.dtype("float32")}
    assert set(rest.values()) == {jnp.dtype("bfloat16")}
    forward = jax.jit(lambda m, t: m(t).logits_BTV, compiler_options=UNOPTIMISED)
    logits = forward(model, wanted["tokens"])
    assert logits.dtype == jnp.bfloat16

    def error(logits):
        return np.median(np.abs(np.asarray(logits, np.float32) - wanted["logits"]))

    assert error(logits) < 1.5 * error(wanted["logits_stored"])


# --- the tables --------------------------------------------------------------------------------


def _pieces(model: Model) -> list[hub.Piece]:
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    shapes = {name: leaf.shape for name, leaf in name_leaves(abstract).items()}
    return list(hub.pieces(model, shapes))


def test_tensors_of_the_released_checkpoint():
    """91,991 tensors on the hub, 45,808 of them scales (spec §1.8), and the shapes of §8.1."""
    model = deepseek_v3.get_config().model
    pieces = {piece.tensor: piece for piece in _pieces(model)}
    assert len(pieces) + len(hub.copies(model)) == 91_991 - 45_808
    assert sum(np.prod(p.shape) for p in pieces.values()) == counts.parameters(model).total
    shapes = {
        "model.embed_tokens.weight": (129280, 7168),
        "lm_head.weight": (129280, 7168),
        "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.2.mlp.down_proj.weight": (7168, 18432),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.experts.255.down_proj.weight": (7168, 2048),
        "model.layers.61.mlp.experts.0.gate_proj.weight": (2048, 7168),
        "model.layers.61.eh_proj.weight": (7168, 14336),
        "model.layers.61.shared_head.norm.weight": (7168,),
    }
    assert {name: pieces[name].shape for name in shapes} == shapes


@pytest.mark.parametrize("case", CASES)
def test_tables_read_backwards_give_the_files(case):
    config, model = huggingface.load(GOLDEN / case)
    files = {}
    for file in (GOLDEN / case).glob("*.safetensors"):
        files |= load_file(file)
    tensors = in_hub_layout(config.model, name_leaves(model))
    for copy, main in hub.copies(config.model).items():
        tensors[copy] = tensors[main]
    assert tensors.keys() == files.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == files[name].dtype
        np.testing.assert_array_equal(tensor, files[name], name)


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


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the single-file golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / "groups", tmp_path / "hf"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A copy of the golden checkpoint with MTP in four files."""
    return Path(shutil.copytree(GOLDEN / "mtp_sharded", tmp_path / "hf"))


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_index(folder: Path, name: str, file: object) -> None:
    path = folder / huggingface.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "BF16"]),
        ({"hidden_size": "32"}, ["hidden_size", "int", "'32'"]),
        ({"n_group": 3}, ["n_group = 3", "16 routed experts"]),
        ({"topk_group": 5}, ["topk_group = 5", "n_group = 4"]),
        ({"n_group": None}, ["n_group", "None"]),
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


@pytest.mark.parametrize("store", ["dtype", "scale"])
def test_fp8_blocks_are_refused(folder, store):
    name = "model.layers.0.self_attn.o_proj.weight"
    if store == "scale":
        scale = np.ones((1, 1), np.float32)
        edit_tensors(folder, lambda t: t.update({f"{name}_scale_inv": scale}))
    else:
        content = (folder / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        start, end = header[name]["data_offsets"]
        header[name] |= {"dtype": "F8_E4M3", "shape": [end - start]}
        edited = json.dumps(header).encode()
        edited = len(edited).to_bytes(8, "little") + edited + content[8 + size :]
        (folder / "model.safetensors").write_bytes(edited)
        header = huggingface.Weights(folder).headers[name]
        with pytest.raises(CheckpointError, match=r"F8_E4M3: quantized .* BF16"):
            huggingface._require_fit(folder, header, hub.Piece(name, header.shape, "", (), False))
        return
    assert "convert to BF16" in refusal(folder)


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
        ("pytorch_model-00001-of-00002.bin", "no safetensors"),
        ("model-00009-of-00009.safetensors", "missing"),
        ("model-00001-of-00004.safetensors", "lacks it"),
    ],
)
def test_an_index_that_misleads_is_refused(sharded, file, named):
    name = "model.layers.0.input_layernorm.weight"
    assert json.loads((sharded / huggingface.INDEX).read_text())["weight_map"][name] != file
    edit_index(sharded, name, file)
    message = refusal(sharded)
    assert named in message and str(file).split("/")[-1] in message


def test_mtp_copies_must_be_copies_but_may_be_absent(sharded):
    _, whole = huggingface.load(sharded)
    copy = "model.layers.3.embed_tokens.weight"
    index = json.loads((sharded / huggingface.INDEX).read_text())
    file = sharded / index["weight_map"][copy]
    tensors = load_file(file)
    tensors[copy][3, 5] += 1
    save_file(tensors, file)
    assert f"{copy} is no copy of model.embed_tokens.weight" in refusal(sharded)
    del tensors[copy], index["weight_map"][copy]
    save_file(tensors, file)
    (sharded / huggingface.INDEX).write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, whole, huggingface.load(sharded)[1])


def test_an_incomplete_mtp_layer_is_refused(sharded):
    edit_config(sharded, num_nextn_predict_layers=2)
    message = refusal(sharded)
    assert "lacks" in message and "model.layers.4." in message
    edit_config(sharded, num_nextn_predict_layers=0)
    assert "surplus" in refusal(sharded)


def test_precision_is_the_files_or_as_asked(folder):
    def halve(tensors):
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = tensors[name].astype(np.float16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    edit_tensors(folder, halve)
    _, model = huggingface.load(folder)
    assert model.head.w.dtype == jnp.float16
    assert model.moe.ffn.router.w.dtype == jnp.float32  # layer 2 is FP32
    _, model = huggingface.load(folder, dtype=jnp.bfloat16)
    assert model.head.w.dtype == model.norm.gain.dtype == jnp.bfloat16
    assert model.moe.ffn.router.bias.dtype == jnp.float32


# --- the command -------------------------------------------------------------------------------


def run(*arguments: object) -> None:
    huggingface.main([str(a) for a in arguments])


def test_import_makes_a_workdir(sharded, tmp_path, capsys):
    (sharded / "tokenizer.json").write_text('{"as": "it is"}')
    workdir = tmp_path / "runs" / "imported"
    run("import", "--hf", sharded, "--workdir", workdir)
    assert "3 layers" in capsys.readouterr().out
    assert (workdir / "tokenizer.json").read_text() == '{"as": "it is"}'
    config, model = huggingface.load(sharded)
    trained = from_workdir(workdir, warn=pytest.fail)
    assert trained.config.model == config.model
    jax.tree.map(np.testing.assert_array_equal, trained.model, model)
    assert [p.name for p in workdir.parent.iterdir()] == ["imported"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_import_keeps_what_is_there(folder, tmp_path, capsys, there):
    workdir = tmp_path / "run"
    mine = workdir if there == "file" else workdir / "config.gin"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run("import", "--hf", folder, "--workdir", workdir)
    assert ended.value.code == 2
    assert "not empty" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_failed_import_leaves_nothing(folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        run("import", "--hf", folder, "--workdir", tmp_path / "runs" / "imported")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run("ixport")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
