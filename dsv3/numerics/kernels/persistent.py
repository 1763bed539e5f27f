"""What is around every kernel that multiplies: CTAs that copy ahead of what they compute.

A `Persistent` kernel has `count` places to work at, each with a number of steps, and for each step
a block of every stream: tiles of a product and blocks of its contraction; 128 queries and blocks of
the keys that they see. The machinery, in Pallas Mosaic GPU:

    each SM      one CTA of three warpgroups walks over places sm, sm + SMS, sm + 2·SMS, ...
    warpgroup 2  copies the streams of each step to shared memory by TMA, `stages` steps ahead,
                 and goes on to the next place without waiting for this one's end
    0 and 1      work, each on its half of the place, on the blocks as they arrive

With as many `sms` as places, each CTA has one, and the hardware hands them out as SMs become free.

Two barriers a stage: `full` when its streams have arrived, `free` when both halves have read it.
Everything starts free, so that the copying side always waits and no first round is special; at the
end one completion of each stage is left over, and is awaited, lest a CTA of a cluster exits while
its neighbour still signals to it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

WARPGROUPS = 2  # that multiply
WARPGROUP_ROWS = 64  # of one wgmma
COPY_REGISTERS = 40  # a thread of the copying warpgroup keeps; the others share what it gives up
SHARED_MEMORY = 227 * 1024  # bytes of a CTA
BARRIERS = 256  # bytes of it for barriers
ALIGNMENT = 1024  # bytes of a buffer


class Place(Protocol):
    """Where a CTA works: its steps are `first` to `first` + `steps`; traced integers."""

    @property
    def first(self) -> Any: ...

    @property
    def steps(self) -> Any: ...


@dataclass(frozen=True)
class Stream:
    """An operand's share of a step: `block` is its shape, `window(place, step)` where it lies."""

    block: tuple[int, ...]
    window: Callable[[Any, Any], tuple]
    swizzled: bool = True  # as wgmma wants it; scales are plain
    shared: bool = False  # one multicast serves both CTAs of a cluster


Loop = Callable[[Callable[..., Any], Any], Any]  # loop(body(step, blocks, carry), carry)


