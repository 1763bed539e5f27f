"""Products of quantised matrices: the three GEMMs' inner loop, once for each backend.

A backend has two methods. `prepare(q, axis)` brings a quantised matrix into the form it multiplies,
with `axis` (0 or 1) contracted; it is done once for a weight that meets many blocks of tokens.
`multiply(a, b)` yields FP32 [M, N] from two prepared operands of M and N rows. Both work under
`jax.vmap`, so a stack of matrices is prepared as one.

    Promoted      128 of the contraction at a time: an exact product, scaled, added in FP32. This is
                  §3.3.2 and Fig. 7b with N_C = 128 and an exact tensor core; any platform.
    Hopper        the same on an emulation of the tensor core that Hopper has; for studies.
    Dequantized   operands dequantised to BF16, one BF16 product: where FP8 saves memory but no
                  kernel multiplies it. Scales that are no powers of two cost a BF16 rounding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.numerics.accumulate import hopper_product
from dsv3.numerics.fp8 import GROUP, Quantized, dequantize, spread_to

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


class Backend(Protocol):
    """See the module docstring."""

    def prepare(self, q: Quantized, axis: int) -> Any: ...

    def multiply(self, a: Any, b: Any) -> Array: ...


class Blocks(NamedTuple):
    """A matrix cut along its contraction into k blocks of 128, or one, the last padded."""

    values_kMc: Array
    scales_kM: Array


@dataclass(frozen=True)
class Promoted:
    """FP8 operands are exact in BF16, their products exact in FP32."""

    def prepare(self, q: Quantized, axis: int) -> Blocks:
        values_KM = jnp.moveaxis(q.values, axis, 0)
        size = min(GROUP, values_KM.shape[0])
        padding = -values_KM.shape[0] % size
        if padding:
            values_KM = jnp.pad(values_KM, ((0, padding), (0, 0)))
        values_kMc = values_KM.reshape(-1, size, values_KM.shape[1]).swapaxes(1, 2)
        scales_kM = spread_to(jnp.moveaxis(q.scales, axis, 0), 1, values_KM.shape[1])
        return Blocks(values_kMc, jnp.broadcast_to(scales_kM, values_kMc.shape[:2]))

    def multiply(self, a: Blocks, b: Blocks) -> Array:
        def add(total_MN, block):
            (a_Mc, sa_M), (b_Nc, sb_N) = block
            return total_MN + self.product(a_Mc, b_Nc) * sa_M[:, None] * sb_N[None, :], None

        start_MN = jnp.zeros((a.values_kMc.shape[1], b.values_kMc.shape[1]), jnp.float32)
        return lax.scan(add, start_MN, (a, b), unroll=min(4, a.values_kMc.shape[0]))[0]

    def product(self, a_Mc: Array, b_Nc: Array) -> Array:
        a_Mc, b_Nc = a_Mc.astype(jnp.bfloat16), b_Nc.astype(jnp.bfloat16)
        return lax.dot_general(a_Mc, b_Nc, ROWS_BY_ROWS, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Hopper(Promoted):
    """`promote_every` (N_C): how much of the contraction stays in the tensor core's registers.

    Up to 128 for any scales; beyond it, or None for all, only under one scale for each tensor:
    scales are applied where partial sums leave the tensor core.
    """

    promote_every: int | None = GROUP

    def multiply(self, a: Blocks, b: Blocks) -> Array:
        if self.promote_every is not None and self.promote_every <= GROUP:
            return super().multiply(a, b)
        unscaled_MN = self.product(_uncut(a.values_kMc), _uncut(b.values_kMc))
        return unscaled_MN * a.scales_kM[0][:, None] * b.scales_kM[0][None, :]

    def product(self, a_Mc: Array, b_Nc: Array) -> Array:
        return hopper_product(a_Mc, b_Nc, self.promote_every)


def _uncut(values_kMc: Array) -> Array:
    return values_kMc.swapaxes(0, 1).reshape(values_kMc.shape[1], -1)


@dataclass(frozen=True)
class Dequantized:
    """One BF16 product, accumulated in FP32."""

    def prepare(self, q: Quantized, axis: int) -> Array:
        return jnp.moveaxis(dequantize(q, jnp.bfloat16), axis, 1)

    def multiply(self, a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, ROWS_BY_ROWS, preferred_element_type=jnp.float32)


def exact_product(a: Quantized, b: Quantized, axes: tuple[int, int]) -> Array:
    """The oracle: dequantised in FP32 and multiplied at the highest precision."""
    a_MK = jnp.moveaxis(dequantize(a), axes[0], 1)
    b_NK = jnp.moveaxis(dequantize(b), axes[1], 1)
    return jax.lax.dot_general(
        a_MK, b_NK, ROWS_BY_ROWS, precision="highest", preferred_element_type=jnp.float32
    )
