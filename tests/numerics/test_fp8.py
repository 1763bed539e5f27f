"""Quantisers against a NumPy / ml_dtypes oracle, bit for bit; E5M6 against all of its numbers."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.numerics import fp8
from dsv3.numerics.fp8 import BLOCK, COLUMN, GROUP, TENSOR, TILE, Quantized

GROUPS = {"tile": TILE, "column": COLUMN, "block": BLOCK, "tensor": TENSOR}
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
SHAPE = (130, 200)  # whole and partial groups both ways


@functools.cache
def compiled(group, form, powers):
    return jax.jit(functools.partial(fp8.quantize, group=group, form=form, power_of_two=powers))


def oracle(x, group, form, powers):
    """Group by group, in FP32, with IEEE division; denormal inputs count as zeros."""
    limit = np.float32(ml_dtypes.finfo(DTYPES[form]).max)
    rows, columns = group[0] or x.shape[0], group[1] or x.shape[1]
    grid = (-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    scales, values = np.zeros(grid, np.float32), np.zeros(x.shape, DTYPES[form])
    for i in range(grid[0]):
        for j in range(grid[1]):
            at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            tile = x[at]
            scale = max(np.abs(tile).max() / limit, np.float32(2.0**-100))
            if powers:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            scales[i, j] = scale
            values[at] = np.clip(tile / scale, -limit, limit).astype(DTYPES[form])
    return values, scales


def check(x, group, form="e4m3", powers=False):
    q = compiled(group, form, powers)(x)
    values, scales = oracle(x, group, form, powers)
    np.testing.assert_array_equal(np.asarray(q.scales), scales)
    np.testing.assert_array_equal(np.asarray(q.values).view(np.uint8), values.view(np.uint8))


def spread(seed, decades):
    """Normal entries, each group of 64 columns and each row at a scale of its own."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-decades, decades, size=(SHAPE[0], -(-SHAPE[1] // 64)))
    return (rng.normal(size=SHAPE) * np.repeat(size, 64, axis=1)[:, : SHAPE[1]]).astype(np.float32)


@pytest.mark.parametrize("powers", [False, True], ids=["float32 scales", "powers of two"])
@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_random_tiles(group, form, powers):
    for decades in (0, 3, 15):
        check(spread(decades, decades), group, form, powers)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_ties_of_bf16_numbers_are_divided_exactly(group):
    """Short mantissas meet the middle between two FP8 numbers: a product with 1 / s, rounded
    twice, puts some of them on the wrong side."""
    x = spread(2, 0).astype(ml_dtypes.bfloat16).astype(np.float32)
    check(x, group)


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 448.0, 464.0, 1e-45, 1e-38, 2.0**-109, 3.4e38, 1e-4, 57344.0]),
)


@given(
    hnp.arrays(np.float32, (3, 8), elements=FLOATS),
    st.booleans(),
    st.sampled_from([TILE, COLUMN, BLOCK]),
)
def test_adversarial_groups(corner, powers, group):
    x = np.zeros((GROUP + 2, GROUP + 4), np.float32)
    x[-3:, -8:] = corner  # across the borders of whole and partial groups
    check(x, group, "e4m3", powers)


