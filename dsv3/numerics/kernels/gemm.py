"""The one matrix multiplication of Hopper's kernels: persistent, warp-specialised, bubble-free.

Every product here is C[rows, columns] = sum over steps of A · B for many tiles, and differs in
where the operands of a step lie and in what is done with their product. A `Gemm` says that much.
The machinery around it is that of `persistent`: a place is a tile of C, of which each multiplying
warpgroup has half the rows, or half the columns where a tile has but 64 rows. It stores its half by
TMA while the next tile begins.

Edges cost little: TMA reads zeros beyond an operand and does not write beyond the result. But what
it tiles for wgmma must be whole tiles of 8 rows of 128 bytes: other arrays are padded (`aligned`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from dsv3.numerics.kernels import persistent
from dsv3.numerics.kernels.persistent import (
    WARPGROUP_ROWS,
    WARPGROUPS,
    Loop,
    Persistent,
    Stream,
    round_up,
    swizzle,
)

BLOCK = 128  # rows of one expert


@dataclass(frozen=True)
class Tuning:
    """What changes a kernel's speed and not its result.

    A tile is `rows` x `columns` of the result. `stages` steps are in flight, and the result leaves
    through `slots` buffers for each warpgroup. Tiles are walked in snakes of `snake` columns, so
    that neighbours in time share operands in L2. `multicast` joins two CTAs that need the same left
    ('rows') or right ('columns') operand, and loads it once for both.
    """

    rows: int = 128
    columns: int = 128
    stages: int = 5
    slots: int = 2
    snake: int = 8
    sms: int = 132  # H100 and H200 in SXM form
    multicast: Literal["none", "rows", "columns"] = "none"

    def __post_init__(self):
        for name in ("stages", "slots", "snake", "sms"):
            if getattr(self, name) < 1:
                raise ValueError(f"tuning.{name} = {getattr(self, name)} must be positive")
        if self.rows not in (64, 128):
            raise ValueError(f"tuning.rows = {self.rows} is neither 64 nor 128")
        if self.columns not in (32, 64, 128, 256):
            raise ValueError(f"tuning.columns = {self.columns} is none of 32, 64, 128, 256")

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of the tile that one warpgroup computes."""
        return WARPGROUP_ROWS, self.columns * self.rows // (WARPGROUPS * WARPGROUP_ROWS)

    def store_shape(self, dtype: DTypeLike) -> tuple[int, int, int, int]:
        """The buffers through which the result leaves: rows of at most 128 bytes, one swizzle.

        They are as many as divide a part's pieces, so that each tile begins with the oldest.
        """
        width = min(self.part[1], 128 // jnp.dtype(dtype).itemsize)
        return WARPGROUPS, math.gcd(self.slots, self.part[1] // width), WARPGROUP_ROWS, width

    @property
    def cluster(self) -> int:
        return 1 if self.multicast == "none" else 2


class Tile(NamedTuple):
    """Where a tile of the result lies and which steps it sums; traced integers."""

    row: Array  # in elements, as `column`
    column: Array
    group: Any  # which expert, where there are several
    first: Any  # step, of the contraction
    steps: Any


@dataclass(frozen=True)
class Gemm:
    """What one product is; `locate` and `count` see the scalar operands' references.

    `compute(loop, warpgroup)` yields a warpgroup's part of a tile in FP32. It reads the blocks of
    a step until `delay` further steps have been begun.
    """

    name: str
    streams: tuple[Stream, ...]
    compute: Callable[[Loop, Array], Array]
    locate: Callable[..., Tile]  # (index, cta of the cluster, *scalars)
    count: int  # tiles, or pairs of tiles where CTAs form clusters
    shape: tuple[int, ...]  # of the result; three dimensions: groups first
    delay: int = 0


def run(gemm: Gemm, tuning: Tuning, dtype: DTypeLike, operands: Sequence[Array],
        scalars: Sequence[Array] = ()) -> Array:  # fmt: skip
    """The result in `dtype` from an operand for each stream and int32 vectors for `locate`."""
    operands = [
        aligned(x) if stream.swizzled else round_up(x, x.ndim - 1, 16 // x.dtype.itemsize)
        for stream, x in zip(gemm.streams, operands, strict=True)
    ]
    *groups, rows, columns = gemm.shape
    shape = (*groups, -(-rows // 8) * 8, -(-columns // row_of(dtype)) * row_of(dtype))

    def work(loop, tile, warpgroup, refs, scratch):
        part = gemm.compute(loop, warpgroup)
        _store(tuning, part, tile, warpgroup, scratch[0], refs[0])

    kernel = Persistent(
        gemm.name, gemm.streams, gemm.locate, work, gemm.count, tuning.stages, tuning.sms,
        tuning.cluster, gemm.delay,
    )  # fmt: skip
    stores = tuning.store_shape(dtype)
    scratch = [plgpu.SMEM(stores, dtype, transforms=swizzle(stores[-1], dtype))]
    out = [jax.ShapeDtypeStruct(shape, dtype)]
    [result] = persistent.run(kernel, out, operands, scalars=scalars, scratch=scratch)
    return result[..., :rows, :columns]


def _store(tuning: Tuning, part: Array, tile: Tile, warpgroup, store, result) -> None:
    """Write a warpgroup's part of a tile through its slots."""
    (rows, columns), (_, slots, _, width) = tuning.part, store.shape
    by_rows = tuning.rows == WARPGROUPS * rows
    row = tile.row + warpgroup * rows if by_rows else tile.row
    column = tile.column if by_rows else tile.column + warpgroup * columns
    if len(result.shape) == 3:
        result = result.at[tile.group]
    for i in range(columns // width):
        cut, slot = i * width, i % slots
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        store[warpgroup, slot] = part[:, cut : cut + width].astype(result.dtype)
        plgpu.commit_smem()
        place = pl.ds(row, rows), pl.ds(column + cut, width)
        plgpu.copy_smem_to_gmem(store.at[warpgroup, slot], result.at[place])


# --- what a caller shares ----------------------------------------------------------------------


def tiles(rows: int, columns: int, tuning: Tuning) -> tuple[int, int]:
    """Down and across the result, counting a cluster's two as one."""
    down, across = -(-rows // tuning.rows), -(-columns // tuning.columns)
    halved = {"none": (down, across), "rows": (down, -(-across // 2)),
              "columns": (-(-down // 2), across)}  # fmt: skip
    return halved[tuning.multicast]


def origin(tuning: Tuning, index, cta, shape: tuple[Any, int]) -> tuple[Array, Array]:
    """Row and column where tile `index` of the `tiles` begins, along the snake."""
    down, across = plgpu.planar_snake(index, shape, 1, tuning.snake)
    if tuning.multicast == "rows":
        across = across * 2 + cta
    if tuning.multicast == "columns":
        down = down * 2 + cta
    return down * tuning.rows, across * tuning.columns


def part_of(tuning: Tuning, warpgroup: Array) -> tuple[Any, Any]:
    """Slices of the tile's rows and of its columns that a warpgroup multiplies."""
    rows, columns = tuning.part
    if tuning.rows == WARPGROUPS * rows:
        return pl.ds(warpgroup * rows, rows), pl.ds(0, columns)
    return pl.ds(0, rows), pl.ds(warpgroup * columns, columns)


def row_of(dtype: DTypeLike) -> int:
    """Elements of a row of 128 bytes, the width of a swizzled tile."""
    return 128 // jnp.dtype(dtype).itemsize


def aligned(x: Array) -> Array:
    """x with zeros up to whole tiles of 8 rows of 128 bytes."""
    return round_up(round_up(x, x.ndim - 2, 8), x.ndim - 1, row_of(x.dtype))


def first_blocks(expert_Z: Array, experts: int) -> Array:
    """int32 [E + 1]: where each expert's blocks begin, and where the last one's end."""
    return jnp.searchsorted(expert_Z, jnp.arange(experts + 1)).astype(jnp.int32)


def every_128(expert_Z: Array, rows: int) -> Array:
    """The expert of each 128 of `rows`, from that of each longer block; ValueError if it is not."""
    block = rows // len(expert_Z)
    if block % BLOCK:
        raise ValueError(f"blocks of {block} rows: kernels want a multiple of {BLOCK}")
    return jnp.repeat(expert_Z, block // BLOCK)
