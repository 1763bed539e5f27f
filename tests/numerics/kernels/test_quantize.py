"""One-pass quantisation in interpret mode, bit for bit as `fp8.quantize` has it.

Scales are powers of two where bits are compared: divided by any other, XLA may multiply by the
reciprocal, which rounds a tie to the other side.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.numerics import fp8
from dsv3.numerics.fp8 import BLOCK, COLUMN, TILE, dequantize
from dsv3.numerics.kernels.persistent import round_up
from dsv3.numerics.kernels.quantize import Tiles, both_ways, squares, swiglu_tiles, tiles
from dsv3.numerics.operand import Swiglu, value

ROWS, COLUMNS = 132, 136  # one tile and a bit, both ways


def x_of(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, COLUMNS)) * np.exp(draw.normal(size=(ROWS, 1)))
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
def test_tiles_and_squares_are_the_quantisers_bit_for_bit(interpret, dtype, transposed):
    x = x_of(dtype)
    with interpret():
        mine = tiles(x, transposed, "e5m2", True)
        square = squares(x[None], transposed, "e4m3", True)
    wanted = fp8.quantize(x, COLUMN if transposed else TILE, "e5m2", True)
    blocks = fp8.quantize(x, BLOCK, "e4m3", True)
    values, scales, block_values, block_scales = (
        leaf.T if transposed else leaf for leaf in (*wanted, *blocks)
    )
    M, K = values.shape
    np.testing.assert_array_equal(mine.values_MK[:, :K], values)
    np.testing.assert_array_equal(mine.scales_kM[:, :M], scales.T)
    np.testing.assert_array_equal(square.values_ENK[0, :, :K], block_values)
    np.testing.assert_array_equal(square.scales_Ekn4[0, ..., 3], block_scales.T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_both_ways_at_once_are_each_way_bit_for_bit(interpret, dtype):
    x = x_of(dtype)
    with interpret():
        at_once = both_ways(x, "e5m2", True)
        mine = tiles(x, False, "e5m2", True), tiles(x, True, "e5m2", True)
    jax.tree.map(np.testing.assert_array_equal, at_once, mine)


def test_a_cached_activation_is_grouped_anew(interpret):
    cached = fp8.quantize(x_of(), TILE)
    with interpret():
        mine = tiles(cached.values, True, "e4m3", True, round_up(cached.scales.T, 1, 4))
    wanted = fp8.quantize(dequantize(cached), COLUMN, "e4m3", True)
    np.testing.assert_array_equal(mine.values_MK[:, :ROWS], wanted.values.T)
    np.testing.assert_array_equal(mine.scales_kM[:, :COLUMNS], wanted.scales)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("cached", [False, True], ids=["", "from a cache"])
def test_swiglu_is_computed_as_it_is_quantised_bit_for_bit(interpret, dtype, cached):
    """The kernel and `value` share their formula, and on a CPU the exponential as well."""
    x = Swiglu(x_of(dtype), x_of(dtype)[::-1], abs(x_of()[:, :1]))
    inputs = x
    if cached:
        stored = x.each(lambda x: fp8.quantize(x, TILE))
        x = stored.each(lambda q: dequantize(q, dtype))
        inputs = stored.each(lambda q: Tiles(q.values, round_up(q.scales.T, 1, 4)))
    with interpret():
        mine = swiglu_tiles(inputs, dtype, "e4m3", True)
    wanted = fp8.quantize(value(x), TILE, "e4m3", True)
    np.testing.assert_array_equal(mine.values_MK[:, :COLUMNS], wanted.values)
    np.testing.assert_array_equal(mine.scales_kM[:, :ROWS], wanted.scales.T)


def test_nan_infinity_zeros_and_denormals(interpret):
    x = x_of().at[3, 5].set(jnp.nan).at[7, 130].set(jnp.inf).at[0].set(0.0).at[1].mul(1e-38)
    with interpret():
        mine = tiles(x, False)
    again = fp8.Quantized(mine.values_MK[:, :COLUMNS], mine.scales_kM[:, :ROWS].T)
    np.testing.assert_array_equal(dequantize(again), dequantize(fp8.quantize(x, TILE)))
    assert np.isnan(dequantize(again)[3, 5]) and np.isnan(dequantize(again)[7, 130])


@pytest.mark.parametrize(
    ("x", "scales", "says"),
    [
        (jnp.zeros((4, 128), jnp.float16), None, "x is float16"),
        (jnp.zeros((4, 128), jnp.float8_e4m3fn), None, "needs the scales"),
        (jnp.zeros((4, 256), jnp.float8_e4m3fn), jnp.ones((1, 4)), r"wants \[2, at least 4\]"),
        (jnp.zeros((4, 128)), jnp.ones((1, 4)), "x is float32"),
    ],
)
def test_other_inputs_are_refused(x, scales, says):
    with pytest.raises(ValueError, match=says):
        tiles(x, False, scales=scales)


@pytest.mark.parametrize(
    ("up", "weight", "says"),
    [
        (jnp.zeros((4, 128)), None, "up float32.* both must be bfloat16"),
        (jnp.zeros((4, 64), jnp.bfloat16), None, r"up bfloat16\[4, 64\]"),
        (jnp.zeros((4, 128), jnp.bfloat16), jnp.ones(4), r"weight is \[4\], not \[4, 1\]"),
    ],
)
def test_inputs_of_swiglu_that_differ_are_refused(up, weight, says):
    with pytest.raises(ValueError, match=says):
        swiglu_tiles(Swiglu(jnp.zeros((4, 128), jnp.bfloat16), up, weight), jnp.bfloat16)
