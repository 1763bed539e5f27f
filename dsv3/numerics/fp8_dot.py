"""The FP8 dot rules: three GEMMs, each with both operands grouped along its own contraction.

    GEMM    y = sum over      left operand                     right operand         result
    Fprop   inputs            x    TILE                        w   BLOCK             compute dtype
    Dgrad   outputs           dy   TILE                        w   BLOCK             compute dtype
    Wgrad   tokens            x    COLUMN, from its FP8 cache  dy  COLUMN            FP32

(§3.3.1 Fig. 6, §3.3.2, §3.5.2; spec §2.2.) What the backward pass keeps of x is its FP8 form: one
byte an element and the scales. Wgrad reads that, dequantises it and groups it anew along tokens.
The input of the projection after attention is kept in E5M6 with power-of-two scales instead
(§3.3.3; with flash attention its backward pass reads it too, ours does not). Of SwiGLU the two
inputs are kept in FP8, and it is computed from them again. Weights are quantised from their masters
in both passes, rather than kept twice.

Embedding, head, router, norms and core attention never come here (§3.3.1).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dsv3.config import Fp8Dot, HopperAccumulator
from dsv3.numerics import fp8
from dsv3.numerics.fp8 import Quantized, dequantize, quantize
from dsv3.numerics.operand import Operand, Swiglu, value
from dsv3.numerics.products import Backend, Dequantized, Hopper, Promoted, Recipe
from dsv3.numerics.rule import (
    KERNELS_BLOCK,
    LEAST_BLOCK,
    Formats,
    LinearMap,
    PlainWire,
    in_use,
)

CACHED = "fp8"  # the name of cached activations for rematerialisation policies


def backend_of(config: Fp8Dot) -> Backend:
    """What multiplies; 'auto' is left to the entry points and means 'reference' elsewhere."""
    match config.accumulator:
        case HopperAccumulator(promote_every=every):
            return Hopper(every)
    if config.backend == "mosaic":
        from dsv3.numerics.kernels.backend import Mosaic  # a second to import

        return Mosaic()
    return Dequantized() if config.backend == "dequant" else Promoted()


@dataclass(frozen=True)
class Fp8Wire:
    """How rows travel to experts: FP8 tiles with power-of-two scales (§3.3.3).

    Quantising again with such scales what was unpacked changes nothing, so the product on arrival
    multiplies exactly the numbers that were sent.
    """

    form: fp8.FormatName = "e4m3"

    def pack(self, x_XD: Array) -> Quantized:
        return quantize(x_XD, fp8.TILE, self.form, power_of_two=True)

    def unpack(self, packed: Quantized, dtype: jnp.dtype) -> Array:
        return dequantize(packed, dtype)


@dataclass(frozen=True)
class Fp8Rule(LinearMap):
    """The dot rule of `model.dot = 'fp8'` and of its variants; see `rule.DotRule`."""

    config: Fp8Dot
    cache_e5m6: bool = False
    activation_powers: bool = False  # power-of-two scales for this product, whatever config.scales
    gradient_powers: bool = False
    kept: tuple[str, ...] = (CACHED,)  # what policies keep in place of the BF16 activations

    @property
    def formats(self) -> Formats:
        fine, block = self.config.groups == "fine", self.config.gradient_groups == "block"
        x, w, dy = "e4m3", "e4m3", self.config.gradient_format
        tile, square, column = ("1x128", "128x128", "128x1") if fine else ("tensor",) * 3
        dy_dgrad, dy_wgrad = (square, square) if block else (tile, column)
        return Formats(
            f"{x} {tile} x {w} {square}",
            f"{dy} {dy_dgrad} x {w} {square}",
            f"{x} {column} x {dy} {dy_wgrad}",
            "e5m6 1x128" if self.cache_e5m6 else f"{x} {tile}",
        )

    @property
    def wire(self) -> Fp8Wire | PlainWire:
        """Rows whose product groups them otherwise travel unquantised: rounded once, not twice."""
        return Fp8Wire() if self.config.groups == "fine" else PlainWire()

    @property
    def gradient_wire(self) -> Fp8Wire | PlainWire:
        tiles = self.config.groups == "fine" and self.config.gradient_groups == "tile"
        return Fp8Wire(self.config.gradient_format) if tiles else PlainWire()

    @property
    def least_block(self) -> int:
        return KERNELS_BLOCK if self.config.backend == "mosaic" else LEAST_BLOCK

    @property
    def after_attention(self) -> "Fp8Rule":
        """The rule of the output projection."""
        return replace(self, cache_e5m6=True, activation_powers=True)

    @property
    def after_dispatch(self) -> "Fp8Rule":
        """The rule of the experts' first product."""
        return replace(self, activation_powers=True)

    @property
    def before_combine(self) -> "Fp8Rule":
        """The rule of the experts' last product."""
        return replace(self, gradient_powers=True)

    def linear(self, x_XI: Operand, ws: tuple[Array, ...]) -> tuple[Array, ...]:
        return _linear(self, x_XI, ws)

    def grouped(self, x_PI: Operand, ws: Sequence[Array], expert_Z: Array) -> tuple[Array, ...]:
        return _grouped(self, x_PI, *in_use(ws, expert_Z))

    @property
    def backend(self) -> Backend:
        return backend_of(self.config)

    # How each operand is quantised.

    @property
    def activation(self) -> Recipe:
        return Recipe(self._group(fp8.TILE), power_of_two=self._powers or self.activation_powers)

    @property
    def weight(self) -> Recipe:
        return Recipe(self._group(fp8.BLOCK), power_of_two=self._powers)

    @property
    def gradient(self) -> Recipe:
        """For Dgrad; block by block only in the ablation of App. B.2."""
        group = fp8.BLOCK if self.config.gradient_groups == "block" else fp8.TILE
        powers = self._powers or self.gradient_powers
        return Recipe(self._group(group), self.config.gradient_format, powers)

    @property
    def column(self) -> Recipe:
        powers = self._powers or self.activation_powers
        return Recipe(self._group(fp8.COLUMN), power_of_two=powers)

    @property
    def gradient_column(self) -> Recipe:
        """For Wgrad; the blocks of App. B.2 need no second grouping, only a transpose."""
        if self.config.gradient_groups == "block":
            return self.gradient
        group, powers = self._group(fp8.COLUMN), self._powers or self.gradient_powers
        return Recipe(group, self.config.gradient_format, powers)

    def keep(self, x: Operand, q: Quantized | None = None) -> Any:
        """The cached form of an activation, its values as bytes: where a platform has no FP8,
        XLA stores an array of it that a loop reads as FP16, twice as large. `q` is x in FP8, where
        that is known. Of SwiGLU it is that of both inputs."""
        if isinstance(x, Swiglu):
            return x.each(self.keep)
        if self.cache_e5m6:
            kept = fp8.pack_e5m6(x)
        else:
            kept = fp8.as_bytes(q or self.backend.quantize(x, self.activation))
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, CACHED), kept)

    def cached(self, kept: Any, dtype: DTypeLike) -> Array | Quantized:
        """What `keep` stored of an activation in `dtype`, for products to read."""
        if isinstance(kept, Swiglu):
            inputs = kept.each(lambda q: self.cached(q, dtype))
            return self.backend.again(inputs, self.activation, dtype)
        return fp8.unpack_e5m6(kept) if self.cache_e5m6 else fp8.from_bytes(kept)

    def read(self, kept: Any, dtype: DTypeLike = jnp.float32) -> Operand:
        """What `keep` stored."""
        if isinstance(kept, Swiglu):
            return kept.each(lambda q: self.read(q, dtype))
        if self.cache_e5m6:
            return fp8.unpack_e5m6(kept, dtype)
        return dequantize(fp8.from_bytes(kept), dtype)

    def gradient_of(self, kept: Any, dx: Array) -> Operand:
        """That of an activation, or of the inputs from which it was computed."""
        if not isinstance(kept, Swiglu):
            return dx
        return jax.vjp(value, self.read(kept, dx.dtype))[1](dx)[0]

    def _group(self, fine: fp8.Group) -> fp8.Group:
        return fp8.TENSOR if self.config.groups == "tensor" else fine

    @property
    def _powers(self) -> bool:
        return self.config.scales == "power_of_two"


