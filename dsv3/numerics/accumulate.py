"""Hopper's FP8 accumulator, bit by bit: why the report promotes partial sums (§3.3.2, Fig. 7b).

On H800 an FP8 product that is asked to accumulate in FP32 keeps about 14 bits. One instruction
adds 32 products to an accumulator c. As emulated here, for each entry of the result:

    e  = max(exponent of c, exponents of the products that are not zero)
    t  = trunc(c / 2^(e-F)) + Σ_k trunc(a_k · b_k / 2^(e-F))      an exact sum of integers
    c' = t · 2^(e-F), truncated to F fraction bits                F = 13: "FP22", 1 + 8 + 13 bits

Truncation is toward zero. A product's exponent is the sum of its operands' exponents, not
normalised: its significand lies below 4, and that of a subnormal operand below 1. The report's
remedy starts a fresh accumulator every N_C = 128 elements of K, four instructions, and adds the
partial sums in FP32 outside of the tensor core, rounding to nearest.

Sources. §3.3.2 gives the defect ("around 14 bits", 2 % at K = 4096) and the remedy; §3.5.2 the
alignment to the largest exponent and the truncation. The rest, which is F = 13, the integer part,
truncation of the result and subnormals, follows MMA-Sim (arXiv 2511.10909), whose authors compared
their model with the hardware bit for bit.

Where this is unsure. We compared nothing here with a GPU. That the report's H800 computes as the
Hopper card of MMA-Sim does, and that every tile width N of the instruction behaves alike, is
assumed. The report speaks of 14 bits without saying whether the leading one is among them; with
F = 13 it is. Hardware turns a lone infinity into an infinity, here it becomes NaN like any other
non-finite operand. Scales are left out: a kernel multiplies a partial sum by them before it adds
it, perhaps in one fused operation, and unless they are powers of two that rounds otherwise.

Why integers: |t| < 2^(F+7) + 2^(F+1) fits 31 bits for any F up to 23, so that no order of summation
and no compiler can change a bit.

Letters of this file: a is [M, K], b is [N, K]; k = 32 are the elements of one instruction,
I the instructions between two promotions, G the promotions.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

INSTRUCTION = 32  # elements of K in one FP8 instruction of Hopper (wgmma m64nNk32)
FORMATS = (jnp.float8_e4m3fn, jnp.float8_e5m2)
ZERO = -100  # exponent of zero: below that of any sum, 2^ZERO still a normal FP32 number


def hopper_product(
    a_MK: Array, b_NK: Array, promote_every: int | None = 128, fraction_bits: int = 13
) -> Array:
    """FP32 [M, N]: a · bᵀ as Hopper's tensor cores accumulate it.

    The operands are float8_e4m3fn or float8_e5m2, not necessarily the same. `promote_every` is
    N_C, a multiple of 32, or None to leave all of K to the tensor core. K is filled up with zeros,
    which change nothing. `fraction_bits` from 1 to 23 is F. An output whose row of a or of b
    holds a NaN or an infinity is NaN. Truncation is flat, so the derivative is zero everywhere:
    what trains through this brings its own. Raises ValueError for any other operand or option.
    """
    _require(a_MK, b_NK, promote_every, fraction_bits)
    return _product(jnp.asarray(a_MK), jnp.asarray(b_NK), promote_every, fraction_bits)


def _require(a_MK: Array, b_NK: Array, promote_every: int | None, fraction_bits: int) -> None:
    for name, x in (("a", a_MK), ("b", b_NK)):
        if x.dtype not in FORMATS:
            raise ValueError(f"{name} is {x.dtype}, not float8_e4m3fn or float8_e5m2")
        if x.ndim != 2:
            raise ValueError(f"{name} has shape {x.shape}, not [rows, K]")
    if a_MK.shape[1] != b_NK.shape[1]:
        raise ValueError(f"a has K = {a_MK.shape[1]} columns, b has {b_NK.shape[1]}")
    if promote_every is not None and (promote_every < 1 or promote_every % INSTRUCTION):
        raise ValueError(
            f"promote_every={promote_every} is neither None nor a positive multiple of 32"
        )
    if not 1 <= fraction_bits <= 23:
        raise ValueError(f"fraction_bits={fraction_bits} is not between 1 and 23")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _product(a_MK, b_NK, promote_every, fraction_bits):
    instructions = -(-a_MK.shape[1] // INSTRUCTION)
    per_promotion = instructions if promote_every is None else promote_every // INSTRUCTION
    per_promotion = max(1, min(per_promotion, instructions))
    operands = (*_instructions(a_MK, per_promotion), *_instructions(b_NK, per_promotion))
    broken_MN = _broken(a_MK)[:, None] | _broken(b_NK)[None, :]
    zero_MN = broken_MN.astype(jnp.float32) * 0  # varies over a mesh as the operands do

    def instruct(c_MN, operands):
        a_Mk, ea_Mk, b_Nk, eb_Nk = operands
        return _instruction(c_MN, a_Mk, ea_Mk, b_Nk, eb_Nk, fraction_bits), None

    def promote(sum_MN, operands):
        return sum_MN + lax.scan(instruct, zero_MN, operands)[0], None

    return jnp.where(broken_MN, jnp.nan, lax.scan(promote, zero_MN, operands)[0])


def _instructions(x_MK: Array, per_promotion: int) -> tuple[Array, Array]:
    """FP32 values and int32 exponents, both [G, I, M, k], of what each instruction reads."""
    group = per_promotion * INSTRUCTION
    x_MK = jnp.pad(x_MK, ((0, 0), (0, -x_MK.shape[1] % group)))
    shape = (x_MK.shape[0], x_MK.shape[1] // group, per_promotion, INSTRUCTION)
    x_MGIk = x_MK.astype(jnp.float32).reshape(shape)
    x_GIMk = jnp.moveaxis(x_MGIk, 0, 2)
    return x_GIMk, _exponent(x_GIMk, jnp.finfo(x_MK.dtype).minexp)


def _instruction(c_MN, a_Mk, ea_Mk, b_Nk, eb_Nk, fraction_bits):
    """The accumulator after one instruction; the equations are in the module docstring."""
    e_MN = jnp.max(ea_Mk[:, None, :] + eb_Nk[None, :, :], axis=-1)
    e_MN = jnp.maximum(e_MN, _exponent(c_MN, ZERO))
    unit_MN = _power_of_two(fraction_bits - e_MN)
    terms_MNk = (a_Mk[:, None, :] * b_Nk[None, :, :] * unit_MN[:, :, None]).astype(jnp.int32)
    t_MN = jnp.sum(terms_MNk, axis=-1) + (c_MN * unit_MN).astype(jnp.int32)
    return _leading_bits(t_MN, fraction_bits + 1) * _power_of_two(e_MN - fraction_bits)


def _exponent(x: Array, least: int) -> Array:
    """int32: floor(log2 |x|) of FP32 numbers, at least `least`; ZERO where x is 0."""
    field = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    return jnp.where(x == 0, ZERO, jnp.maximum(field - 127, least))


def _power_of_two(e: Array) -> Array:
    """2^e in FP32 for e from -126 to 127."""
    return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def _leading_bits(t: Array, bits: int) -> Array:
    """t in FP32, of its magnitude only the `bits` leading bits (at most 24), the rest zero."""
    magnitude = jnp.abs(t)
    dropped = jnp.maximum(32 - lax.clz(magnitude) - bits, 0)
    return (jnp.sign(t) * ((magnitude >> dropped) << dropped)).astype(jnp.float32)


def _broken(x_MK: Array) -> Array:
    """bool [M]: rows with a NaN or an infinity."""
    return ~jnp.all(jnp.isfinite(x_MK.astype(jnp.float32)), axis=1)
