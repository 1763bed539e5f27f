"""Hopper's accumulator against Python fractions: every bit, promotion, what is refused."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import accumulation
from dsv3.numerics.accumulate import hopper_product

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LAYOUT = {E4M3: (3, 7), E5M2: (2, 15)}  # bits of mantissa, bias
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E5M2)]
M, N, K = 3, 2, 112  # three instructions and a half: one promotion and a half at 64


# --- the oracle: one entry at a time, exact, no JAX --------------------------------------------


def decode(x) -> tuple[Fraction, int]:
    """Value and exponent of an FP8 number from its bits; subnormals keep the smallest exponent."""
    mantissa_bits, bias = LAYOUT[x.dtype.type]
    code = int(x.view(np.uint8))
    field, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    exponent = max(field, 1) - bias
    significand = mantissa + ((field > 0) << mantissa_bits)
    value = significand * Fraction(2) ** (exponent - mantissa_bits)
    return (-value if code & 0x80 else value), exponent


def exponent_of(value: Fraction) -> int:
    """floor(log2 |value|)."""
    n, d = abs(value.numerator), value.denominator
    e = n.bit_length() - d.bit_length()
    return e if Fraction(2) ** e <= abs(value) else e - 1


def keep(value: Fraction, exponent: int, bits: int) -> Fraction:
    """Truncated toward zero to a multiple of 2^(exponent - bits)."""
    unit = Fraction(2) ** (exponent - bits)
    return int(value / unit) * unit


def instruction(c: Fraction, products: list[tuple[Fraction, int]], bits: int) -> Fraction:
    terms = [(value, exponent) for value, exponent in products if value]
    if c:
        terms.append((c, exponent_of(c)))
    if not terms:
        return Fraction(0)
    largest = max(exponent for _, exponent in terms)
    total = sum((keep(value, largest, bits) for value, _ in terms), Fraction(0))
    return keep(total, exponent_of(total), bits) if total else total


def to_fp32(value: Fraction) -> Fraction:
    """Rounded to 24 bits, ties to even; no number here leaves FP32's range."""
    if not value:
        return value
    unit = Fraction(2) ** (exponent_of(value) - 23)
    return round(value / unit) * unit


def oracle_entry(a_K, b_K, promote_every: int | None, bits: int) -> float:
    pairs = [(decode(a), decode(b)) for a, b in zip(a_K, b_K, strict=True)]
    products = [(a * b, ea + eb) for (a, ea), (b, eb) in pairs]
    promoted = Fraction(0)
    group = promote_every or len(products)
    for start in range(0, len(products), group):
        c, chunk = Fraction(0), products[start : start + group]
        for first in range(0, len(chunk), 32):
            c = instruction(c, chunk[first : first + 32], bits)
        promoted = to_fp32(promoted + c)
    return float(promoted)


def oracle(a_MK, b_NK, promote_every, bits=13):
    rows = [[oracle_entry(a_K, b_K, promote_every, bits) for b_K in b_NK] for a_K in a_MK]
    return np.array(rows, np.float32)


# --- drawing operands --------------------------------------------------------------------------


def codes(dtype, kind: str) -> np.ndarray:
    """uint8 codes of the finite numbers of a kind."""
    every = np.arange(256, dtype=np.uint8)
    value = every.view(dtype).astype(np.float32)
    size, info = np.abs(value), ml_dtypes.finfo(dtype)
    kinds = {
        "any": np.isfinite(value),
        "subnormal": size < float(info.smallest_normal),
        "huge": size >= float(info.max) / 4,
        "positive": (value >= 1) & (value < 4),
        "mostly zero": np.isin(every, [0, 0x80, 1, 0x3C, 0xBC, 0x79]),
    }
    return every[kinds[kind] & np.isfinite(value)]


KINDS = ["any", "subnormal", "huge", "positive", "mostly zero"]


def draw(rng, dtype, kind, rows, columns=K) -> Any:
    return rng.choice(codes(dtype, kind), size=(rows, columns)).view(dtype)


def same_bits(y, expected):
    y, expected = np.asarray(y), np.asarray(expected)
    assert y.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(y.view(np.int32), expected.view(np.int32))


