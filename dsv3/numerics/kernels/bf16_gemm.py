"""BF16 products of experts' rows on Hopper, for the BF16 dot rule: what `lax.ragged_dot` should be.

    forward   y[p, o] = sum_i x[p, i] · w[e, i, o]       p in a block of expert e
    dgrad     d[p, i] = sum_o y[p, o] · w[e, i, o]
    wgrad     g[e, i, o] = sum over e's rows of x[p, i] · y[p, o]      FP32

wgmma takes 16-bit operands with either dimension innermost, so nothing is transposed or copied. The
accumulator stays in the tensor core for the whole contraction, and a tile may be 256 columns wide.
Rows are sorted by expert in blocks of 128; unused blocks, last, yield zeros (see `fp8_gemm`).
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from dsv3.numerics.kernels.gemm import (
    BLOCK,
    Gemm,
    Tile,
    Tuning,
    every_128,
    first_blocks,
    origin,
    part_of,
    run,
    tiles,
)
from dsv3.numerics.kernels.persistent import Stream

STEP = 64  # of the contraction: 128 bytes, one swizzle
TUNING = Tuning(columns=256, stages=4)


def times_experts(
    x_PK: Array, w_E: Array, expert_Z: Array, transposed: bool = False, tuning: Tuning = TUNING
) -> Array:
    """BF16 [P, N]: each block of x times its expert's w [K, N], or w [N, K] if `transposed`.

    P / Z is a multiple of 128. Raises ValueError naming the dimension that does not fit.
    """
    _require_bf16(x_PK=x_PK, w_E=w_E)
    expert_Z = every_128(expert_Z, len(x_PK))
    (P, K), E = x_PK.shape, len(w_E)
    N = w_E.shape[1 if transposed else 2]
    _require(w_E, "w_E", 2 if transposed else 1, K, "x_PK")
    if tuning.rows != BLOCK or tuning.multicast == "columns":
        raise ValueError(f"tuning.rows = {tuning.rows}, tuning.multicast = {tuning.multicast!r}: "
                         f"blocks of {BLOCK} rows share no columns")  # fmt: skip
    down, across = tiles(P, N, tuning)
    steps = -(-K // STEP)

    def locate(index, cta, expert_Z):
        row, column = origin(tuning, index, cta, (down, across))
        expert = expert_Z[lax.div(row, BLOCK)]
        return Tile(row, column, expert, 0, jnp.where(expert < E, steps, 0))

    def window(tile, k):
        along, column = pl.ds(k * STEP, STEP), pl.ds(tile.column, tuning.columns)
        return (tile.group, column, along) if transposed else (tile.group, along, column)

    def factors(blocks, rows, columns):
        x, w = blocks
        return x.at[rows], w.at[columns].transpose((1, 0)) if transposed else w.at[:, columns]

    wide = (tuning.columns, STEP) if transposed else (STEP, tuning.columns)
    streams = (
        Stream((tuning.rows, STEP), lambda t, k: (pl.ds(t.row, tuning.rows), _along(k)),
               shared=tuning.multicast == "rows"),
        Stream(wide, window),
    )  # fmt: skip
    gemm = Gemm("bf16_experts", streams, _compute(tuning, factors), locate, down * across, (P, N),
                delay=1)  # fmt: skip
    return run(gemm, tuning, jnp.bfloat16, (x_PK, w_E), (expert_Z,))


def expert_gradients(
    x_PI: Array, dy_PO: Array, expert_Z: Array, experts: int, tuning: Tuning = TUNING
) -> Array:
    """FP32 [E, I, O]: x transposed times dy over each expert's rows."""
    _require_bf16(x_PI=x_PI, dy_PO=dy_PO)
    expert_Z = every_128(expert_Z, len(x_PI))
    _require(dy_PO, "dy_PO", 0, len(x_PI), "x_PI")
    down, across = tiles(x_PI.shape[1], dy_PO.shape[1], tuning)
    each, per_block = down * across, BLOCK // STEP

    def locate(index, cta, ranges):
        group = lax.div(index, jnp.int32(each))
        row, column = origin(tuning, lax.rem(index, jnp.int32(each)), cta, (down, across))
        first = ranges[group] * per_block
        return Tile(row, column, group, first, ranges[group + 1] * per_block - first)

    def factors(blocks, rows, columns):
        x, dy = blocks
        return x.at[:, rows].transpose((1, 0)), dy.at[:, columns]

    streams = (
        Stream((STEP, tuning.rows), lambda t, k: (_along(k), pl.ds(t.row, tuning.rows)),
               shared=tuning.multicast == "rows"),
        Stream((STEP, tuning.columns), lambda t, k: (_along(k), pl.ds(t.column, tuning.columns)),
               shared=tuning.multicast == "columns"),
    )  # fmt: skip
    shape = (experts, x_PI.shape[1], dy_PO.shape[1])
    gemm = Gemm("bf16_wgrad", streams, _compute(tuning, factors), locate, experts * each, shape,
                delay=1)  # fmt: skip
    return run(gemm, tuning, jnp.float32, (x_PI, dy_PO), (first_blocks(expert_Z, experts),))


def _along(k):
    return pl.ds(k * STEP, STEP)


def _compute(tuning: Tuning, factors):
    """Everything into one accumulator, one product in flight while the next is issued."""

    def compute(loop, warpgroup):
        rows, columns = part_of(tuning, warpgroup)

        def scope(accumulator):
            def step(_, blocks, carry):
                plgpu.wgmma(accumulator, *factors(blocks, rows, columns))
                plgpu.wgmma_wait(1)
                return carry

            loop(step, jnp.int32(0))
            return accumulator[...]

        return pl.run_scoped(scope, plgpu.ACC(tuning.part, jnp.float32))

    return compute


def _require_bf16(**operands: Array) -> None:
    for name, x in operands.items():
        if x.dtype != jnp.bfloat16:
            raise ValueError(f"{name} is {x.dtype}, not bfloat16")


def _require(x: Array, name: str, axis: int, wanted: int, by: str) -> None:
    if x.shape[axis] != wanted:
        raise ValueError(f"{name} is {x.shape}: {by} wants {wanted} in dimension {axis}")
