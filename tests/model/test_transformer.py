"""The whole model: the scan against a loop, rematerialisation, padding, initialisation, 671B."""

import contextlib
import dataclasses
import functools
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.model.block import Block
from dsv3.model.rope import rotation
from dsv3.model.transformer import Transformer, remat
from dsv3.numerics.dot import PlainDot
from dsv3.sweeps import load_config

B, T = 2, 8
TOKENS = np.random.default_rng(0).integers(1, 31, (B, T))
TWO_MOE_LAYERS = {"layers": 2, "dense_layers": 0, "mtp_depths": 0}


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def build(small, fill):
    return lambda **changes: fill(
        lambda key: Transformer(key, dataclasses.replace(small, **changes))
    )


@pytest.fixture(scope="module")
def model(build):
    return build()


jitted = jax.jit(Transformer.__call__, static_argnums=3)


def run(model, tokens_BT, length=T, dtype=None):
    """The model's output, positions from `length` on being padding."""
    valid_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]) < length, tokens_BT.shape)
    return jitted(model, tokens_BT, valid_BT, dtype)


@jax.jit
def loss_and_gradients(model):
    def loss(model):
        out = model(TOKENS)
        squares = [jnp.mean(logits**2) for logits in (out.logits_BTV, *out.mtp_logits)]
        return sum(squares) + out.stats.balance_loss, out.stats

    return jax.value_and_grad(loss, has_aux=True)(model)


# --- structure ---------------------------------------------------------------------------------


def test_the_scan_is_a_loop_over_layers_and_statistics_keep_their_order(model, small):
    turn, valid_BT = rotation(small.mla, jnp.arange(T)), jnp.ones((B, T), bool)
    block = jax.jit(Block.__call__)
    x_BTD, counts, balance = model.embedding(TOKENS), [], 0.0
    for stacked, layers in ((model.dense, small.dense_layers), (model.moe, small.moe_layers)):
        for layer in range(layers):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            x_BTD, routing = block(one, x_BTD, turn, valid_BT)
            if routing is not None:
                counts.append(routing.counts_E)
                balance += routing.balance_loss
    out = run(model, TOKENS)
    np.testing.assert_allclose(out.logits_BTV, model.head(model.norm(x_BTD)), atol=1e-4)
    np.testing.assert_array_equal(out.stats.counts_LE[: small.moe_layers], counts)
    assert out.stats.counts_LE.shape == (small.moe_layers + small.mtp_depths, 8)
    assert len({tuple(row) for row in np.asarray(counts)}) == small.moe_layers  # rows do differ
    assert balance < out.stats.balance_loss < 2 * balance  # the rest is that of the MTP depth


def test_a_block_is_pre_norm_attention_then_pre_norm_ffn(small, fill):
    block = fill(lambda key: Block(key, small, PlainDot(), routed=False))
    turn, x_BTD = rotation(small.mla, jnp.arange(T)), random(0, B, T, small.width)
    wanted = x_BTD + block.attention(block.attention_norm(x_BTD), turn)
    wanted = wanted + block.ffn(block.ffn_norm(wanted))
    y_BTD, routing = jax.jit(Block.__call__)(block, x_BTD, turn, jnp.ones((B, T), bool))
    np.testing.assert_allclose(y_BTD, wanted, atol=1e-4)
    assert routing is None


@pytest.mark.parametrize("changes", [
    {"dense_layers": 0, "mtp_depths": 0}, {"dense_layers": 3, "mtp_depths": 0},
])  # fmt: skip
def test_kinds_of_layers_may_be_absent(build, changes):
    model = build(**changes)
    out = jax.eval_shape(Transformer.__call__, model, TOKENS)
    assert out.logits_BTV.shape == (B, T, 31)
    assert out.stats.counts_LE.shape == (3 - changes["dense_layers"], 8)
    assert out.mtp_logits == ()