# --- dense -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(rule: Fp8Rule, x_XI: Operand, ws: tuple[Array, ...]) -> tuple[Array, ...]:
    return _linear_forward(rule, x_XI, ws)[0]


def _linear_forward(rule, x_XI, ws):
    backend, q = rule.backend, rule.backend.quantize(x_XI, rule.activation)
    x = backend.operand(q, rule.activation, 1)
    ys = tuple(
        backend.multiply(x, backend.weights(w_IO, rule.weight, 0), x_XI.dtype) for w_IO in ws
    )
    return ys, (rule.keep(x_XI, q), ws)


def _linear_backward(rule, residuals, dys):
    kept, ws = residuals
    backend, dtype = rule.backend, dys[0].dtype
    x = backend.operand(rule.cached(kept, dtype), rule.column, 0)
    dx_XI, dws = 0.0, []
    for w_IO, dy_XO in zip(ws, dys, strict=True):
        rows, columns = backend.both_ways(dy_XO, rule.gradient, rule.gradient_column)
        dx_XI += backend.multiply(rows, backend.weights(w_IO, rule.weight, 1))  # Dgrad
        dws.append(backend.multiply(x, columns).astype(w_IO.dtype))  # Wgrad
    return rule.gradient_of(kept, jnp.asarray(dx_XI).astype(dtype)), tuple(dws)


_linear.defvjp(_linear_forward, _linear_backward)


# --- grouped -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    rule: Fp8Rule, x_PI: Operand, ws: tuple[Array, ...], expert_Z: Array
) -> tuple[Array, ...]:
    return _grouped_forward(rule, x_PI, ws, expert_Z)[0]


def _grouped_forward(rule, x_PI, ws, expert_Z):
    backend, q = rule.backend, rule.backend.quantize(x_PI, rule.activation)
    x = backend.rows(q, rule.activation, 1, expert_Z)
    weights = [backend.weights(w_EIO, rule.weight, 0) for w_EIO in ws]
    ys = tuple(backend.times_experts(x, w, expert_Z, x_PI.dtype) for w in weights)
    return ys, (rule.keep(x_PI, q), ws, expert_Z)


def _grouped_backward(rule, residuals, dys):
    kept, ws, expert_Z = residuals
    backend, dtype = rule.backend, dys[0].dtype
    x = backend.rows(rule.cached(kept, dtype), rule.column, 0, expert_Z)
    dx_PI, dws = 0.0, []
    for w_EIO, dy_PO in zip(ws, dys, strict=True):
        rows, columns = backend.rows_both_ways(dy_PO, rule.gradient, rule.gradient_column, expert_Z)
        weights = backend.weights(w_EIO, rule.weight, 1)
        dx_PI += backend.times_experts(rows, weights, expert_Z, jnp.float32)
        dw_EIO = backend.expert_gradients(x, columns, expert_Z, w_EIO.shape[0])
        dws.append(dw_EIO.astype(w_EIO.dtype))
    return rule.gradient_of(kept, jnp.asarray(dx_PI).astype(dtype)), tuple(dws), None


_grouped.defvjp(_grouped_forward, _grouped_backward)
