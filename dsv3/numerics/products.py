"""Products of quantised matrices: the three GEMMs' inner loop, once for each backend.

A backend brings quantised matrices into the form it multiplies, contracted over `axis` 0 or 1, and
multiplies two of them, of M and N rows after that, to [M, N]. What it is asked for:

    quantize, again             an activation, and SwiGLU of cached inputs
    operand, rows, weights      an array quantised by a `Recipe`, in that form: a matrix; experts'
                                rows, in blocks; a stack of weights, or one
    both_ways, rows_both_ways   the first two for a gradient, which both axes are contracted of
    multiply                    rows times a weight, or Wgrad's two
    times_experts               each block of rows times its expert's weight
    expert_gradients            Wgrad for each expert

An input that is quantised already along the contraction is used as it is; any other is read, and
quantised anew. The base class does all of it with two methods, one matrix at a time: `prepare(q,
axis)`, and `product(a, b)` in FP32. Both work under `jax.vmap`.

    Promoted      128 of the contraction at a time: an exact product, scaled, added in FP32. This is
                  §3.3.2 and Fig. 7b with N_C = 128 and an exact tensor core; any platform.
    Hopper        the same on an emulation of the tensor core that Hopper has; for studies.
    Dequantized   operands dequantised to BF16, one BF16 product: where FP8 saves memory but no
                  kernel multiplies it. Scales that are no powers of two cost a BF16 rounding.

The fourth, `kernels.backend.Mosaic`, runs on Hopper's tensor cores.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from dsv3.numerics import fp8
from dsv3.numerics.accumulate import hopper_product
from dsv3.numerics.fp8 import GROUP, Group, Quantized, dequantize, spread_to
from dsv3.numerics.operand import Operand, Swiglu, value
from dsv3.numerics.rows import contract_rows
from dsv3.numerics.rule import blocks, expert_gradients, times_experts

ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


class Recipe(NamedTuple):
    """How an operand is quantised: the last arguments of `fp8.quantize`."""

    group: Group
    form: fp8.FormatName = "e4m3"
    power_of_two: bool = False


class Backend(ABC):
    """See the module docstring."""

    @abstractmethod
    def prepare(self, q: Quantized, axis: int) -> Any:
        """A quantised matrix in the form that `product` takes, contracted over `axis`."""

    @abstractmethod
    def product(self, a: Any, b: Any) -> Array:
        """FP32 [M, N] from two prepared operands of M and N rows."""

    def quantize(self, x: Operand, recipe: Recipe) -> Quantized:
        return fp8.quantize(value(x), *recipe)

    def again(self, x: Swiglu, recipe: Recipe, dtype: DTypeLike) -> Quantized:
        """`quantize` from inputs that were in `dtype` before they were cached."""
        return self.quantize(x.each(lambda cached: _read(cached).astype(dtype)), recipe)

    def operand(self, x: Array | Quantized, recipe: Recipe, axis: int) -> Any:
        """A matrix."""
        if not isinstance(x, Quantized) or axis == 0:
            x = fp8.quantize(_read(x), *recipe)
        return self.prepare(x, axis)

    def rows(self, x: Array | Quantized, recipe: Recipe, axis: int, expert_Z: Array) -> Any:
        """The rows of experts [P, .]."""
        if isinstance(x, Quantized) and axis == 1:
            q_Z = _cut(x, expert_Z)
        else:
            q_Z = in_blocks(_read(x), recipe, expert_Z)
        return jax.vmap(lambda q: self.prepare(q, axis))(q_Z)

    def both_ways(self, x: Array, rows: Recipe, columns: Recipe) -> tuple[Any, Any]:
        """`operand` over axis 1 and over axis 0."""
        return self.operand(x, rows, 1), self.operand(x, columns, 0)

    def rows_both_ways(
        self, x: Array, rows: Recipe, columns: Recipe, expert_Z: Array
    ) -> tuple[Any, Any]:
        """`rows` over axis 1 and over axis 0."""
        return self.rows(x, rows, 1, expert_Z), self.rows(x, columns, 0, expert_Z)

    def weights(self, w: Array, recipe: Recipe, axis: int) -> Any:
        """A weight [., .], or a stack of them."""
        q = fp8.quantize(w, *recipe)
        if w.ndim == 2:
            return self.prepare(q, axis)
        return jax.vmap(lambda q: self.prepare(q, axis))(q)

    def multiply(self, a: Any, b: Any, dtype: DTypeLike = jnp.float32) -> Array:
        return self.product(a, b).astype(dtype)

    def times_experts(self, x: Any, w: Any, expert_Z: Array, dtype: DTypeLike) -> Array:
        """[P, N] in `dtype` from `rows` over axis 1 and a stack of weights; zeros where unused."""

        shape = jax.eval_shape(self.product, *_first(x, w)).shape
        start_ZbN = jnp.zeros((len(expert_Z), *shape), dtype)
        return times_experts(self.product, x, w, expert_Z, start_ZbN)

    def expert_gradients(self, x: Any, dy: Any, expert_Z: Array, experts: int) -> Array:
        """FP32 [E, I, O] from `rows` over axis 0: each expert's blocks summed."""

        shape = jax.eval_shape(self.product, *_first(x, dy)).shape
        return expert_gradients(self.product, x, dy, expert_Z, (experts, *shape))


