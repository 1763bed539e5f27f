"""FP8 dot rules: exact on what was quantised, close to what was not, small to keep."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.bindings import apply
from dsv3.config import Config, ExactAccumulator, Fp8Dot, HopperAccumulator
from dsv3.errors import ConfigError
from dsv3.numerics import fp8
from dsv3.numerics.dot import PlainDot, build, placed
from dsv3.numerics.fp8 import BLOCK, COLUMN, TILE, dequantize, quantize
from dsv3.numerics.fp8_dot import Fp8Rule, Fp8Wire, backend_of
from dsv3.numerics.operand import Swiglu, value
from dsv3.numerics.products import Dequantized, Hopper, Promoted, exact_product
from dsv3.numerics.rule import PlainWire
from tests.numerics.measures import error, random, unlikeness

RULE = Fp8Rule(Fp8Dot())
EXPERTS, BLOCK_ROWS, INPUTS, OUTPUTS = 3, 128, 200, 136  # widths that are no multiples of 128
EXPERT_Z = jnp.array([0, 2, 2, EXPERTS], jnp.int32)


# --- the dense rule ----------------------------------------------------------------------------


def linear(rule):
    return lambda x, w: rule.last_axis(x, w)[0]


def gradients(rule, x, w, dy):
    y, vjp = jax.vjp(linear(rule), x, w)
    return y, *vjp(dy)


def test_each_gemm_multiplies_what_the_report_says():
    x, w, dy = random(0, 150, INPUTS), random(1, INPUTS, OUTPUTS), random(2, 150, OUTPUTS)
    y, dx, dw = jax.jit(functools.partial(gradients, RULE))(x, w, dy)
    q_x, q_w, q_dy = quantize(x, TILE), quantize(w, BLOCK), quantize(dy, TILE)
    again = quantize(dequantize(q_x), COLUMN)
    assert error(y, exact_product(q_x, q_w, (1, 0))) < 1e-6
    assert error(dx, exact_product(q_dy, q_w, (1, 1))) < 1e-6
    assert error(dw, exact_product(again, quantize(dy, COLUMN), (0, 0))) < 1e-6
    assert unlikeness(y, x @ w) < 1e-3 > unlikeness(dx, dy @ w.T)
    assert unlikeness(dw, x.T @ dy) < 1e-3  # 0.996e-3: x was rounded twice


def test_powers_of_two_make_the_second_rounding_of_x_a_mere_shift():
    """Wgrad's x is grouped 1x128, cached, and grouped 128x1: the reason for §3.3.3's scales."""
    x, w, dy = random(0, 256, 256), random(1, 256, 136), random(2, 256, 136)
    wanted = {"float32": (9e-4, 1.1e-3), "power_of_two": (6e-4, 8e-4)}
    for scales, (low, high) in wanted.items():
        rule = Fp8Rule(Fp8Dot(scales=scales))
        _, _, dw = jax.jit(functools.partial(gradients, rule))(x, w, dy)
        assert low < unlikeness(dw, x.T @ dy) < high
    once = dequantize(quantize(x, TILE, power_of_two=True))
    np.testing.assert_array_equal(dequantize(quantize(once, COLUMN, power_of_two=True)), once)


def test_dtypes_follow_the_contract():
    x, w, dy = random(0, 64, 128, dtype=jnp.bfloat16), random(1, 128, 64), random(2, 64, 64)
    y, dx, dw = gradients(RULE, x, w, dy.astype(jnp.bfloat16))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def kept_by(function, *args):
    """The arrays that the backward pass keeps, without the arguments themselves."""
    _, vjp = jax.vjp(function, *args)
    mine = {id(a) for a in args}
    return [leaf for leaf in jax.tree.leaves(vjp) if id(leaf) not in mine and leaf.ndim]


def test_the_cached_activation_costs_a_byte_an_element():
    x, w = random(0, 256, 512, dtype=jnp.bfloat16), random(1, 512, 128)
    kept = kept_by(linear(RULE), x, w)
    assert sorted((leaf.dtype.name, leaf.shape) for leaf in kept) == [
        ("float32", (256, 4)), ("uint8", (256, 512)),
    ]  # fmt: skip
    kept = kept_by(linear(RULE.after_attention), x, w)
    assert sum(leaf.nbytes for leaf in kept) == 256 * (512 * 3 // 2 + 4 * 4)


def test_a_compiled_scan_over_maps_keeps_a_byte_an_element():
    """Of XLA's temporary memory, what one more map adds; FP8 arrays would become FP16 here."""
    rows, width = 256, 512

    def temporary(rule, layers):
        def loss(ws, x):
            return jax.lax.scan(lambda x, w: (linear(rule)(x, w), None), x, ws)[0].sum()

        ws = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
        x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
        compiled = jax.jit(jax.grad(loss)).lower(ws, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def kept(rule):
        return (temporary(rule, 16) - temporary(rule, 8)) / 8 / rows

    # Within a hundredth: how XLA packs what lives inside a map changes a little with the depth.
    assert kept(PlainDot()) == pytest.approx(2 * width, rel=0.01)
    assert kept(RULE) == pytest.approx(width + width // 128 * 4, rel=0.01)
    assert kept(RULE.after_attention) == pytest.approx(width * 3 / 2 + width // 128 * 4, rel=0.01)


def test_products_of_one_input_keep_it_once():
    x, a, b = random(0, 64, 256), random(1, 256, 40), random(2, 256, 24)
    kept = kept_by(RULE.last_axis, x, a, b)
    assert sorted(leaf.dtype.name for leaf in kept) == ["float32", "uint8"]
    dys = [random(3, 64, 40), random(4, 64, 24)]
    dx, da, db = jax.vjp(RULE.last_axis, x, a, b)[1](dys)
    (_, dx_a, da_alone), (_, dx_b, db_alone) = (
        gradients(RULE, x, w, dy) for w, dy in zip((a, b), dys, strict=True)
    )
    np.testing.assert_allclose(dx, dx_a + dx_b, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(da, da_alone)
    np.testing.assert_array_equal(db, db_alone)


def test_scales_after_attention_and_on_the_wire_are_powers_of_two():
    x = random(0, 8, 256)
    for rule in (RULE.after_attention, RULE.after_dispatch):
        assert (np.log2(quantize(x, *rule.activation).scales) % 1 == 0).all()
        assert (np.log2(quantize(x, *rule.column).scales) % 1 == 0).all()
    assert (np.log2(quantize(x, *RULE.before_combine.gradient).scales) % 1 == 0).all()
    assert not (np.log2(quantize(x, *RULE.activation).scales) % 1 == 0).all()


def test_the_product_on_arrival_multiplies_the_bytes_that_were_sent():
    x = random(0, 40, INPUTS, dtype=jnp.bfloat16)
    sent = Fp8Wire().pack(x)
    arrived = quantize(Fp8Wire().unpack(sent, x.dtype), *RULE.after_dispatch.activation)
    np.testing.assert_array_equal(dequantize(arrived), dequantize(sent))


def test_ablations_do_not_round_on_the_wire_what_they_group_otherwise():
    assert Fp8Rule(Fp8Dot(groups="tensor")).wire == PlainWire()
    assert Fp8Rule(Fp8Dot(gradient_groups="block")).gradient_wire == PlainWire()
    assert Fp8Rule(Fp8Dot(gradient_groups="block")).wire == Fp8Wire()
    e5m2 = Fp8Rule(Fp8Dot(gradient_format="e5m2"))
    dy = random(0, 40, INPUTS, dtype=jnp.bfloat16)
    sent = e5m2.gradient_wire.pack(dy)
    assert sent.values.dtype == jnp.float8_e5m2
    unpacked = e5m2.gradient_wire.unpack(sent, dy.dtype)
    arrived = quantize(unpacked, *e5m2.before_combine.gradient)
    np.testing.assert_array_equal(dequantize(arrived), dequantize(sent))


def test_it_drops_into_a_flax_linear():
    layer = nnx.Linear(
        256, 128, use_bias=False, dot_general=RULE.dot_general, rngs=nnx.Rngs(0),
        promote_dtype=lambda args, **_: args,
    )  # fmt: skip
    x = random(0, 4, 256)
    wanted = exact_product(quantize(x, TILE), quantize(layer.kernel[...], BLOCK), (1, 0))
    assert error(layer(x), wanted) < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_output_and_both_gradients(bad):
    w, dy = random(1, 256, 128), random(2, 130, 128)
    x = random(0, 130, 256).at[3, 4].set(bad)
    y, _, dw = gradients(RULE, x, w, dy)
    assert not np.isfinite(y[3]).any() and np.isfinite(y[4]).all()
    assert not np.isfinite(dw[4]).any()
    _, dx, dw = gradients(RULE, random(0, 130, 256), w, dy.at[3, 4].set(bad))
    assert not np.isfinite(dx[3]).any() and not np.isfinite(dw[:, 4]).any()


# --- the grouped rule --------------------------------------------------------------------------


def test_fewer_blocks_than_experts_are_multiplied_as_more_are():
    """Quantising their weights alone changes no bit; so decoding a token has what training had."""
    x, w, dy = grouped_operands()
    few, many = jnp.array([0, 2]), jnp.array([0, 2, EXPERTS, EXPERTS])

    rows = 2 * BLOCK_ROWS

    @functools.partial(jax.jit, static_argnames="length")
    def of(expert_Z, length):
        y, vjp = jax.vjp(lambda x, w: RULE.grouped(x, [w], expert_Z)[0], x[:length], w)
        dx, dw = vjp(dy[:length])
        return y[:rows], dx[:rows], dw

    for a, b in zip(of(few, rows), of(many, 2 * rows), strict=True):
        np.testing.assert_array_equal(a, b)


def grouped_operands(dtype=jnp.float32):
    rows = BLOCK_ROWS * len(EXPERT_Z)
    x, w = random(0, rows, INPUTS, dtype=dtype), random(1, EXPERTS, INPUTS, OUTPUTS)
    return x, w, random(2, rows, OUTPUTS, dtype=dtype)


@pytest.mark.parametrize(
    "config",
    [Fp8Dot(), Fp8Dot(groups="tensor"), Fp8Dot(gradient_groups="block"), Fp8Dot(backend="dequant")],
    ids=["fine", "tensor", "block gradients", "dequant"],
)
def test_grouped_is_dense_expert_by_expert(config):
    rule = Fp8Rule(config)
    x, w, dy = grouped_operands()
    dy = dy.at[-BLOCK_ROWS:].set(0)  # nothing comes back for the unused block

    def run(x, w):
        return rule.grouped(x, [w], EXPERT_Z)[0]

    y, (dx, dw) = jax.jit(lambda x, w, dy: (run(x, w), jax.vjp(run, x, w)[1](dy)))(x, w, dy)
    if config.groups == "tensor":  # one scale for all blocks: close to, not equal to, each alone
        assert unlikeness(y[:BLOCK_ROWS], x[:BLOCK_ROWS] @ w[0]) < 1e-3
        return
    used = [(z, e) for z, e in enumerate(EXPERT_Z.tolist()) if e < EXPERTS]
    dw_alone = np.zeros(w.shape, np.float32)
    for z, e in used:
        at = slice(z * BLOCK_ROWS, (z + 1) * BLOCK_ROWS)
        y_z, dx_z, dw_z = gradients(rule, x[at], w[e], dy[at])
        assert error(y[at], y_z) < 1e-6 and error(dx[at], dx_z) < 1e-6
        dw_alone[e] += dw_z
    assert error(dw, dw_alone) < 1e-6
    assert not np.asarray(dw[1]).any()  # an expert without tokens
    assert not np.asarray(y[-BLOCK_ROWS:]).any()  # a block without an expert


def test_blocks_shorter_than_a_group():
    x, w, dy = grouped_operands()
    x, dy = x[: 32 * 4], dy[: 32 * 4]
    [y], vjp = jax.vjp(lambda x, w: RULE.grouped(x, [w], EXPERT_Z), x, w)
    dx, dw = vjp((dy.at[96:].set(0),))
    assert unlikeness(y[:32], x[:32] @ w[0]) < 1e-3 > unlikeness(dx[:32], dy[:32] @ w[0].T)
    assert unlikeness(dw[0], x[:32].T @ dy[:32]) < 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_expert_and_is_seen(bad):
    x, w, dy = grouped_operands()
    row = BLOCK_ROWS + 3  # of expert 2
    _, vjp = jax.vjp(lambda x, w: RULE.grouped(x, [w], EXPERT_Z), x.at[row, 4].set(bad), w)
    [y] = RULE.grouped(x.at[row, 4].set(bad), [w], EXPERT_Z)
    _, dw = vjp((dy,))
    assert not np.isfinite(y[row]).any() and np.isfinite(y[:BLOCK_ROWS]).all()
    assert not np.isfinite(dw[2][4]).any() and np.isfinite(dw[0]).all()


def test_no_group_spans_two_weights():
    """Gate and up share the quantised input and nothing else, whatever their width."""
    x, w, dy = grouped_operands()
    other = 100 * random(5, EXPERTS, INPUTS, 72)

    def together(x, w, other):
        return RULE.grouped(x, [w, other], EXPERT_Z)

    (y, _), vjp = jax.vjp(together, x, w, other)
    [alone], vjp_alone = jax.vjp(lambda x, w: RULE.grouped(x, [w], EXPERT_Z), x, w)
    np.testing.assert_array_equal(y, alone)
    dys = dy, 1e3 * random(6, len(dy), 72)
    np.testing.assert_allclose(vjp(dys)[1], vjp_alone((dy,))[1], rtol=1e-6)


def test_grouped_keeps_fp8():
    x, w, _ = grouped_operands(jnp.bfloat16)
    kept = kept_by(lambda x, w: RULE.grouped(x, [w], EXPERT_Z), x, w)
    assert sum(leaf.nbytes for leaf in kept if leaf.ndim > 1) == x.size + 4 * x.shape[0] * 2


# --- recomputation from the cache --------------------------------------------------------------


def test_swiglu_is_computed_again_from_its_rounded_inputs():
    x = Swiglu(random(0, 9, 256), random(1, 9, 256), random(4, 9, 1))
    w, dy = random(2, 256, 8), random(3, 9, 8)

    def product(x, w):
        return RULE.last_axis(x, w)[0]

    y, vjp = jax.vjp(product, x, w)
    np.testing.assert_array_equal(y, product(value(x), w))
    dx, dw = vjp(dy)
    rounded = x.each(lambda x: dequantize(quantize(x, TILE)))
    hidden, vjp_hidden = jax.vjp(value, rounded)
    dh, dw_wanted = jax.vjp(product, hidden, w)[1](dy)
    jax.tree.map(np.testing.assert_array_equal, (dx, dw), (*vjp_hidden(dh), dw_wanted))
    kept = Counter(leaf.dtype.name for leaf in kept_by(product, x, w))
    assert kept == {"uint8": 2, "float32": 3}  # gate, up, their scales, each row's weight


# --- the ablations -----------------------------------------------------------------------------


def test_every_alternative_computes_and_differs():
    x, w, dy = random(0, 128, 256), random(1, 256, 128), random(2, 128, 128)
    plain = (x @ w, dy @ w.T, x.T @ dy)
    variants = {
        "report": Fp8Dot(),
        "tensor": Fp8Dot(groups="tensor"),
        "powers": Fp8Dot(scales="power_of_two"),
        "e5m2": Fp8Dot(gradient_format="e5m2"),
        "block": Fp8Dot(gradient_groups="block"),
        "hopper": Fp8Dot(accumulator=HopperAccumulator(64)),
        "unpromoted": Fp8Dot(groups="tensor", accumulator=HopperAccumulator(None)),
        "dequant": Fp8Dot(backend="dequant"),
    }
    seen = {}
    for name, config in variants.items():
        result = gradients(build(config), x, w, dy)
        assert all(unlikeness(g, t) < 1e-2 for g, t in zip(result, plain, strict=True))
        seen[name] = np.concatenate([np.ravel(r) for r in result])
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (seen[one] != seen[other]).any(), (one, other)


def test_block_gradients_are_worse_where_tokens_differ_in_size():
    """App. B.2: a block's scale is set by its largest token; small tokens lose their gradient."""
    w = random(1, 256, 256)
    sizes = 10.0 ** np.random.default_rng(3).uniform(-8, 2, size=(256, 1))
    dy = random(2, 256, 256) * jnp.asarray(sizes, jnp.float32)
    x = random(0, 256, 256)

    def worst(rule):
        _, dx, _ = gradients(rule, x, w, dy)
        per_token = np.linalg.norm(dx - dy @ w.T, axis=1) / np.linalg.norm(dy @ w.T, axis=1)
        return np.median(per_token)

    assert worst(Fp8Rule(Fp8Dot(gradient_groups="block"))) > 3 * worst(RULE)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"groups": "tensor", "gradient_groups": "block"}, ("gradient_groups", "groups")),
        ({"accumulator": HopperAccumulator(None)}, ("groups", "accumulator.promote_every")),
        ({"accumulator": HopperAccumulator(4096)}, ("groups", "accumulator.promote_every")),
        ({"accumulator": "hopper", "backend": "dequant"}, ("backend", "accumulator")),
    ],
)
def test_impossible_combinations_name_both_fields(values, names):
    with pytest.raises(ConfigError) as caught:
        Fp8Dot(**values)
    assert all(f"model.dot.{name}" in str(caught.value) for name in names)


