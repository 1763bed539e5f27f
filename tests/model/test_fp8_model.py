"""FP8 in the whole model: every linear map runs in it and nothing else, and no NaN is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.activation_memory import kept_bytes, rows
from dsv3.config import Fp8Dot, Model
from dsv3.model.block import Block
from dsv3.model.rope import rotation
from dsv3.model.transformer import Transformer, remat
from dsv3.numerics.dot import build
from dsv3.reporting.formats import products, table
from dsv3.sweeps import load_config
from dsv3.training.losses import training_loss

B, T = 2, 8
FP8 = ("float8_e4m3fn", "float8_e5m2")


def fp8_model(small, **values) -> Model:
    return dataclasses.replace(small, dot=Fp8Dot(**values))


def dots(jaxpr, made=None):
    """Every dot_general at any depth, and whether both its operands come straight from FP8.

    Of the branches of `platform_dependent`, which multiply alike, the last is looked at.
    """
    made = dict(made or {})
    for equation in jaxpr.eqns:
        for out in equation.outvars:
            made[out] = equation
        if equation.primitive.name == "dot_general":
            yield equation, all(_from_fp8(made.get(v)) for v in equation.invars)
        if equation.primitive.name == "cond":
            branch = equation.params["branches"][-1].jaxpr
            passed = zip(branch.invars, equation.invars[1:], strict=True)
            yield from dots(branch, {inner: made.get(outer) for inner, outer in passed})
            continue
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


def _from_fp8(made) -> bool:
    """Whether an array was made by converting FP8."""
    converts = made is not None and made.primitive.name == "convert_element_type"
    return converts and made.invars[0].aval.dtype.name in FP8


@pytest.mark.parametrize(("routed", "linear_maps"), [(False, 8), (True, 5 + 3 + 3)])
def test_every_linear_map_multiplies_fp8_and_nothing_falls_back(small, fill, routed, linear_maps):
    config = fp8_model(small)
    block = fill(lambda key: Block(key, config, build(config.dot), routed=routed))
    x_BTD = jnp.ones((B, T, small.width), jnp.bfloat16)
    turn, valid_BT = rotation(small.mla, jnp.arange(T)), jnp.ones((B, T), bool)

    def loss(block, x_BTD):
        return block(x_BTD, turn, valid_BT)[0].astype(jnp.float32).sum()

    found = list(dots(jax.make_jaxpr(jax.grad(loss))(block, x_BTD).jaxpr))
    in_fp8 = [equation for equation, fp8 in found if fp8]
    assert len(in_fp8) == 3 * linear_maps
    for equation, fp8 in found:
        batched = bool(equation.params["dimension_numbers"][1][0])  # core attention
        router = equation.params["precision"] is not None
        assert fp8 or batched or (routed and router), equation


def test_the_table_says_what_the_jaxpr_shows(small):
    rows = {row.name: row.formats for row in products(fp8_model(small))}
    assert rows["moe.attention.o"].cache == "e5m6 1x128"
    assert rows["moe.ffn.routed.down"].wgrad == "e4m3 128x1 x e4m3 128x1"
    for high in ("head", "mtp.0.project", "moe.ffn.router", "moe.attention.core", "embedding"):
        assert "e4m3" not in "".join(rows[high]), high
    assert sum("e4m3" in row.fprop for row in rows.values()) == 8 + 11 + 11 * small.mtp_depths
    plain = table(small)
    assert "e4m3" not in plain and "moe.ffn.routed.gate" in plain


@pytest.fixture(scope="module")
def tokens_BS(small):
    return jnp.asarray(np.random.default_rng(0).integers(small.vocab, size=(B, T + 1)), jnp.int32)


def loss_and_gradients(config, fill, tokens_BS):
    def loss(model):  # FP32, since XLA may leave out BF16 roundings, and FP8 makes much of little
        return training_loss(model, tokens_BS, jnp.ones(()), jnp.dtype("float32"))[0]

    model = fill(lambda key: Transformer(key, config))
    return jax.jit(jax.value_and_grad(loss, allow_int=True))(model)


def test_losses_are_close_to_bf16_and_policies_do_not_change_them(small, fill, tokens_BS):
    plain, _ = loss_and_gradients(small, fill, tokens_BS)
    loss, gradients = loss_and_gradients(fp8_model(small), fill, tokens_BS)
    assert 0 < abs(float(loss - plain)) < 0.05 * float(plain)
    policy = dataclasses.replace(fp8_model(small), remat="report")
    again, same = loss_and_gradients(policy, fill, tokens_BS)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(same), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert (
            np.linalg.norm(one - other) <= 0.05 * np.linalg.norm(one) + 1e-6
        )  # a routing near a tie


def test_the_reports_policy_keeps_fp8_where_bf16_kept_bf16(small, fill):
    config = dataclasses.replace(small, width=256)

    def kept(config):
        rule = build(config.dot)
        block = fill(lambda key: Block(key, config, rule, routed=False))
        turn, valid_BT = rotation(config.mla, jnp.arange(T)), jnp.ones((B, T), bool)
        run = remat("report", lambda b, x: b(x, turn, valid_BT)[0], rule.kept)
        x_BTD = jnp.ones((B, T, config.width), jnp.bfloat16)
        _, vjp = jax.vjp(lambda x: run(block, x), x_BTD)
        return [leaf for leaf in jax.tree.leaves(vjp) if leaf.ndim > 1]

    def formats_of_wide(config):
        """Of SwiGLU's inputs."""
        wide = small.dense_width
        return {leaf.dtype.name for leaf in kept(config) if leaf.shape[-1] == wide}

    assert "uint8" in formats_of_wide(fp8_model(config))
    assert "bfloat16" not in formats_of_wide(fp8_model(config))
    assert "bfloat16" in formats_of_wide(config)


def test_the_bytes_kept_at_the_real_size_are_the_predicted_ones():
    """Under the report's policy a dense block of V3 keeps, for each token: FP8 inputs of q_a and
    kv_a, q_b, kv_b, gate and up, and SwiGLU; E5M6 in front of o; BF16 residuals and latents."""
    config, tokens = load_config("configs/deepseek_v3.py").model, 256
    held = kept_bytes(dataclasses.replace(config, dot=Fp8Dot()), tokens, "report", routed=False)
    tiles = 7168 + 1536 + 512 + 7168 + 2 * 18432
    assert held["uint8"] == (tiles + 16384 * 3 // 2) * tokens
    assert held["bfloat16"] == 2 * (2 * 7168 + 1536 + 576) * tokens
    scales = (tiles + 16384) // 128 * 4 * tokens
    assert scales <= held["float32"] <= scales + 4 * 64 * 2 * tokens  # and the table of rotations
    plain = kept_bytes(config, tokens, "report", routed=False)
    assert plain["bfloat16"] == 2 * (2 * 7168 + 1536 + 576 + 16384 + 2 * 18432) * tokens
    lines = list(rows(small_enough(config), 16))
    assert len(lines) == 2 + 8 and all(line.count("|") == 7 for line in lines)


def small_enough(config):
    return dataclasses.replace(config, width=256, dense_width=512)


def test_a_nan_token_reaches_the_loss(small, fill, tokens_BS):
    config = fp8_model(small)
    model = fill(lambda key: Transformer(key, config))
    model.embedding.table[...] = model.embedding.table[...].at[tokens_BS[0, 0], 0].set(jnp.nan)
    loss = training_loss(model, tokens_BS, jnp.ones(()), jnp.dtype("bfloat16"))[0]
    assert not np.isfinite(loss)