def in_blocks(x_PI: Array, recipe: Recipe, expert_Z: Array) -> Quantized:
    """Rows quantised as [Z, b, I]: groups end with each block; one for the tensor serves all."""
    if recipe.group == fp8.TENSOR:
        return _cut(fp8.quantize(x_PI, *recipe), expert_Z)
    return fp8.quantize(blocks(x_PI, expert_Z), *recipe)


def _cut(q: Quantized, expert_Z: Array) -> Quantized:
    """Rows in tiles, or under one scale, as a stack of blocks."""
    one = q.scales.shape == (1, 1)
    stack = jnp.broadcast_to(q.scales, (len(expert_Z), 1, 1)) if one else blocks(q.scales, expert_Z)
    return Quantized(blocks(q.values, expert_Z), stack)


def _first(*stacks: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], stacks)


def _read(x: Array | Quantized) -> Array:
    return dequantize(x) if isinstance(x, Quantized) else x


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales_kM"),
    meta_fields=("axis",),
)
@dataclass(frozen=True)
class Blocks:
    """A matrix cut along its contraction into k blocks of 128, or one, the last padded.

    `axis` is that of the contraction in a block: `values` are [k, c, M] for 0, [k, M, c] for 1, as
    they lay in the matrix. Turning FP8 on a CPU costs as much as its product.
    """

    values: Array
    scales_kM: Array
    axis: int


@dataclass(frozen=True)
class Promoted(Backend):
    """FP8 operands are exact in BF16, their products exact in FP32."""

    def prepare(self, q: Quantized, axis: int) -> Blocks:
        length, other = q.values.shape[axis], q.values.shape[1 - axis]
        size = min(GROUP, length)
        padding = [(0, -length % size if i == axis else 0) for i in range(2)]
        values = jnp.pad(q.values, padding) if length % size else q.values
        if axis == 0:
            values = values.reshape(-1, size, other)
        else:
            values = values.reshape(other, -1, size).swapaxes(0, 1)
        scales_kM = spread_to(jnp.moveaxis(q.scales, axis, 0), 1, other)
        return Blocks(values, jnp.broadcast_to(scales_kM, (len(values), other)), axis)

    def product(self, a: Blocks, b: Blocks) -> Array:
        def add(total_MN, block):
            a, b = block
            return total_MN + self.unscaled(a, b) * a.scales_kM[:, None] * b.scales_kM[
                None, :
            ], None

        start_MN = jnp.zeros((a.scales_kM.shape[1], b.scales_kM.shape[1]), jnp.float32)
        return lax.scan(add, start_MN, (a, b), unroll=min(4, len(a.values)))[0]

    def unscaled(self, a: Blocks, b: Blocks) -> Array:
        """The product of one block of each."""
        a_, b_ = a.values.astype(jnp.bfloat16), b.values.astype(jnp.bfloat16)
        if a.axis == b.axis == 0:
            return contract_rows(a_, b_)
        dims = (((a.axis,), (b.axis,)), ((), ()))
        return lax.dot_general(a_, b_, dims, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Hopper(Promoted):
    """`promote_every` (N_C): how much of the contraction stays in the tensor core's registers.

    Up to 128 for any scales; beyond it, or None for all, only under one scale for each tensor:
    scales are applied where partial sums leave the tensor core.
    """

    promote_every: int | None = GROUP

    def product(self, a: Blocks, b: Blocks) -> Array:
        if self.promote_every is not None and self.promote_every <= GROUP:
            return super().product(a, b)
        unscaled_MN = hopper_product(_uncut(a), _uncut(b), self.promote_every)
        return unscaled_MN * a.scales_kM[0][:, None] * b.scales_kM[0][None, :]

    def unscaled(self, a: Blocks, b: Blocks) -> Array:
        a_Mc, b_Nc = (x.values if x.axis == 1 else x.values.T for x in (a, b))
        return hopper_product(a_Mc, b_Nc, self.promote_every)


def _uncut(x: Blocks) -> Array:
    values_kMc = x.values if x.axis == 1 else x.values.swapaxes(1, 2)
    return values_kMc.swapaxes(0, 1).reshape(values_kMc.shape[1], -1)


@dataclass(frozen=True)
class Dequantized(Backend):
    """One BF16 product, accumulated in FP32."""

    def prepare(self, q: Quantized, axis: int) -> Array:
        return jnp.moveaxis(dequantize(q, jnp.bfloat16), axis, 1)

    def product(self, a: Array, b: Array) -> Array:
        return lax.dot_general(a, b, ROWS_BY_ROWS, preferred_element_type=jnp.float32)


def exact_product(a: Quantized, b: Quantized, axes: tuple[int, int]) -> Array:
    """The oracle: dequantised in FP32 and multiplied at the highest precision."""
    a_MK = jnp.moveaxis(dequantize(a), axes[0], 1)
    b_NK = jnp.moveaxis(dequantize(b), axes[1], 1)
    return jax.lax.dot_general(
        a_MK, b_NK, ROWS_BY_ROWS, precision="highest", preferred_element_type=jnp.float32
    )