def test_an_odd_input_of_the_output_projection_names_both_fields():
    odd = {"model.dot": "fp8", "model.mla.heads": 3, "model.mla.value_dim": 5}
    with pytest.raises(ConfigError, match=r"model\.dot = 'fp8' .*model\.mla\.heads · value_dim"):
        apply(Config(), odd)


def test_bindings_reach_the_alternatives():
    config = apply(Config(), {"model.dot": "fp8", "model.dot.scales": "power_of_two"})
    assert config.model.dot == Fp8Dot(scales="power_of_two")
    assert backend_of(config.model.dot) == Promoted()
    assert backend_of(dataclasses.replace(config.model.dot, backend="dequant")) == Dequantized()
    assert Fp8Dot().accumulator == ExactAccumulator()
    assert hash(build(Fp8Dot())) == hash(build(Fp8Dot()))
    assert fp8.GROUP == 128


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_platform_chooses_where_the_configuration_does_not(platform):
    wanted = "reference" if platform == "cpu" else "dequant"
    assert placed(Fp8Dot(), platform).backend == wanted
    assert placed(Fp8Dot(backend="dequant"), platform).backend == "dequant"
    emulated = Fp8Dot(accumulator=HopperAccumulator())
    assert backend_of(placed(emulated, platform)) == Hopper(128)