def test_the_future_changes_no_logits(model):
    """Gradients cannot see that a later token takes a place at an expert; values can."""
    other = TOKENS.copy()
    other[:, 5:] = (other[:, 5:] + 7) % 30 + 1
    first, second = run(model, TOKENS), run(model, other)
    np.testing.assert_allclose(first.logits_BTV[:, :5], second.logits_BTV[:, :5], atol=1e-4)
    one, two = first.mtp_logits[0], second.mtp_logits[0]
    np.testing.assert_allclose(one[:, :4], two[:, :4], atol=1e-4)
    assert np.abs(one[:, 4] - two[:, 4]).max() > 1e-2  # which reads the token at 5


def test_padding_changes_nothing_before_it(model):
    """A sequence of 5 tokens and 3 of padding gives what its 5 tokens give alone."""
    alone = run(model, TOKENS[:, :5])
    padded = run(model, TOKENS, length=5)
    np.testing.assert_allclose(padded.logits_BTV[:, :5], alone.logits_BTV, atol=1e-4)
    mine, wanted = (out.mtp_logits[0][:, :4] for out in (padded, alone))
    np.testing.assert_allclose(mine, wanted, atol=1e-4)
    np.testing.assert_array_equal(padded.stats.counts_LE, alone.stats.counts_LE)
    np.testing.assert_allclose(padded.stats.balance_loss, alone.stats.balance_loss, rtol=1e-5)


def test_bf16_compute(model):
    exact, rounded = run(model, TOKENS), run(model, TOKENS, dtype=jnp.bfloat16)
    assert rounded.logits_BTV.dtype == jnp.bfloat16
    for wanted, got in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert np.all(np.isfinite(np.asarray(got, np.float32)))
        assert got.shape == wanted.shape
    error = np.linalg.norm(np.float64(rounded.logits_BTV) - np.float64(exact.logits_BTV))
    assert error < 0.1 * np.linalg.norm(exact.logits_BTV)  # a flipped expert choice included
    assert rounded.stats.counts_LE.sum() == exact.stats.counts_LE.sum()


# --- rematerialisation -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_remat(build):
    return loss_and_gradients(build(remat="none", **TWO_MOE_LAYERS))


@pytest.mark.parametrize("policy", ["report", "full"])
def test_recomputing_changes_neither_loss_nor_gradients_nor_counts(build, without_remat, policy):
    (wanted_loss, wanted_stats), wanted = without_remat
    (loss, stats), gradients = loss_and_gradients(build(remat=policy, **TWO_MOE_LAYERS))
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    np.testing.assert_array_equal(stats.counts_LE, wanted_stats.counts_LE)  # nothing counted twice
    for mine, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-4, atol=1e-5)


def block_loss(policy, small):
    """loss(block, x_BTD) under a policy."""
    turn, valid_BT = rotation(small.mla, jnp.arange(T)), jnp.ones((B, T), bool)

    def loss(block, x_BTD):
        y_BTD, routing = remat(policy, lambda b, x: b(x, turn, valid_BT), PlainDot().kept)(
            block, x_BTD
        )
        return y_BTD.sum() + (0.0 if routing is None else routing.balance_loss)

    return loss


