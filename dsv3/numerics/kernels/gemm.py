"""The one matrix multiplication of Hopper's kernels: persistent, warp-specialised, bubble-free.

Every product here is C[rows, columns] = sum over steps of A · B for many tiles, and differs in
where the operands of a step lie and in what is done with their product. A `Gemm` says that much;
this file is the machinery around it, in Pallas Mosaic GPU:

    each SM      one CTA of three warpgroups walks over tiles sm, sm + SMS, sm + 2·SMS, ...
    warpgroup 2  copies the streams of each step to shared memory by TMA, `stages` steps ahead,
                 and goes on to the next tile without waiting for this one's end
    0 and 1      multiply (wgmma), each half of the tile's rows, or of its columns where a tile
                 has but 64 rows, and store their half by TMA while the next tile begins

Two barriers a stage: `full` when its streams have arrived, `free` when both halves have read it.
Everything starts free, so that the copying side always waits and no first round is special; at the
end one completion of each stage is left over, and is awaited, lest a CTA of a cluster exits while
its neighbour still signals to it.

Edges cost little: TMA reads zeros beyond an operand and does not write beyond the result. But what
it tiles for wgmma must be whole tiles of 8 rows of 128 bytes: other arrays are padded (`aligned`).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

BLOCK = 128  # rows of one expert
WARPGROUPS = 2  # that multiply
WARPGROUP_ROWS = 64  # of one wgmma
COPY_REGISTERS = 40  # a thread of the copying warpgroup keeps; the others share what it gives up
SHARED_MEMORY = 227 * 1024  # bytes of a CTA


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
class Stream:
    """An operand's share of a step: `block` is its shape, `window(tile, step)` its place."""

    block: tuple[int, ...]
    window: Callable[[Tile, Any], tuple]
    swizzled: bool = True  # as wgmma wants it; scales are plain
    shared: bool = False  # one multicast serves both CTAs of a cluster


