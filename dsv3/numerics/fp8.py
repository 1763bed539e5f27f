"""FP8 with fine-grained scaling: the quantisers, and E5M6 for one cached activation.

A tensor is cut into groups along its last two dimensions, and each group is stored in FP8 next to
one FP32 scale (§3.3.2, Fig. 7a; spec §2.2):

    s = max|x| / max(format)        values = fp8(clip(x / s))        x ~ values · s

    TILE    1 x 128     activations and their gradients, along the contraction of Fprop and Dgrad
    COLUMN  128 x 1     both operands of Wgrad, which contracts over tokens
    BLOCK   128 x 128   weights; the same block serves Fprop and Dgrad
    TENSOR  everything  the usual per-tensor scaling, for comparison

The maximum is taken now, not remembered from earlier steps. E4M3 everywhere: with groups this small
range is no issue and the mantissa bit is worth more than E5M2's exponent. A scale may be rounded up
to a power of two (UE8M0), which makes re-grouping a mere shift of exponents (§3.3.3).

Traps, each tested: casting to E4M3 does not saturate, so values are clipped first. XLA turns
x / s into x · (1 / s) where s is a constant or stands for many x, which rounds differently: of BF16
numbers one in a thousand gets another byte. A scale is at least 2^-100: zeros stay zeros, and FP32
denormals, which some platforms flush, vanish on every platform. (DeepSeek's kernels clamp max|x| at
1e-4 instead, which would erase the small gradients of a mean loss.) NaN and infinity become NaN:
they must reach the guard, never pass for a number.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

GROUP = 128
Group = tuple[int | None, int | None]  # rows, columns of a group; None: all of them
TILE, COLUMN, BLOCK, TENSOR = (1, GROUP), (GROUP, 1), (GROUP, GROUP), (None, None)
FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
FormatName = Literal["e4m3", "e5m2"]
SMALLEST_SCALE = 2.0**-100


class Quantized(NamedTuple):
    """FP8 `values` [..., R, C] and the FP32 `scales` [..., r, c] that multiply them back.

    Along each of the last two dimensions there is one scale for every element, for every 128, or
    one for all; the last group may be partial. The suffix of the scales has the lower case letter.
    """

    values: Array
    scales: Array


def quantize(
    x: Array, group: Group, form: FormatName = "e4m3", power_of_two: bool = False
) -> Quantized:
    """`x` [..., R, C] in any float dtype, each group scaled so that its largest entry is the
    format's largest number (E4M3: 448, E5M2: 57344), rounded to nearest even."""
    limit = float(jnp.finfo(FORMATS[form]).max)
    x = x.astype(jnp.float32)
    cut = in_groups(x, group)
    scales = scales_of(_largest(cut), limit, power_of_two)
    # The `where` keeps XLA from seeing one divisor for many numbers, see above.
    divisor = jnp.where(jnp.isnan(cut), 1.0, scales[..., :, None, :, None])
    scaled = jnp.clip(cut / divisor, -limit, limit)
    return Quantized(_joined(scaled.astype(FORMATS[form]), x.shape), scales)


def _largest(cut: Array) -> Array:
    """max |x| of each group; two maxima, since XLA:CPU writes |x| out before it reduces it."""
    within = (-3, -1)
    return jnp.maximum(jnp.max(cut, axis=within), -jnp.min(cut, axis=within))


def scales_of(amax: Array, limit: float, power_of_two: bool) -> Array:
    """The scale of a group whose largest magnitude is `amax`; kernels call it on their tiles."""
    # amax is never negative. The `where` keeps XLA from seeing a constant divisor, see above.
    scales = amax / jnp.where(amax < 0, 1.0, limit).astype(jnp.float32)
    scales = jnp.where(scales < SMALLEST_SCALE, SMALLEST_SCALE, scales)  # NaN stays
    if power_of_two:
        rounded_up = _power_of_two_above(scales)
        scales = jnp.where(scales < jnp.inf, rounded_up, scales)
    return scales