def kept(loss, block, x_BTD) -> Counter:
    """What the backward pass keeps, by (name, shape); the arguments are left out."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        jax.ad_checkpoint.print_saved_residuals(loss, block, x_BTD)
    found = Counter()
    for line in printed.getvalue().splitlines():
        if "argument" not in line and "constant" not in line and "literal" not in line:
            name = re.search(r"named '(\w+)'", line)
            found[name[1] if name else line, line.partition("[")[2].partition("]")[0]] += 1
    return found


def operations(jaxpr) -> Counter:
    """How often each primitive occurs, at any depth."""
    found = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += operations(inner)
    return found


@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_the_reports_policy(small, fill, routed):
    """It keeps what it names and recomputes the norms, the up-projections, the scores in between
    and the SwiGLU product (§3.2.3), across the custom derivatives of dot rules and dispatch too."""
    mla, moe = small.mla, small.moe
    attention = {
        ("latent", f"{B},{T},{mla.query_latent}"): 1,
        ("latent", f"{B},{T},{mla.kv_latent + mla.rope_dim}"): 1,
        ("attention", f"{B},{T},{mla.heads},{mla.value_dim}"): 1,
        ("residual", f"{B},{T},{small.width}"): 1,
    }
    blocks = B * T * moe.experts_per_token // moe.block + moe.routed_experts
    rows = blocks * moe.block
    experts = {
        ("routing", f"{B},{T},{moe.routed_experts}"): 1,  # logits
        ("routing", f"{B * T},{moe.experts_per_token}"): 2,  # who is chosen, and their rows
        ("routing", f"{rows}"): 1,
        ("routing", f"{blocks}"): 1,
        ("dispatch", f"{rows},{small.width}"): 1,
        ("swiglu_in", f"{rows},{moe.expert_width}"): 2,
        ("swiglu_in", f"{B},{T},{moe.shared_experts * moe.expert_width}"): 2,
    }
    dense = {("swiglu_in", f"{B},{T},{small.dense_width}"): 2}
    block = fill(lambda key: Block(key, small, PlainDot(), routed=routed))
    x_BTD = random(0, B, T, small.width)
    losses = {policy: block_loss(policy, small) for policy in ("none", "report", "full")}
    assert kept(losses["report"], block, x_BTD) == attention | (experts if routed else dense)
    assert not kept(losses["full"], block, x_BTD)
    assert kept(losses["none"], block, x_BTD).total() > 20

    counted = {
        policy: operations(jax.make_jaxpr(jax.grad(loss))(block, x_BTD).jaxpr)
        for policy, loss in losses.items()
    }
    report, none, full = counted["report"], counted["none"], counted["full"]
    assert report["dot_general"] == none["dot_general"] + 3 < full["dot_general"]  # W^UQ, W^UKV, qk
    assert none["rsqrt"] == 2 * 4  # a norm's own derivative starts from its input again
    assert report["rsqrt"] == 3 * 4
    assert report["sort"] == none["sort"] == int(routed)  # nobody is routed twice


# --- initialisation and the real size ----------------------------------------------------------


def test_initialisation(small):
    """std 0.006 for every matrix, gains 1, biases 0; no two layers alike."""
    config = dataclasses.replace(small, **TWO_MOE_LAYERS)
    model = jax.jit(lambda key: Transformer(key, config))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = jax.tree_util.keystr(path)
        if ".gain" in name or ".bias" in name:
            np.testing.assert_array_equal(leaf, 1.0 if ".gain" in name else 0.0)
        else:
            assert abs(leaf.std() / 0.006 - 1) < 5 * (2 * leaf.size) ** -0.5, name
            assert abs(leaf.mean() / 0.006) < 5 * leaf.size**-0.5, name
    first, second = model.moe.ffn.routed.gate[...]
    assert not np.any(first == second)


@functools.cache
def largest():
    return load_config(Path(__file__).parents[2] / "configs" / "deepseek_v3.py").model


def test_the_671b_model_has_a_forward_and_a_backward_pass():
    """Abstractly, in BF16, under its own rematerialisation."""
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), largest()))

    def loss(model):
        out = model(jnp.zeros((1, 256), jnp.int32), dtype=jnp.bfloat16)
        return jnp.mean(out.logits_BTV.astype(jnp.float32)) + out.stats.balance_loss, out

    (_, out), gradients = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), model)
    assert out.logits_BTV.shape == out.mtp_logits[0].shape == (1, 256, 129_280)
    assert out.stats.counts_LE.shape == (59, 256)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(gradients)}
    assert kinds == {jnp.dtype(jnp.float32)}  # masters' gradients, whatever the compute dtype
