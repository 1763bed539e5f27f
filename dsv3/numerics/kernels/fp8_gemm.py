"""FP8 products with fine-grained scaling on Hopper's tensor cores (§3.3.2, Fig. 7).

    nt      y[m, n] = sum_k sx[k, m] · sw[k, n'] · sum_{c in k} x[m, c] · w[n, c]      Fprop, Dgrad
    wgrad   g[m, n] = sum_k sa[k, m] · sb[k, n]  · sum_{c in k} a[m, c] · b[n, c]      Wgrad

k counts blocks of 128 of the contraction, n' those of the outputs: `nt` is 1x128 tiles by 128x128
blocks, `wgrad` 1x128 by 1x128 with tokens as contraction. Each block of 128 begins a fresh
accumulator in the tensor core, four instructions; its sum is scaled and added in FP32 registers.
While one warpgroup promotes, the other multiplies.

wgmma takes 8-bit operands only with the contraction innermost ("NT"), hence both operands are
[rows, contraction], and a matrix used both ways is stored twice. Scales have the contraction first,
[k, rows], so that a tile's scales are one contiguous copy. A block's scale is stored four times:
TMA moves 16 bytes at least.

Both exist for experts: rows in blocks of 128, sorted by expert, `expert_Z` (int32) naming each
block's and E marking unused blocks, which come last and yield zeros in `nt`; `wgrad` sums each
expert's tokens, zeros for an expert that has none.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from dsv3.numerics.fp8 import GROUP
from dsv3.numerics.kernels.gemm import (
    Gemm,
    Tile,
    Tuning,
    first_blocks,
    origin,
    part_of,
    run,
    tiles,
)
from dsv3.numerics.kernels.persistent import Stream
from dsv3.numerics.kernels.quantize import COLUMN, ROW, TMA_SCALES

WGRAD = Tuning()
TILE_COST = 32  # what a tile costs besides its columns, in columns; a guess, to be measured


def nt_tuning(rows: int, columns: int) -> Tuning:
    """Tiles that keep the SMs busy: flat where there are few rows, narrow where there are few
    tiles; the least of rounds over the SMs times the cost of a tile."""
    height = 64 if rows <= 64 else 128
    options = [Tuning(rows=height, columns=width) for width in (128, 64, 32)]

    def cost(tuning: Tuning) -> int:
        down, across = tiles(rows, columns, tuning)
        return -(-down * across // tuning.sms) * (tuning.columns + TILE_COST)

    return min(options, key=cost)


def nt(
    x_MK: Array, sx_kM: Array, w_ENK: Array, sw_Ekn4: Array, expert_Z: Array | None = None,
    dtype: DTypeLike = jnp.bfloat16, tuning: Tuning | None = None,
) -> Array:  # fmt: skip
    """[M, N] in `dtype`: rows of x times w of their block's expert, or w_ENK[0] without experts.

    x_MK and w_ENK float8, K a multiple of 16; sx_kM and sw_Ekn4 FP32, k = ceil(K / 128), n =
    ceil(N / 128), M a multiple of 4 in sx (more columns than x has rows are ignored). With
    `expert_Z`, M = 128·Z. Raises ValueError naming the dimension that does not fit.
    """
    (M, K), (E, N, _) = x_MK.shape, w_ENK.shape
    tuning = tuning or (nt_tuning(M, N) if expert_Z is None else Tuning())
    _require_nt(x_MK, sx_kM, w_ENK, sw_Ekn4, expert_Z, tuning)
    down, across = tiles(M, N, tuning)
    steps = -(-K // GROUP)

    def locate(index, cta, *experts):
        row, column = origin(tuning, index, cta, (down, across))
        if not experts:
            return Tile(row, column, 0, 0, steps)
        expert = experts[0][lax.div(row, GROUP)]
        return Tile(row, column, expert, 0, jnp.where(expert < E, steps, 0))

    def compute(loop, warpgroup):
        rows, columns = part_of(tuning, warpgroup)

        def step(_, blocks, total):
            x, w, sx, sw = blocks
            part = _fresh_product(x.at[rows], w.at[columns], tuning.part)
            scale = plgpu.load(sx.at[0, rows], layout=ROW) * sw[0]
            return total + part * lax.broadcast_in_dim(scale, part.shape, [0])

        return loop(step, _zeros(tuning.part))

    streams = (
        Stream((tuning.rows, GROUP), lambda t, k: _box(t.row, tuning.rows, k),
               shared=tuning.multicast == "rows"),
        Stream((tuning.columns, GROUP), lambda t, k: (t.group, *_box(t.column, tuning.columns, k)),
               shared=tuning.multicast == "columns"),
        Stream((1, tuning.rows), lambda t, k: (pl.ds(k, 1), pl.ds(t.row, tuning.rows)), False),
        Stream((TMA_SCALES,), lambda t, k: (t.group, k, lax.div(t.column, GROUP), FOURFOLD), False),
    )  # fmt: skip
    gemm = Gemm("fp8_nt", streams, compute, locate, down * across, (M, N))
    scalars = () if expert_Z is None else (expert_Z,)
    return run(gemm, tuning, dtype, (x_MK, w_ENK, sx_kM, sw_Ekn4), scalars)


def wgrad(
    a_MT: Array, sa_tM: Array, b_NT: Array, sb_tN: Array, expert_Z: Array | None = None,
    experts: int = 1, tuning: Tuning = WGRAD,
) -> Array:  # fmt: skip
    """FP32 [experts, M, N]: a · bᵀ over the tokens of each expert, or over all of them.

    a_MT and b_NT float8 (E4M3 or E5M2, not necessarily the same), T a multiple of 16; sa_tM and
    sb_tN FP32, t = ceil(T / 128), M and N multiples of 4 there. With `expert_Z`, T = 128·Z.
    """
    (M, T), (N, _) = a_MT.shape, b_NT.shape
    _require_wgrad(a_MT, sa_tM, b_NT, sb_tN, expert_Z)
    down, across = tiles(M, N, tuning)
    each = down * across
    steps = -(-T // GROUP)

    def locate(index, cta, *ranges):
        group = lax.div(index, jnp.int32(each))
        row, column = origin(tuning, lax.rem(index, jnp.int32(each)), cta, (down, across))
        if not ranges:
            return Tile(row, column, group, 0, steps)
        first = ranges[0][group]
        return Tile(row, column, group, first, ranges[0][group + 1] - first)

    def compute(loop, warpgroup):
        rows, columns = part_of(tuning, warpgroup)

        def step(_, blocks, total):
            a, b, sa, sb = blocks
            part = _fresh_product(a.at[rows], b.at[columns], tuning.part)
            scale_M = plgpu.load(sa.at[0, rows], layout=ROW)
            scale_N = plgpu.load(sb.at[0, columns], layout=COLUMN)
            scaled = part * lax.broadcast_in_dim(scale_M, part.shape, [0])
            return total + scaled * lax.broadcast_in_dim(scale_N, part.shape, [1])

        return loop(step, _zeros(tuning.part))

    streams = (
        Stream((tuning.rows, GROUP), lambda t, k: _box(t.row, tuning.rows, k),
               shared=tuning.multicast == "rows"),
        Stream((tuning.columns, GROUP), lambda t, k: _box(t.column, tuning.columns, k),
               shared=tuning.multicast == "columns"),
        Stream((1, tuning.rows), lambda t, k: (pl.ds(k, 1), pl.ds(t.row, tuning.rows)), False),
        Stream((1, tuning.columns), lambda t, k: (pl.ds(k, 1), pl.ds(t.column, tuning.columns)),
               False),
    )  # fmt: skip
    gemm = Gemm("fp8_wgrad", streams, compute, locate, experts * each, (experts, M, N))
    scalars = () if expert_Z is None else (first_blocks(expert_Z, experts),)
    return run(gemm, tuning, jnp.float32, (a_MT, b_NT, sa_tM, sb_tN), scalars)


FOURFOLD = pl.ds(0, TMA_SCALES)


def _box(start, size: int, k) -> tuple:
    return pl.ds(start, size), pl.ds(k * GROUP, GROUP)


def _zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _fresh_product(a, b, shape: tuple[int, int]) -> Array:
    """One block of the contraction in an accumulator of its own."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