# --- every bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("promote_every", [64, None])
@pytest.mark.parametrize(("a_type", "b_type"), PAIRS)
@given(kinds=st.tuples(*[st.sampled_from(KINDS)] * 2), seed=st.integers(0, 2**32 - 1))
def test_every_bit_is_the_oracles(a_type, b_type, promote_every, kinds, seed):
    rng = np.random.default_rng(seed)
    a_MK, b_NK = draw(rng, a_type, kinds[0], M), draw(rng, b_type, kinds[1], N)
    same_bits(hopper_product(a_MK, b_NK, promote_every), oracle(a_MK, b_NK, promote_every))


@pytest.mark.parametrize("bits", [1, 23])
def test_every_bit_at_other_precisions(bits):
    rng = np.random.default_rng(bits)
    for kind in KINDS:
        a_MK, b_NK = draw(rng, E5M2, "any", M), draw(rng, E4M3, kind, N)
        same_bits(hopper_product(a_MK, b_NK, 64, bits), oracle(a_MK, b_NK, 64, bits))


@pytest.mark.parametrize(("a_type", "b_type"), PAIRS)
def test_a_single_product_is_exact_and_broken_operands_give_nan(a_type, b_type):
    a_M1, b_N1 = (np.arange(256, dtype=np.uint8).view(t)[:, None] for t in (a_type, b_type))
    a_M1, b_N1 = a_M1.copy(), b_N1.copy()
    broken_MN = ~np.isfinite(a_M1.astype(float)) | ~np.isfinite(b_N1.astype(float).T)
    with np.errstate(invalid="ignore"):
        exact_MN = np.where(broken_MN, np.nan, a_M1.astype(float) * b_N1.astype(float).T)
    np.testing.assert_array_equal(hopper_product(a_M1, b_N1), exact_MN)
    assert broken_MN.any() and not broken_MN.all()


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # 2^15 leaves units of 4: thirty-one ones are lost, and -7 is cut to -4, not to -8
        ([256.0] + [1.0] * 31, [128.0] + [1.0] * 31, 2.0**15),
        ([256.0] + [-1.0] * 31, [128.0] + [7.0] * 31, 2.0**15 - 31 * 4),
        # 1.5 · 1.5 has exponent 0, so units of 2^-13 count beside it; two of them survive the sum,
        ([1.5] + [2.0**-6] * 2, [1.5] + [2.0**-7] * 2, 2.25 + 2.0**-12),
        # but in the next instruction the accumulator 2.25 has exponent 1, and they do not
        ([1.5] + [0.0] * 31 + [2.0**-6] * 2, [1.5] + [0.0] * 31 + [2.0**-7] * 2, 2.25),
        # what remains after cancellation is exact, and a zero is never negative
        ([448.0, 448.0, 1.0], [448.0, -448.0, 1.0], 0.0),
        ([-1.0], [0.0], 0.0),
    ],
)
def test_by_hand(a, b, expected):
    a_1K, b_1K = (np.pad(x, (0, 64 - len(x)))[None].astype(E4M3) for x in (a, b))
    same_bits(hopper_product(a_1K, b_1K), np.array([[expected]], np.float32))
    same_bits(oracle(a_1K, b_1K, 128), np.array([[expected]], np.float32))


# --- promotion, filling up ---------------------------------------------------------------------


def example(seed=0, kind="any", columns=K):
    rng = np.random.default_rng(seed)
    return draw(rng, E4M3, kind, M, columns), draw(rng, E4M3, kind, N, columns)


def test_promotion_is_an_fp32_sum_of_fresh_products():
    a_MK, b_NK = example()
    parts = [hopper_product(a_MK[:, at], b_NK[:, at], None) for at in np.s_[:64, 64:K]]
    same_bits(hopper_product(a_MK, b_NK, 64), np.asarray(parts[0]) + np.asarray(parts[1]))


def test_an_interval_longer_than_k_never_promotes():
    a_MK, b_NK = example()
    never = hopper_product(a_MK, b_NK, None)
    same_bits(hopper_product(a_MK, b_NK, 1 << 20), never)
    assert np.any(never != hopper_product(a_MK, b_NK, 64))


def test_zeros_at_the_end_change_nothing():
    a_MK, b_NK = example()
    wide = [np.pad(x, ((0, 0), (0, 40))) for x in (a_MK, b_NK)]
    same_bits(hopper_product(*wide, 64), hopper_product(a_MK, b_NK, 64))


