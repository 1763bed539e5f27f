"""FP8 products on Hopper's tensor cores, as a backend of the dot rules (`products.Backend`).

An operand is `Tiles` with a scale for each 128 of its contraction, a weight `Squares`. Groups of
128 are quantised by the one-pass kernels, SwiGLU while it is computed; coarser ones (one scale for
a tensor, gradients in blocks, both ablations) by XLA, their scales spread to tiles. Experts want
their rows sorted, as dispatch lays them out, and in blocks of a multiple of 128.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from dsv3.numerics import fp8
from dsv3.numerics.fp8 import GROUP, Quantized, dequantize, spread_to
from dsv3.numerics.kernels import fp8_gemm, quantize
from dsv3.numerics.kernels.gemm import every_128
from dsv3.numerics.kernels.persistent import round_up
from dsv3.numerics.kernels.quantize import Squares, Tiles
from dsv3.numerics.operand import Operand, Swiglu
from dsv3.numerics.products import Backend, Recipe

# Group and contraction of the one-pass kernel.
ALONG = {(fp8.TILE, 1), (fp8.COLUMN, 0)}


@dataclass(frozen=True)
class Mosaic(Backend):
    """See the module docstring."""

    def quantize(self, x: Operand, recipe: Recipe) -> Quantized:
        if recipe.group != fp8.TILE:
            return super().quantize(x, recipe)
        if isinstance(x, Swiglu):
            return _cut(quantize.swiglu_tiles(x, x.dtype, *recipe[1:]), x.shape)
        return _cut(quantize.tiles(x, False, *recipe[1:]), x.shape)

    def again(self, x: Swiglu, recipe: Recipe, dtype: DTypeLike) -> Quantized:
        if recipe.group != fp8.TILE or not isinstance(x.up, Quantized):
            return super().again(x, recipe, dtype)
        cached = x.each(lambda q: self.prepare(q, 1))
        return _cut(quantize.swiglu_tiles(cached, dtype, *recipe[1:]), x.up.values.shape)

    def operand(self, x: Array | Quantized, recipe: Recipe, axis: int) -> Tiles:
        scales = None
        if isinstance(x, Quantized):
            if axis == 1:
                return self.prepare(x, axis)
            if x.scales.shape == (1, 1):
                x = dequantize(x)
            else:
                x, scales = x.values, round_up(x.scales.T, 1, 4)
        if (recipe.group, axis) in ALONG:
            return quantize.tiles(x, axis == 0, *recipe[1:], scales=scales)
        return self.prepare(fp8.quantize(x, *recipe), axis)

    def rows(self, x: Array | Quantized, recipe: Recipe, axis: int, expert_Z: Array) -> Tiles:
        return self.operand(x, recipe, axis)

    def both_ways(self, x: Array, rows: Recipe, columns: Recipe) -> tuple[Tiles, Tiles]:
        if (rows.group, columns.group) == (fp8.TILE, fp8.COLUMN) and rows[1:] == columns[1:]:
            return quantize.both_ways(x, *rows[1:])
        return super().both_ways(x, rows, columns)

    def rows_both_ways(
        self, x: Array, rows: Recipe, columns: Recipe, expert_Z: Array
    ) -> tuple[Tiles, Tiles]:
        return self.both_ways(x, rows, columns)

    def prepare(self, q: Quantized, axis: int) -> Tiles:
        values_MK = q.values if axis == 1 else q.values.T
        scales_kM = q.scales.T if axis == 1 else q.scales
        scales_kM = spread_to(scales_kM, 1, len(values_MK))
        k, M = -(-values_MK.shape[1] // GROUP), len(values_MK)
        scales_kM = jnp.broadcast_to(scales_kM, (k, M))
        return Tiles(round_up(values_MK, 1, GROUP), round_up(scales_kM, 1, 4))

    def weights(self, w: Array, recipe: Recipe, axis: int) -> Squares:
        w_E = w[None] if w.ndim == 2 else w
        if recipe.group == fp8.BLOCK:
            return quantize.squares(w_E, axis == 0, *recipe[1:])
        q = fp8.quantize(w_E, *recipe)
        values_ENK = q.values if axis == 1 else q.values.swapaxes(1, 2)
        E, N, K = values_ENK.shape
        shape = (E, -(-K // GROUP), -(-N // GROUP), quantize.TMA_SCALES)
        scales_Ekn4 = jnp.broadcast_to(q.scales[..., None], shape)
        return Squares(round_up(values_ENK, 2, GROUP), scales_Ekn4)

    def product(self, a: Tiles, b: Tiles | Squares) -> Array:
        return self.multiply(a, b)

    def multiply(self, a: Tiles, b: Tiles | Squares, dtype: DTypeLike = jnp.float32) -> Array:
        if isinstance(b, Squares):
            return fp8_gemm.nt(*a, *b, dtype=dtype)
        return fp8_gemm.wgrad(*a, *b)[0].astype(dtype)

    def times_experts(self, x: Tiles, w: Squares, expert_Z: Array, dtype: DTypeLike) -> Array:
        return fp8_gemm.nt(*x, *w, every_128(expert_Z, len(x.values_MK)), dtype)

    def expert_gradients(self, x: Tiles, dy: Tiles, expert_Z: Array, experts: int) -> Array:
        return fp8_gemm.wgrad(*x, *dy, every_128(expert_Z, x.values_MK.shape[1]), experts)


def _cut(x: Tiles, shape: tuple[int, ...]) -> Quantized:
    """A matrix of `shape`, without the padding of its tiles."""
    rows, columns = shape
    return Quantized(x.values_MK[:, :columns], x.scales_kM[:, :rows].T)