Loop = Callable[[Callable[..., Any], Any], Any]  # loop(body(blocks, carry), carry), over the steps


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
    require_shared_memory(gemm, tuning, dtype, [x.dtype for x in operands])
    operands = [
        aligned(x) if stream.swizzled else round_up(x, x.ndim - 1, 16 // x.dtype.itemsize)
        for stream, x in zip(gemm.streams, operands, strict=True)
    ]
    *groups, rows, columns = gemm.shape
    shape = (*groups, -(-rows // 8) * 8, -(-columns // row_of(dtype)) * row_of(dtype))

    def kernel(*refs):
        inputs, scalar_refs = refs[: len(operands)], refs[len(operands) : -1]
        _kernel(gemm, tuning, inputs, scalar_refs, refs[-1])

    result = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(_width(gemm, tuning),),
        grid_names=("sm",),
        cluster=(tuning.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=gemm.name,
    )(*operands, *scalars)
    return result[..., :rows, :columns]


def _width(gemm: Gemm, tuning: Tuning) -> int:
    """CTAs, or clusters of two, that share the tiles."""
    return max(1, min(tuning.sms // tuning.cluster, gemm.count))


def _kernel(gemm: Gemm, tuning: Tuning, inputs, scalars, result) -> None:
    stages, streams = tuning.stages, gemm.streams
    stores = tuning.store_shape(result.dtype)
    free_type = plgpu.Barrier
    if tuning.multicast != "none":
        free_type = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))

    @functools.partial(
        pl.run_scoped,
        buffers=[
            plgpu.SMEM((stages, *stream.block), x.dtype, transforms=_transforms(stream, x.dtype))
            for stream, x in zip(streams, inputs, strict=True)
        ],
        store=plgpu.SMEM(stores, result.dtype, transforms=swizzle(stores[-1], result.dtype)),
        full=plgpu.Barrier(num_arrivals=len(streams), num_barriers=stages),
        free=free_type(num_arrivals=WARPGROUPS, num_barriers=stages),
        collective_axes="warpgroup",
    )
    def scope(buffers, store, full, free):
        warpgroup, sm = lax.axis_index("warpgroup"), lax.axis_index("sm")
        width = _width(gemm, tuning)
        mine = lax.div(gemm.count - sm + (width - 1), jnp.int32(width))

        def tile(i):
            return gemm.locate(sm + i * width, lax.axis_index("cluster"), *scalars)

        def copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def one(i, done):
                return _copy_tile(gemm, stages, tile(i), done, inputs, buffers, full, free)

            lax.fori_loop(0, mine, one, jnp.int32(0))
            for stage in range(stages):
                plgpu.barrier_wait(free.at[stage])

        def multiply():
            spare = (512 - COPY_REGISTERS) // WARPGROUPS // 8 * 8  # 64 Ki registers, 128 threads
            plgpu.set_max_registers(spare, action="increase")
            for stage in range(stages):
                plgpu.barrier_arrive(free.at[stage])

            def one(i, done):
                at = tile(i)
                loop = functools.partial(_steps, gemm, stages, at, done, buffers, full, free)
                _store(tuning, gemm.compute(loop, warpgroup), at, warpgroup, store, result)
                return done + at.steps

            lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(warpgroup == WARPGROUPS, copy, multiply)


def _copy_tile(gemm: Gemm, stages: int, tile: Tile, done, inputs, buffers, full, free):
    """Copy the tile's steps, each into the stage that becomes free; steps copied so far."""

    def step(k, done):
        stage = lax.rem(done, jnp.int32(stages))
        plgpu.barrier_wait(free.at[stage])
        for stream, x, buffer in zip(gemm.streams, inputs, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                x.at[stream.window(tile, tile.first + k)], buffer.at[stage], full.at[stage],
                collective_axes="cluster" if stream.shared else None,
            )  # fmt: skip
        return done + 1

    return lax.fori_loop(0, tile.steps, step, done)


def _steps(gemm: Gemm, stages: int, tile: Tile, done, buffers, full, free, body, carry):
    """Fold `body` over the steps of a tile, as they arrive, freeing each `delay` steps later."""

    def stage_of(k):
        return lax.rem(done + k, jnp.int32(stages))

    def release(k):
        # What was read through the generic proxy (scales) is fenced before TMA overwrites it.
        plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[stage_of(k)])

    def step(k, carry):
        plgpu.barrier_wait(full.at[stage_of(k)])
        carry = body([buffer.at[stage_of(k)] for buffer in buffers], carry)
        if gemm.delay:
            pl.when(k >= gemm.delay)(lambda: release(k - gemm.delay))
        else:
            release(k)
        return carry

    carry = lax.fori_loop(0, tile.steps, step, carry)
    if gemm.delay:
        plgpu.wgmma_wait(0)
        lax.fori_loop(lax.max(tile.steps - gemm.delay, 0), tile.steps,
                      lambda k, _: release(k), None)  # fmt: skip
    return carry


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


def swizzle(columns: int, dtype: DTypeLike) -> tuple:
    size = jnp.dtype(dtype).itemsize
    width = plgpu.find_swizzle(columns * size * 8)  # bytes
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)


def _transforms(stream: Stream, dtype: DTypeLike) -> tuple:
    return swizzle(stream.block[-1], dtype) if stream.swizzled else ()


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


def round_up(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros up to a multiple along `axis`; x itself where there is nothing to add."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


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


# --- what must hold ----------------------------------------------------------------------------


def require_shared_memory(gemm: Gemm, tuning: Tuning, dtype: DTypeLike, dtypes) -> None:
    """ValueError where the stages and the slots do not fit."""

    def size(shape, dtype):
        count = jnp.dtype(dtype).itemsize
        for n in shape:
            count *= n
        return count

    stage = sum(size(s.block, d) for s, d in zip(gemm.streams, dtypes, strict=True))
    need = tuning.stages * stage + size(tuning.store_shape(dtype), dtype)
    if need > SHARED_MEMORY - 1024:  # barriers, and alignment of the buffers
        raise ValueError(
            f"{gemm.name}: tuning.stages = {tuning.stages} of {stage:,} bytes and "
            f"{tuning.slots} slots need {need:,} bytes of shared memory, more than "
            f"{SHARED_MEMORY - 1024:,}"
        )
