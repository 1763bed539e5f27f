"""The BF16 dot rule, and the choice of a rule by configuration. See `rule` for the contract."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.config import Bf16Dot, Fp8Dot, HopperAccumulator
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.operand import Operand, value
from dsv3.numerics.rows import contract_rows
from dsv3.numerics.rule import (
    KERNELS_BLOCK,
    LEAST_BLOCK,
    LINEAR,
    DotRule,
    Formats,
    LinearMap,
    PlainWire,
    blocks,
    expert_gradients,
    in_use,
    times_experts,
)


def build(config: Bf16Dot | Fp8Dot) -> DotRule:
    """The rule that a configuration names."""
    match config:
        case Bf16Dot():
            return PlainDot(mosaic=config.backend == "mosaic")
        case Fp8Dot():
            return Fp8Rule(config)


def obstacle(config: Bf16Dot | Fp8Dot, platform: str, block: int = 128) -> str | None:
    """What keeps `kernels` from multiplying on a platform; None if nothing does."""
    if isinstance(getattr(config, "accumulator", None), HopperAccumulator):
        return "multiplies by no model.dot.accumulator but 'exact'"
    if platform != "hopper":
        return f"needs a GPU of compute capability 9.0, not {platform!r}"
    if block % KERNELS_BLOCK:
        return f"needs model.moe.block a multiple of {KERNELS_BLOCK}, not {block}"
    return None


def placed[D: Bf16Dot | Fp8Dot](config: D, platform: str, block: int = 128) -> D:
    """`config` with its backend chosen for a platform, where it leaves the choice.

    On 'hopper', a GPU of compute capability 9.0, it is 'mosaic' if experts' blocks are multiples of
    128 rows. Else the BF16 rule takes 'xla', and FP8 'reference' on CPUs and under an emulated
    accumulator, 'dequant', which costs one BF16 product, anywhere else. Raises ConfigError where
    'mosaic' was asked for and cannot be.
    """
    reason = obstacle(config, platform, block)
    config.require(config.backend != "mosaic" or reason is None, "backend",
                   f"{reason}; 'auto' chooses what runs here")  # fmt: skip
    if config.backend != "auto":
        return config
    if reason is None:
        return replace(config, backend="mosaic")
    if isinstance(config, Bf16Dot):
        return replace(config, backend="xla")
    emulated = isinstance(config.accumulator, HopperAccumulator)
    return replace(config, backend="reference" if platform == "cpu" or emulated else "dequant")


@dataclass(frozen=True)
class PlainDot(LinearMap):
    """Products in the compute dtype (BF16, or FP32 when x is), accumulated in FP32.

    With `mosaic` those of experts' rows in BF16 are kernels for Hopper; all else is XLA's.
    """

    mosaic: bool = False
    kept: tuple[str, ...] = ("attention", "dispatch", "swiglu_in")

    @property
    def formats(self) -> Formats:
        plain = "compute x compute"
        return Formats(plain, plain, plain, "compute")

    @property
    def wire(self) -> PlainWire:
        return PlainWire()

    gradient_wire = wire

    @property
    def least_block(self) -> int:
        return KERNELS_BLOCK if self.mosaic else LEAST_BLOCK

    @property
    def after_attention(self) -> "PlainDot":
        return self

    after_dispatch = before_combine = after_attention

    def linear(self, x_XI: Operand, ws: tuple[Array, ...]) -> tuple[Array, ...]:
        x_XI = value(x_XI)
        return tuple(_linear(x_XI, w_IO) for w_IO in ws)

    def grouped(self, x_PI: Operand, ws: Sequence[Array], expert_Z: Array) -> tuple[Array, ...]:
        """y_PO in x's dtype for each w of `ws`: rows of block z times w_EIO[expert_Z[z]]; blocks
        are P / Z rows. One product with all weights side by side."""
        mosaic = self.mosaic and x_PI.dtype == jnp.bfloat16
        return _grouped(mosaic, value(x_PI), *in_use(ws, expert_Z))


def _product(dims: Any) -> Callable[[Array, Array], Array]:
    return functools.partial(
        lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32
    )


FPROP = _product(LINEAR)
DGRAD = _product((((1,), (1,)), ((), ())))


@jax.custom_vjp
def _linear(x_XI, w_IO):
    return FPROP(x_XI, w_IO.astype(x_XI.dtype)).astype(x_XI.dtype)


def _linear_forward(x_XI, w_IO):
    return _linear(x_XI, w_IO), (x_XI, w_IO)


def _linear_backward(residuals, dy_XO):
    x_XI, w_IO = residuals
    dx_XI = DGRAD(dy_XO, w_IO.astype(dy_XO.dtype))
    return dx_XI.astype(x_XI.dtype), contract_rows(x_XI, dy_XO).astype(w_IO.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(mosaic, x_PI, ws, expert_Z):
    w_EIO = jnp.concatenate(ws, axis=-1).astype(x_PI.dtype)
    if mosaic:
        y_PO = _mosaic().times_experts(x_PI, w_EIO, expert_Z)
    else:
        y_PO = _times_experts(x_PI, w_EIO, expert_Z, w_EIO.shape[2], FPROP)
    return _apart(y_PO, ws)


def _grouped_forward(mosaic, x_PI, ws, expert_Z):
    return _grouped(mosaic, x_PI, ws, expert_Z), (x_PI, ws, expert_Z)


def _grouped_backward(mosaic, residuals, dys):
    x_PI, ws, expert_Z = residuals
    dy_PO = jnp.concatenate(dys, axis=-1)
    w_EIO = jnp.concatenate(ws, axis=-1).astype(dy_PO.dtype)
    if mosaic:
        dx_PI = _mosaic().times_experts(dy_PO, w_EIO, expert_Z, transposed=True)
        dw_EIO = _mosaic().expert_gradients(x_PI, dy_PO, expert_Z, w_EIO.shape[0])
    else:
        dx_PI = _times_experts(dy_PO, w_EIO, expert_Z, w_EIO.shape[1], DGRAD)
        x_ZbI, dy_ZbO = blocks(x_PI, expert_Z), blocks(dy_PO, expert_Z)
        dw_EIO = expert_gradients(contract_rows, x_ZbI, dy_ZbO, expert_Z, w_EIO.shape)
    dws = _apart(dw_EIO, ws)
    return dx_PI, tuple(dw.astype(w.dtype) for dw, w in zip(dws, ws, strict=True)), None


def _apart(joined: Array, ws: Sequence[Array]) -> tuple[Array, ...]:
    """What lies side by side, as the weights do."""
    ends = itertools.accumulate(w.shape[-1] for w in ws[:-1])
    return tuple(jnp.split(joined, list(ends), axis=-1))


def _times_experts(x_PI, w_EIO, expert_Z, outputs, multiply):
    x_ZbI = blocks(x_PI, expert_Z)
    start_ZbN = jnp.zeros((*x_ZbI.shape[:2], outputs), x_PI.dtype)
    return times_experts(multiply, x_ZbI, w_EIO, expert_Z, start_ZbN)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _mosaic():
    from dsv3.numerics.kernels import bf16_gemm  # a second to import

    return bf16_gemm


@functools.partial(jax.jit, static_argnames="block")
def grouped_loop(x_PI: Array, w_EIO: Array, expert_Z: Array, block: int) -> Array:
    """The oracle of `grouped` with one weight: each expert times all rows, others' rows masked."""
    expert_P = jnp.repeat(expert_Z, block)
    y_PO = jnp.zeros((x_PI.shape[0], w_EIO.shape[-1]), x_PI.dtype)
    for expert in range(w_EIO.shape[0]):
        mine_P1 = (expert_P == expert)[:, None]
        y_PO += jnp.where(mine_P1, x_PI @ w_EIO[expert].astype(x_PI.dtype), 0)
    return y_PO