def test_zeros_stay_zeros_and_denormals_vanish():
    for x in (np.zeros(SHAPE, np.float32), np.full(SHAPE, 1e-40, np.float32)):
        q = compiled(TILE, "e4m3", False)(x)
        assert not np.asarray(fp8.dequantize(q)).any() and np.isfinite(q.scales).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_what_is_not_finite_becomes_nan_and_stays_in_its_group(group, bad):
    x = spread(0, 0)
    x[5, 7] = bad
    for powers in (False, True):
        back = np.asarray(fp8.dequantize(compiled(group, "e4m3", powers)(x)))
        rows, columns = group[0] or SHAPE[0], group[1] or SHAPE[1]
        outside = np.ones(SHAPE, bool)
        at = (5 // rows * rows, 7 // columns * columns)
        outside[at[0] : at[0] + rows, at[1] : at[1] + columns] = False
        assert np.isnan(back[5, 7]) and np.isfinite(back[outside]).all()


def test_the_error_of_a_round_trip_is_half_a_step():
    x = spread(1, 0)
    q = compiled(TILE, "e4m3", False)(x)
    largest = np.repeat(np.asarray(q.scales), GROUP, axis=1)[:, : SHAPE[1]] * 448
    error = np.abs(np.asarray(fp8.dequantize(q)) - x)
    # 3 mantissa bits: 2^-4 of the number, or half the subnormal step 2^-9 of the scaled range
    assert (error <= np.maximum(np.abs(x) / 16, largest / 448 * 2.0**-10) * 1.0001).all()


def test_quantising_twice_with_powers_of_two_changes_nothing():
    x = spread(2, 4)
    once = np.asarray(fp8.dequantize(compiled(TILE, "e4m3", True)(x)))
    twice = np.asarray(fp8.dequantize(compiled(TILE, "e4m3", True)(once)))
    np.testing.assert_array_equal(once, twice)


def test_stacks_are_quantised_one_by_one():
    x = np.stack([spread(0, 1), spread(1, 1)])
    q = fp8.quantize(x, BLOCK)
    for i in range(2):
        one = fp8.quantize(x[i], BLOCK)
        np.testing.assert_array_equal(q.scales[i], one.scales)
        np.testing.assert_array_equal(fp8.dequantize(q)[i], fp8.dequantize(one))


# --- E5M6 --------------------------------------------------------------------------------------


def e5m6_numbers():
    """Every finite non-negative number of the format, by its definition."""
    subnormal = [m / 64 * 2.0**-14 for m in range(64)]
    normal = [(1 + m / 64) * 2.0**e for e in range(-14, 16) for m in range(64)]
    return np.array(subnormal + normal, np.float64)


def test_every_e5m6_number_survives_and_takes_a_byte_and_a_half():
    numbers = e5m6_numbers().astype(np.float32)
    signed = np.concatenate([numbers, -numbers])
    tiles = np.zeros((len(signed), GROUP), np.float32)
    tiles[:, 0], tiles[:, 1] = fp8.E5M6_MAX, signed  # the largest number fixes the scale at 1
    packed = fp8.pack_e5m6(tiles)
    assert packed.values.dtype == jnp.uint8 and packed.values.shape == (len(signed), GROUP * 3 // 2)
    assert (np.asarray(packed.scales) == 1).all()
    np.testing.assert_array_equal(fp8.unpack_e5m6(packed), tiles)


def test_e5m6_rounds_to_the_nearest_number():
    x = np.random.default_rng(0).normal(size=(40, 200)).astype(np.float32)
    packed = fp8.pack_e5m6(x)
    scales = np.repeat(np.asarray(packed.scales, np.float64), GROUP, axis=1)[:, :200]
    assert (np.log2(np.asarray(packed.scales)) % 1 == 0).all()
    numbers, scaled = e5m6_numbers(), np.abs(x) / scales
    nearest = np.abs(numbers[None, :] - scaled.reshape(-1, 1)).min(axis=1).reshape(x.shape)
    np.testing.assert_array_equal(np.abs(np.asarray(fp8.unpack_e5m6(packed)) - x) / scales, nearest)


def test_e5m6_spoils_what_is_not_finite_and_wants_pairs():
    x = np.ones((2, 256), np.float32)
    x[0, 3] = np.inf
    back = np.asarray(fp8.unpack_e5m6(fp8.pack_e5m6(x)))
    assert np.isnan(back[0, 3]) and np.isfinite(back[1]).all() and np.isfinite(back[0, 128:]).all()
    with pytest.raises(ValueError, match="pairs"):
        fp8.pack_e5m6(np.ones((2, 3), np.float32))


def test_a_quantized_is_a_pytree():
    q = fp8.quantize(np.ones(SHAPE, np.float32), TILE)
    assert isinstance(jax.tree.map(lambda leaf: leaf, q), Quantized)
    assert [leaf.shape for leaf in jax.tree.leaves(q)] == [SHAPE, (130, 2)]