def _power_of_two_above(x: Array) -> Array:
    """The smallest power of two >= x, for positive normal FP32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + 0x7FFFFF) & jnp.uint32(0xFF800000), jnp.float32)


def in_groups(x: Array, group: Group) -> Array:
    """[..., R, C] as [..., r, rows, c, columns], padded with zeros to whole groups."""
    *_, r, c = x.shape
    rows, columns = (min(g or n, n) or 1 for g, n in zip(group, (r, c), strict=True))
    pad = [(0, 0)] * (x.ndim - 2) + [(0, -r % rows), (0, -c % columns)]
    padded = jnp.pad(x, pad) if any(after for _, after in pad) else x
    return padded.reshape(*x.shape[:-2], -(-r // rows), rows, -(-c // columns), columns)


def _joined(cut: Array, shape: tuple[int, ...]) -> Array:
    *lead, r, rows, c, columns = cut.shape
    return cut.reshape(*lead, r * rows, c * columns)[..., : shape[-2], : shape[-1]]


def as_bytes(q: Quantized) -> Quantized:
    """The same with its FP8 values as uint8."""
    return q._replace(values=lax.bitcast_convert_type(q.values, jnp.uint8))


def from_bytes(q: Quantized) -> Quantized:
    """What `as_bytes` was given, of E4M3 values."""
    return q._replace(values=lax.bitcast_convert_type(q.values, jnp.float8_e4m3fn))


def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> Array:
    """values · scales, multiplied in FP32."""
    spread = spread_to(spread_to(q.scales, -2, q.values.shape[-2]), -1, q.values.shape[-1])
    return (q.values.astype(jnp.float32) * spread).astype(dtype)


def spread_to(scales: Array, axis: int, size: int) -> Array:
    """One scale for each of `size` elements along `axis`, or still one for all."""
    if scales.shape[axis] in (1, size):
        return scales
    return lax.slice_in_dim(jnp.repeat(scales, GROUP, axis), 0, size, axis=axis)


# --- E5M6: the input of the projection after attention -----------------------------------------

E5M6_MAX = 65024.0  # (2 - 2^-6) · 2^15


def pack_e5m6(x: Array) -> Quantized:
    """`x` [..., C], C even, in tiles of 128: 12-bit E5M6 numbers, two in three bytes (§3.3.3).

    values uint8 [..., 3 C / 2], scales FP32 [..., c], powers of two. One sign, five exponent bits
    (bias 15) and six mantissa bits, which is FP16 without its last four; the report names the
    format only, so this layout is our reading of it.
    """
    *lead, columns = x.shape
    if columns % 2:
        raise ValueError(f"E5M6 is stored in pairs: {columns} columns are odd")
    cut = in_groups(x.astype(jnp.float32)[..., None, :], TILE)
    scales = scales_of(_largest(cut), E5M6_MAX, power_of_two=True)
    scaled = _joined(cut / scales[..., :, None, :, None], (*lead, 1, columns))[..., 0, :]
    half = _rounded_to_e5m6(scaled).astype(jnp.float16)
    code = lax.bitcast_convert_type(half, jnp.uint16) >> 4
    first, second = code[..., 0::2], code[..., 1::2]
    triple = (first >> 4, (first & 0xF) << 4 | second >> 8, second & 0xFF)
    packed = jnp.stack(triple, axis=-1).astype(jnp.uint8).reshape(*lead, -1)
    return Quantized(packed, scales[..., 0, :])


def unpack_e5m6(q: Quantized, dtype: DTypeLike = jnp.float32) -> Array:
    """The numbers that `pack_e5m6` stored, [..., C]."""
    triple = q.values.reshape(*q.values.shape[:-1], -1, 3).astype(jnp.uint16)
    first = triple[..., 0] << 4 | triple[..., 1] >> 4
    second = (triple[..., 1] & 0xF) << 8 | triple[..., 2]
    code = jnp.stack([first, second], axis=-1).reshape(*q.values.shape[:-1], -1)
    half = lax.bitcast_convert_type(code << 4, jnp.float16)
    return (half.astype(jnp.float32) * spread_to(q.scales, -1, code.shape[-1])).astype(dtype)


def _rounded_to_e5m6(x: Array) -> Array:
    """FP32 rounded to nearest even on E5M6's grid, subnormals included; |x| <= E5M6_MAX or NaN."""
    exponent = (lax.bitcast_convert_type(x, jnp.uint32) >> 23 & 0xFF).astype(jnp.int32) - 127
    last_place = jnp.maximum(exponent, -14) - 6
    ulp = lax.bitcast_convert_type((last_place + 127).astype(jnp.uint32) << 23, jnp.float32)
    rounded = jnp.round(x / ulp) * ulp
    return jnp.where(jnp.isfinite(x), jnp.clip(rounded, -E5M6_MAX, E5M6_MAX), jnp.nan)