@dataclass(frozen=True)
class Persistent:
    """What one kernel is.

    `work(loop, place, warpgroup, refs, scratch)` is a warpgroup's share of a place. It reads the
    blocks of a step until `delay` further steps have been begun. `refs` are the operands that are
    not streamed, then the results. `locate(index, cta of the cluster, *scalars)` sees the scalar
    operands' references.
    """

    name: str
    streams: tuple[Stream, ...]
    locate: Callable[..., Any]
    work: Callable[..., None]
    count: int  # places, or pairs of them where CTAs form clusters
    stages: int
    sms: int
    cluster: int = 1
    delay: int = 0
    approximate: bool = False  # exponentials and quotients by the fast instructions

    @property
    def width(self) -> int:
        """CTAs, or clusters, that share the places."""
        return max(1, min(self.sms // self.cluster, self.count))


def run(
    it: Persistent, results: Sequence[jax.ShapeDtypeStruct], streamed: Sequence[Array],
    others: Sequence[Array] = (), scalars: Sequence[Array] = (),
    scratch: Sequence[Any] = (),
) -> list[Array]:  # fmt: skip
    """The results, from an operand for each stream, others, and int32 vectors for `locate`."""
    ends = len(streamed), len(streamed) + len(scalars)
    _require_shared_memory(it, [x.dtype for x in streamed], scratch)

    def kernel(*refs):
        _kernel(it, refs[: ends[0]], refs[ends[0] : ends[1]], refs[ends[1] :], scratch)

    return plgpu.kernel(
        kernel,
        out_type=list(results),
        grid=(it.width,),
        grid_names=("sm",),
        cluster=(it.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=it.name,
        compiler_params=plgpu.CompilerParams(
            approx_math=it.approximate,
            reduction_scratch_bytes=0,  # rows are reduced in registers
        ),
    )(*streamed, *scalars, *others)


def _kernel(it: Persistent, inputs, scalars, refs, scratch: Sequence[Any]) -> None:
    free_type = plgpu.Barrier
    if it.cluster > 1:
        free_type = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))

    @functools.partial(
        pl.run_scoped,
        buffers=[
            plgpu.SMEM((it.stages, *stream.block), x.dtype, transforms=_transforms(stream, x.dtype))
            for stream, x in zip(it.streams, inputs, strict=True)
        ],
        scratch=tuple(scratch),
        full=plgpu.Barrier(num_arrivals=len(it.streams), num_barriers=it.stages),
        free=free_type(num_arrivals=WARPGROUPS, num_barriers=it.stages),
        collective_axes="warpgroup",
    )
    def scope(buffers, scratch, full, free):
        warpgroup, sm = lax.axis_index("warpgroup"), lax.axis_index("sm")
        mine = lax.div(it.count - sm + (it.width - 1), jnp.int32(it.width))

        def place(i):
            return it.locate(sm + i * it.width, lax.axis_index("cluster"), *scalars)

        def copy():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            def one(i, done):
                return _copy(it, place(i), done, inputs, buffers, full, free)

            lax.fori_loop(0, mine, one, jnp.int32(0))
            for stage in range(it.stages):
                plgpu.barrier_wait(free.at[stage])

        def compute():
            spare = (512 - COPY_REGISTERS) // WARPGROUPS // 8 * 8  # 64 Ki registers, 128 threads
            plgpu.set_max_registers(spare, action="increase")
            for stage in range(it.stages):
                plgpu.barrier_arrive(free.at[stage])

            def one(i, done):
                at = place(i)
                loop = functools.partial(_steps, it, at, done, buffers, full, free)
                it.work(loop, at, warpgroup, refs, scratch)
                return done + at.steps

            lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(warpgroup == WARPGROUPS, copy, compute)


def _copy(it: Persistent, place: Place, done, inputs, buffers, full, free):
    """Copy a place's steps, each into the stage that becomes free; steps copied so far."""

    def step(k, done):
        stage = lax.rem(done, jnp.int32(it.stages))
        plgpu.barrier_wait(free.at[stage])
        for stream, x, buffer in zip(it.streams, inputs, buffers, strict=True):
            plgpu.copy_gmem_to_smem(
                x.at[stream.window(place, place.first + k)], buffer.at[stage], full.at[stage],
                collective_axes="cluster" if stream.shared else None,
            )  # fmt: skip
        return done + 1

    return lax.fori_loop(0, place.steps, step, done)


def _steps(it: Persistent, place: Place, done, buffers, full, free, body, carry):
    """Fold `body` over the steps of a place, as they arrive, freeing each `delay` steps later."""

    def stage_of(k):
        return lax.rem(done + k, jnp.int32(it.stages))

    def release(k):
        # What was read through the generic proxy (scales) is fenced before TMA overwrites it.
        plgpu.commit_smem()
        plgpu.barrier_arrive(free.at[stage_of(k)])

    def step(k, carry):
        plgpu.barrier_wait(full.at[stage_of(k)])
        carry = body(place.first + k, [buffer.at[stage_of(k)] for buffer in buffers], carry)
        if it.delay:
            pl.when(k >= it.delay)(lambda: release(k - it.delay))
        else:
            release(k)
        return carry

    carry = lax.fori_loop(0, place.steps, step, carry)
    if it.delay:
        plgpu.wgmma_wait(0)
        lax.fori_loop(lax.max(place.steps - it.delay, 0), place.steps,
                      lambda k, _: release(k), None)  # fmt: skip
    return carry


# --- memory ------------------------------------------------------------------------------------


def swizzle(columns: int, dtype: DTypeLike) -> tuple:
    size = jnp.dtype(dtype).itemsize
    width = plgpu.find_swizzle(columns * size * 8)  # bytes
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)


def _transforms(stream: Stream, dtype: DTypeLike) -> tuple:
    return swizzle(stream.block[-1], dtype) if stream.swizzled else ()


def round_up(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros up to a multiple along `axis`; x itself where there is nothing to add."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _require_shared_memory(it: Persistent, dtypes, scratch: Sequence[Any]) -> None:
    """ValueError where the stages and the rest do not fit."""

    def size(shape, dtype):
        return -(-math.prod(shape) * jnp.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT

    stage = sum(size(s.block, d) for s, d in zip(it.streams, dtypes, strict=True))
    rest = sum(size(x.shape, x.dtype) for x in scratch if hasattr(x, "dtype"))
    need = it.stages * stage + rest
    if need > SHARED_MEMORY - BARRIERS:
        raise ValueError(
            f"{it.name}: tuning.stages = {it.stages} of {stage:,} bytes and {rest:,} more need "
            f"{need:,} bytes of shared memory, more than {SHARED_MEMORY - BARRIERS:,}"
        )