def test_empty_operands():
    a_MK, b_NK = example()
    same_bits(hopper_product(a_MK[:, :0], b_NK[:, :0]), np.zeros((M, N), np.float32))
    assert hopper_product(a_MK[:0], b_NK, 64).shape == (0, N)


def test_a_broken_operand_breaks_its_row_and_column_only():
    a_MK, b_NK = example(kind="positive")
    a_MK[1, 7], b_NK[0, K - 1] = np.nan, np.nan
    expected_MN = np.zeros((M, N), bool)
    expected_MN[1], expected_MN[:, 0] = True, True
    np.testing.assert_array_equal(np.isnan(hopper_product(a_MK, b_NK, 64)), expected_MN)


def test_an_infinity_times_zero_or_less_is_nan():
    for infinity in (np.inf, -np.inf):
        a_MK, b_NK = np.zeros((M, K), E5M2), np.zeros((N, K), E4M3)
        a_MK[2, 3] = infinity
        y_MN = hopper_product(a_MK, b_NK, 64)
        assert np.isnan(y_MN[2]).all() and not np.any(y_MN[:2])


# --- transformations, errors -------------------------------------------------------------------


def test_the_same_bits_under_jit_vmap_and_scan():
    a_MK, b_NK = map(jnp.asarray, example())
    expected = hopper_product(a_MK, b_NK, 64)
    a_2MK = jnp.stack([a_MK, a_MK[::-1]])

    def once(carry, a_MK):
        return carry, hopper_product(a_MK, b_NK, 64)

    mapped = jax.jit(jax.vmap(lambda a_MK: hopper_product(a_MK, b_NK, 64)))(a_2MK)
    for y_2MN in (mapped, lax.scan(once, None, a_2MK)[1]):
        same_bits(y_2MN[0], expected)
        same_bits(y_2MN[1], expected[::-1])


def test_the_same_bits_inside_shard_map():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda a_mK, b_NK: hopper_product(a_mK, b_NK, 64),
        mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"),
    )  # fmt: skip
    a_MK, b_NK = map(jnp.asarray, example())
    same_bits(jax.jit(split)(a_MK, b_NK), hopper_product(a_MK, b_NK, 64))


def eighth(*shape):
    return np.zeros(shape, E4M3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 32), np.float32), eighth(2, 32)), "a is float32, not float8_e4m3fn"),
        ((eighth(2, 32), np.zeros((2, 32), np.int8)), "b is int8"),
        ((eighth(32), eighth(2, 32)), r"a has shape \(32,\), not \[rows, K\]"),
        ((eighth(2, 32), eighth(1, 2, 32)), r"b has shape \(1, 2, 32\)"),
        ((eighth(2, 32), eighth(2, 64)), "a has K = 32 columns, b has 64"),
        ((eighth(2, 32), eighth(2, 32), 48), "promote_every=48 is neither None nor a positive"),
        ((eighth(2, 32), eighth(2, 32), 0), "promote_every=0"),
        ((eighth(2, 32), eighth(2, 32), -32), "promote_every=-32"),
        ((eighth(2, 32), eighth(2, 32), 128, 0), "fraction_bits=0 is not between 1 and 23"),
        ((eighth(2, 32), eighth(2, 32), 128, 24), "fraction_bits=24"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hopper_product(*arguments)


# --- the report's claim ------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", accumulation.DISTRIBUTIONS)
def test_promotion_mends_what_the_tensor_core_loses(distribution):
    """In the norm, which is steady; the largest of a few normal entries is a matter of the draw."""
    errors = accumulation.measure(distribution, 4096, [None, 128], rows=16, draws=1)
    lost, mended, fp32 = (errors[scheme].norm for scheme in (None, 128, accumulation.FP32))
    assert lost > 8 * mended
    assert lost > 1000 * fp32


def test_the_benchmark_writes_its_page(tmp_path, capsys):
    plan = accumulation.Plan(rows=4, draws=2, lengths=(64, 256), intervals=(32, 128), length=256)
    accumulation.run(plan, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accumulation.md",
        "accumulation.png",
    ]
    page = (tmp_path / "accumulation.md").read_text()
    assert capsys.readouterr().out.strip() in page
    assert "\n| 128 | " in page and "nan" not in page
