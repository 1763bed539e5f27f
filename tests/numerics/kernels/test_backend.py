"""The dot rules with kernels behind them against the rules without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Bf16Dot, Fp8Dot, HopperAccumulator
from dsv3.errors import ConfigError
from dsv3.model.moe import experts_here
from dsv3.numerics.dot import build, placed
from dsv3.numerics.operand import Swiglu
from tests.numerics.kernels.arrays import apart, random

EXPERTS = 2
EXPERT_Z = jnp.array([1, EXPERTS], jnp.int32)
CLOSE = 2**-8  # a tie of FP8 rounding may fall either way; the results are BF16


def results(rule, x, ws, dy, expert_Z=None):
    """The product, and the gradients of x and of the weights."""

    def product(x, *ws):
        ys = rule.last_axis(x, *ws) if expert_Z is None else rule.grouped(x, ws, expert_Z)
        return jnp.concatenate(ys, axis=-1)

    y, vjp = jax.vjp(product, x, *ws)
    return y, *vjp(dy)


FINE = Fp8Dot(scales="power_of_two")
ABLATIONS = {
    "fine": FINE,
    "blocks": dataclasses.replace(FINE, gradient_groups="block", gradient_format="e5m2"),
}


@pytest.mark.parametrize("config", ABLATIONS.values(), ids=ABLATIONS)
def test_the_dense_rule_with_kernels_is_the_rule(interpret, config):
    x, ws, dy = random(0, 36, 72), [random(1, 72, 40)], random(3, 36, 40)
    with interpret():
        mine = results(build(dataclasses.replace(config, backend="mosaic")), x, ws, dy)
    assert apart(mine, results(build(config), x, ws, dy)) <= CLOSE


@pytest.mark.parametrize("config", [FINE, Bf16Dot()], ids=["fp8", "bf16"])
def test_the_grouped_rules_with_kernels_are_the_rules(interpret, config):
    x, dy = random(0, 256, 72), random(3, 256, 60)
    ws = random(1, EXPERTS, 72, 40), random(2, EXPERTS, 72, 20)
    with interpret():
        rule = build(dataclasses.replace(config, backend="mosaic"))
        mine = results(rule, x, ws, dy, EXPERT_Z)
    assert apart(mine, results(build(config), x, ws, dy, EXPERT_Z)) <= CLOSE


@pytest.mark.parametrize("experts", [False, True], ids=["any rank", "experts"])
def test_swiglu_with_kernels_is_the_rules(interpret, experts):
    rows = (128,) if experts else (3, 12)
    weight = random(2, *rows, 1, dtype=jnp.float32) if experts else None
    x, dy = Swiglu(random(0, *rows, 72), random(1, *rows, 72), weight), random(4, *rows, 20)
    w = random(3, EXPERTS, 72, 20) if experts else random(3, 72, 20)
    expert_Z = EXPERT_Z[:1] if experts else None
    with interpret():
        rule = build(dataclasses.replace(FINE, backend="mosaic"))
        mine = results(rule, x, [w], dy, expert_Z)
    assert apart(mine, results(build(FINE), x, [w], dy, expert_Z)) <= CLOSE


@pytest.mark.parametrize("config", [FINE, Bf16Dot()], ids=["fp8", "bf16"])
def test_the_few_rows_of_decoding_are_in_the_kernels_blocks(interpret, config):
    """Two tokens, of five experts two each: fewer blocks than experts."""
    weights = [random(i, *shape) for i, shape in enumerate([(5, 40, 24), (5, 40, 24), (5, 24, 40)])]
    u_XD, experts_XK = random(3, 2, 40), jnp.array([[1, 4], [4, 0]], jnp.int32)
    operands = 4, u_XD, experts_XK, random(4, 2, 2, dtype=jnp.float32)
    with interpret():
        rule = build(dataclasses.replace(config, backend="mosaic"))
        mine = experts_here(rule, 128, weights, *operands)
    assert apart([mine], [experts_here(build(config), 128, weights, *operands)]) <= CLOSE


def test_fp32_rows_stay_with_the_loop():
    shapes = [(256, 8), (256, 8), (EXPERTS, 8, 8)]
    x, dy, w = (random(i, *shape, dtype=jnp.float32) for i, shape in enumerate(shapes))
    mine = results(build(Bf16Dot(backend="mosaic")), x, [w], dy, EXPERT_Z)
    for a, b in zip(mine, results(build(Bf16Dot()), x, [w], dy, EXPERT_Z), strict=True):
        np.testing.assert_array_equal(a, b)


def test_hopper_takes_the_kernels_where_they_fit():
    assert placed(Fp8Dot(), "hopper").backend == "mosaic"
    assert placed(Bf16Dot(), "hopper").backend == "mosaic"
    assert placed(Bf16Dot(), "gpu").backend == placed(Bf16Dot(), "cpu").backend == "xla"
    assert placed(Fp8Dot(), "hopper", block=64).backend == "dequant"
    assert placed(Fp8Dot(accumulator=HopperAccumulator()), "hopper").backend == "reference"
    assert placed(Fp8Dot(backend="dequant"), "hopper").backend == "dequant"


@pytest.mark.parametrize(("platform", "block"), [("gpu", 128), ("cpu", 128), ("hopper", 96)])
def test_kernels_that_cannot_run_are_refused_by_name(platform, block):
    with pytest.raises(ConfigError, match=r"model\.dot\.backend = 'mosaic' needs"):
        placed(Fp8Dot(backend="mosaic"), platform, block)


def test_an_emulated_accumulator_has_no_kernel():
    with pytest.raises(ConfigError, match=r"does not multiply by model\.dot\.accumulator"):
        Fp8Dot(backend="mosaic", accumulator=HopperAccumulator())
