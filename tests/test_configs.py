"""The configurations against the report: every number, and every count that follows from them."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dsv3 import counts
from dsv3.bindings import apply, operative, parse
from dsv3.config import AuxFree, Config, Model
from dsv3.model.transformer import Transformer
from dsv3.sweeps import load_config
from dsv3.training.schedules import batch_size, learning_rate, steps_to_end, value_at

CONFIGS = Path(__file__).parents[1] / "configs"
SIZED = ("deepseek_v3", "v3_16b", "v3_1b", "bench_cpu")  # those whose size is a promise
T = 1e12


@functools.cache
def config(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.py")


# --- every file --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_writes_itself_out(path):
    loaded = load_config(path)
    assert apply(Config(), parse(operative(loaded))) == loaded


@functools.cache
def abstract(name: str) -> Transformer:
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), config(name).model))


@pytest.mark.parametrize("name", SIZED)
def test_the_built_model_has_the_counted_parameters(name):
    built = dict.fromkeys(counts.Parameters._fields, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract(name)):
        built[part(jax.tree_util.keystr(path))] += leaf.size
    counted = counts.parameters(config(name).model)
    assert built | {"mtp_copies": counted.mtp_copies} == counted._asdict()


def part(path: str) -> str:
    """The field of Parameters that counts the parameter at `path`."""
    top = path.split(".")[1].split("[")[0]
    if top not in ("dense", "moe"):
        return top
    if "attention" in path or "ffn_norm" in path:
        return "attention"
    return next((p for p in ("router", "routed", "shared") if p in path), "dense")


# --- the 671B model ----------------------------------------------------------------------------


def test_parameters_of_the_report():
    stored = counts.parameters(config("deepseek_v3").model)
    assert stored.embedding == stored.head == 926_679_040
    assert stored.attention == 11_414_421_504
    assert stored.dense == 1_189_085_184
    assert stored.router + stored.routed + stored.shared == 656_569_547_264
    assert stored.norm == 7_168
    assert stored.main == 671_026_419_200
    assert stored.mtp == 11_610_068_224
    assert stored.mtp + stored.mtp_copies == 13_463_426_304
    assert stored.total + stored.mtp_copies == 684_489_845_504


def test_activated_parameters_of_the_report():
    run = counts.activated(config("deepseek_v3").model)
    assert run.main == 37_552_297_472
    assert run.main - run.embedding == 36_625_618_432
    assert run.mtp == 688_100_608


def test_latent_cache_of_the_report():
    model = config("deepseek_v3").model
    assert counts.cache_elements(model) == 35_136
    assert counts.cache_bytes(model) == 70_272


def test_training_arithmetic_of_the_report():
    """Against the products of one token written out, matrix by matrix."""
    queries = 7168 * 1536 + 1536 * 24_576
    keys_values = 7168 * 576 + 512 * 32_768
    scores_and_values = 128 * (192 + 128) * 4097 / 2
    attention = queries + keys_values + scores_and_values + 16_384 * 7168
    moe = 9 * 3 * 7168 * 2048 + 7168 * 256
    main = 61 * attention + 3 * 3 * 7168 * 18_432 + 58 * moe + 7168 * 129_280
    mtp = attention + moe + 14_336 * 7168 + 7168 * 129_280
    counted = counts.training_flops(config("deepseek_v3").model, 4096)
    assert counted == pytest.approx(6 * (main + mtp), rel=1e-4)  # gains and biases count with it
    assert counted == pytest.approx(2.607e11, rel=1e-3)


def checkpoint_tensors(model: Model) -> list[tuple[str, Any]]:
    """(kind, shape) of each tensor of the released checkpoint, kind 'f8', 'bf16' or 'f32'."""
    d, mla, moe = model.width, model.mla, model.moe
    queries = mla.heads * (mla.nope_dim + mla.rope_dim)
    keys_values = mla.heads * (mla.nope_dim + mla.value_dim)
    attention = [
        ("f8", (mla.query_latent, d)), ("bf16", (mla.query_latent,)),
        ("f8", (queries, mla.query_latent)), ("f8", (mla.kv_latent + mla.rope_dim, d)),
        ("bf16", (mla.kv_latent,)), ("f8", (keys_values, mla.kv_latent)),
        ("f8", (d, mla.heads * mla.value_dim)), ("bf16", (d,)), ("bf16", (d,)),
    ]  # fmt: skip

    def mlp(width):
        return [("f8", (width, d)), ("f8", (width, d)), ("f8", (d, width))]

    routed = moe.routed_experts * mlp(moe.expert_width)
    gate = [("bf16", (moe.routed_experts, d)), ("f32", (moe.routed_experts,))]
    experts = gate + routed + mlp(moe.shared_experts * moe.expert_width)
    tables = [("bf16", (model.vocab, d))] * 2
    main = tables + model.layers * attention + [("bf16", (d,))]
    main += model.dense_layers * mlp(model.dense_width) + model.moe_layers * experts
    mtp = tables + attention + experts + [("bf16", (d, 2 * d))] + 3 * [("bf16", (d,))]
    return main + model.mtp_depths * mtp


def test_tensors_and_bytes_of_the_released_checkpoint():
    model = config("deepseek_v3").model
    tensors = checkpoint_tensors(model)
    scales = [(-(-o // 128), -(-i // 128)) for kind, (o, *rest) in tensors for i in rest
              if kind == "f8"]  # fmt: skip
    elements = {k: sum(math.prod(s) for kind, s in tensors if kind == k)
                for k in ("f8", "bf16", "f32")}  # fmt: skip
    scale_elements = sum(math.prod(s) for s in scales)
    assert (len(tensors) + len(scales), len(scales)) == (91_991, 45_808)
    assert scale_elements == 41_540_496
    assert (elements["f8"], elements["bf16"]) == (680_571_043_840, 3_918_786_560)
    assert elements["f32"] + scale_elements == 41_555_600
    stored = counts.parameters(model)
    assert sum(elements.values()) == stored.total + stored.mtp_copies


def test_learning_rate_of_the_report():
    training = config("deepseek_v3").training

    def rate(tokens, step=10**6):
        return float(learning_rate(training, step, tokens / training.tokens, np))

    early = 2000 * 3072 * 4096
    assert rate(0, 0) == 0
    assert rate(early / 2, 1000) == pytest.approx(1.1e-4)
    assert rate(early, 2000) == pytest.approx(2.2e-4)
    assert rate(10 * T) == pytest.approx(2.2e-4)
    assert rate(12.15 * T) == pytest.approx(1.21e-4)
    assert rate(14.3 * T) == pytest.approx(2.2e-5)
    assert rate(14.632 * T) == pytest.approx(2.2e-5)
    assert rate(14.633 * T) == pytest.approx(7.3e-6)
    assert rate(14.8 * T) == pytest.approx(7.3e-6)
    spec = 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (11 - 10) / 4.3))
    assert rate(11 * T) == pytest.approx(spec)


def test_batch_of_the_report():
    training = config("deepseek_v3").training

    def batch(tokens):
        return batch_size(training, round(tokens / training.sequence_length))

    assert batch(0) == 3072 and 3072 * 4096 == 12_582_912
    assert batch(469e9 / 2) == 9216  # half way
    assert batch(468e9) < batch(469e9 + 4096) == batch(14.79 * T) == 15_360
    after = (14.8 * T - 469e9) / (15_360 * 4096)
    assert round(after, -3) == 228_000  # steps once the batch stands
    # and on a ramp linear in tokens, whose batch is rounded down, a little more than ln 5 says
    within = 469e9 / (12_288 * 4096) * math.log(5)
    assert 1.0 < (steps_to_end(training) - after) / within < 1.08
    ramp = [batch(tokens) for tokens in np.linspace(0, 469e9, 200)]
    assert ramp == sorted(ramp) and not any(b % training.batch_increment for b in ramp)


def test_other_schedules_of_the_report():
    training = config("deepseek_v3").training

    def at(schedule, tokens):
        return float(value_at(schedule, tokens / training.tokens, np))

    for tokens, speed, weight in [
        (0, 0.001, 0.3), (9.99 * T, 0.001, 0.3), (10 * T, 0.001, 0.1), (14.29 * T, 0.001, 0.1),
        (14.3 * T, 0.0, 0.1), (14.8 * T, 0.0, 0.1),
    ]:  # fmt: skip
        assert (at(training.bias_speed, tokens), at(training.mtp_weight, tokens)) == (speed, weight)


def test_other_numbers_of_the_report():
    loaded = config("deepseek_v3")
    moe, training = loaded.model.moe, loaded.training
    assert (loaded.model.init_std, loaded.model.norm_eps) == (0.006, 1e-6)
    assert (moe.gate_scale, moe.groups, moe.groups_per_token) == (2.5, 8, 4)
    assert moe.balance == AuxFree(sequence_alpha=1e-4)
    assert loaded.model.mla.yarn is None  # pre-training positions are plain (§4.3)
    assert dataclasses.astuple(training.optimizer) == (0.9, 0.95, 1e-8, 0.1, "bfloat16")
    assert (training.tokens, training.sequence_length) == (14.8 * T, 4096)
    assert (training.clip_norm, training.compute_dtype) == (1.0, "bfloat16")
    assert (loaded.data.tokenizer, loaded.data.fim_rate) == ("deepseek", 0.1)
    assert loaded.model.remat == "report"


# --- the small ones ----------------------------------------------------------------------------


def test_the_16b_shape_is_that_of_v2_lite():
    model = config("v3_16b").model
    stored, run = counts.parameters(model), counts.activated(model)
    biases = model.moe_layers * model.moe.routed_experts  # which V2 has not
    assert stored.main - biases == 15_706_484_224
    assert round((run.main - run.embedding - run.router) / 1e9, 1) == 2.4
    assert config("v3_16b").training.tokens == 1.33 * T


def test_the_1b_shape_is_about_1b():
    stored, run = (f(config("v3_1b").model) for f in (counts.parameters, counts.activated))
    assert stored.main == 991_922_880 and stored.total == 1_076_601_344
    assert run.main - run.embedding == 231_705_280


def test_the_benchmark_has_the_shape_that_was_agreed():
    loaded = config("bench_cpu")
    m, mla, moe = loaded.model, loaded.model.mla, loaded.model.moe
    assert (m.vocab, m.width, m.layers, m.dense_layers, m.dense_width) == (4096, 256, 4, 1, 1024)
    assert (mla.heads, mla.query_latent, mla.kv_latent) == (4, 128, 64)
    assert (mla.nope_dim, mla.rope_dim, mla.value_dim) == (64, 32, 64)
    assert (moe.routed_experts, moe.experts_per_token, moe.shared_experts) == (16, 4, 1)
    assert (moe.groups, moe.groups_per_token, moe.expert_width) == (4, 2, 128)
    assert m.mtp_depths == 0 and loaded.data.corpus == "synthetic"
    assert batch_size(loaded.training, 0) == 8 and loaded.training.sequence_length == 256
    assert loaded.training.compute_dtype == "float32"