# --- what must hold ----------------------------------------------------------------------------


def _require_nt(x_MK, sx_kM, w_ENK, sw_Ekn4, expert_Z, tuning: Tuning) -> None:
    (M, K), (E, N, _) = x_MK.shape, w_ENK.shape
    k, n = -(-K // GROUP), -(-N // GROUP)
    _require("K", w_ENK.shape[2], K, "w_ENK", "x_MK")
    _require("k", sx_kM.shape[0], k, "sx_kM", "x_MK")
    _require("M", min(sx_kM.shape[1], M), M, "sx_kM", "x_MK")
    _require("[E, k, n, 4]", sw_Ekn4.shape, (E, k, n, TMA_SCALES), "sw_Ekn4", "w_ENK")
    if tuning.columns > GROUP:
        raise ValueError(f"nt: tuning.columns = {tuning.columns} spans weight blocks of {GROUP}")
    if expert_Z is None:
        _require("E", E, 1, "w_ENK", "a product without experts")
        return
    _require("M", M, GROUP * expert_Z.shape[0], "x_MK", f"{expert_Z.shape[0]} blocks of {GROUP}")
    if tuning.rows != GROUP or tuning.multicast == "columns":
        raise ValueError(f"nt: blocks of {GROUP} rows of one expert want tuning.rows = {GROUP} "
                         "and no multicast of columns")  # fmt: skip


def _require_wgrad(a_MT, sa_tM, b_NT, sb_tN, expert_Z) -> None:
    T = a_MT.shape[1]
    t = -(-T // GROUP)
    _require("T", b_NT.shape[1], T, "b_NT", "a_MT")
    for scales, of, (size, rows) in (("sa_tM", "a_MT", (sa_tM.shape, a_MT.shape[0])),
                                     ("sb_tN", "b_NT", (sb_tN.shape, b_NT.shape[0]))):  # fmt: skip
        _require("t", size[0], t, scales, of)
        _require("rows", min(size[1], rows), rows, scales, of)
    if expert_Z is not None:
        _require("T", T, GROUP * expert_Z.shape[0], "a_MT", f"{expert_Z.shape[0]} blocks of 128")


def _require(dimension: str, got, wanted, of: str, by: str) -> None:
    if got != wanted:
        raise ValueError(f"{of} has {dimension} = {got}, {by} wants {wanted}")
