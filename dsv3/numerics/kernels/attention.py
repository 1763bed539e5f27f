"""Causal attention on Hopper's tensor cores, forward and backward, without the square of scores.

    L_i = log2 sum_{j<=i} 2^(c q_i·k_j)    p_ij = 2^(c q_i·k_j - L_i)     c = scale · log2 e
    o_i = sum_j p_ij v_j                   ds_ij = p_ij (do_i·v_j - do_i·o_i)
    dv_j = sum_i p_ij do_i     dk_j = scale sum_i ds_ij q_i     dq_i = scale sum_j ds_ij k_j

Queries and keys are W wide and values U, not necessarily the same (192 and 128 in the report). Of
the forward pass o and L are kept. The backward pass computes p from L again, once by rows and once
by columns, so that every sum has one owner: two products more than with atomics, but the same bits
every time.

                 keys j ->         o, dq    a CTA owns 128 queries, 64 for each warpgroup, and walks
               0 +----------                along the keys that they see, 64 at a time
    queries i    |##                dk, dv  it owns 128 keys, and walks down the queries that see
        |        |####                      them
        v        |######
                 |########          p and ds go through shared memory to the tensor cores, in BF16

While one warpgroup computes exponentials, the other multiplies; the third copies ahead
(`persistent`). Each CTA has one place, long ones first, those of a head in a row, which then share
its keys in L2. TMA reads zeros beyond the last position, which add nothing to any sum, and does not
write there.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from dsv3.numerics.kernels import persistent
from dsv3.numerics.kernels.persistent import (
    WARPGROUP_ROWS,
    WARPGROUPS,
    Persistent,
    Stream,
    round_up,
    swizzle,
)

OWN = WARPGROUPS * WARPGROUP_ROWS  # positions of a place
STEP = 64  # positions of the other side; with 128 every kernel spills
BF16, F32 = jnp.bfloat16, jnp.float32
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class Tuning:
    """What changes the kernels' speed and not their results: steps that are in flight in each."""

    forward: int = 3
    queries: int = 3
    keys: int = 2

    def __post_init__(self):
        for name, stages in vars(self).items():
            if stages < 1:
                raise ValueError(f"tuning.{name} = {stages} must be positive")


def attention(
    q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, scale: float, name: str = "attention",
    tuning: Tuning = Tuning(),
) -> Array:  # fmt: skip
    """o_BTNU = softmax(scale q·k) v over j <= t in BF16, softmax in FP32; W, U multiples of 64.

    `name` is what rematerialisation policies know o and L by. Raises ValueError naming the
    dimension that does not fit.
    """
    require(q_BTNW, k_BTNW, v_BTNU)
    return _attention(scale, name, tuning, q_BTNW, k_BTNW, v_BTNU)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(scale, name, tuning, q_BTNW, k_BTNW, v_BTNU):
    return forward(q_BTNW, k_BTNW, v_BTNU, scale, tuning.forward)[0]


def _attention_forward(scale, name, tuning, q_BTNW, k_BTNW, v_BTNU):
    kept = forward(q_BTNW, k_BTNW, v_BTNU, scale, tuning.forward)
    o_BTNU, l_BNT = (checkpoint_name(x, name) for x in kept)
    return o_BTNU, (q_BTNW, k_BTNW, v_BTNU, o_BTNU, l_BNT)


def _attention_backward(scale, name, tuning, residuals, do_BTNU):
    q_BTNW, k_BTNW, v_BTNU, o_BTNU, l_BNT = residuals
    d_BNT = jnp.sum(o_BTNU.astype(F32) * do_BTNU.astype(F32), axis=-1).swapaxes(1, 2)
    rows = q_BTNW, k_BTNW, v_BTNU, do_BTNU, l_BNT, d_BNT
    dq_BTNW = gradient_of_queries(*rows, scale, tuning.queries)
    return dq_BTNW, *gradients_of_keys(*rows, scale, tuning.keys)


_attention.defvjp(_attention_forward, _attention_backward)


# --- the three kernels -------------------------------------------------------------------------


def forward(
    q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, scale: float, stages: int
) -> tuple[Array, Array]:
    """o_BTNU, and FP32 L_BNT."""
    (B, T, N, W), U = q_BTNW.shape, v_BTNU.shape[3]
    q, k, v = (round_up(x, 1, 8) for x in (q_BTNW, k_BTNW, v_BTNU))
    length, c = q.shape[1], scale * math.log2(math.e)

    def work(loop, place, warpgroup, refs, scratch):
        q, o, l = refs
        mine, p, out, out_l, arrived = (ref.at[warpgroup] for ref in scratch)
        first, here = _part(place, warpgroup)
        _fetch(arrived, (q.at[here], mine))

        def along(k, blocks, carry):
            keys, values = blocks
            total, largest, mass = carry
            s = product(mine, keys.transpose((1, 0)))
            s = _seen(s, first, k * STEP, -jnp.inf)
            now = jnp.maximum(largest, jnp.max(s, axis=1) * c)
            x, kept = jnp.exp2(s * c - by_row(now, s.shape)), jnp.exp2(largest - now)
            mass = mass * kept + x.sum(axis=1)
            p[...] = x.astype(BF16)
            plgpu.commit_smem()
            part = product(p, values)
            return total * by_row(kept, total.shape) + part, now, mass

        start = zeros((WARPGROUP_ROWS, U)), row_of(-jnp.inf), row_of(0.0)
        total, largest, mass = loop(along, start)
        store(out, total / by_row(mass, total.shape), o.at[here])
        store(out_l, largest + jnp.log2(mass), l.at[place.batch, place.head, here[1]])

    scratch = _smem(W), _smem(STEP), _smem(U), _smem(), _bar(1)
    streams = _stream(W), _stream(U)
    kernel = _kernel("attention", streams, work, q.shape, stages, descending=True)
    out = jax.ShapeDtypeStruct(v.shape, BF16), jax.ShapeDtypeStruct((B, N, length), F32)
    o, l = persistent.run(kernel, out, (k, v), (q,), scratch=scratch)
    return o[:, :T], l[:, :, :T]


def gradient_of_queries(
    q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, do_BTNU: Array, l_BNT: Array, d_BNT: Array,
    scale: float, stages: int,
) -> Array:  # fmt: skip
    """dq_BTNW, from the forward pass's L and d = do·o."""
    T, W, U = q_BTNW.shape[1], q_BTNW.shape[3], v_BTNU.shape[3]
    q, k, v, do = (round_up(x, 1, 8) for x in (q_BTNW, k_BTNW, v_BTNU, do_BTNU))
    l, d = (round_up(x, 2, 8) for x in (l_BNT, d_BNT))
    c = scale * math.log2(math.e)

    def work(loop, place, warpgroup, refs, scratch):
        q, do, l, d, dq = refs
        mine, mine_do, ds, mine_l, mine_d, arrived = (r.at[warpgroup] for r in scratch)
        first, here = _part(place, warpgroup)
        lines = place.batch, place.head, here[1]
        _fetch(arrived, (q.at[here], mine), (do.at[here], mine_do), (l.at[lines], mine_l),
               (d.at[lines], mine_d))  # fmt: skip
        square = WARPGROUP_ROWS, STEP
        l_i, d_i = (plgpu.load(x, layout=BY_ROW) for x in (mine_l, mine_d))

        def scope(total):
            def along(k, blocks, carry):
                keys, values = blocks
                s = product(mine, keys.transpose((1, 0)))
                p = _seen(jnp.exp2(s * c - by_row(l_i, square)), first, k * STEP, 0.0)
                dp = product(mine_do, values.transpose((1, 0)))
                ds[...] = (p * (dp - by_row(d_i, square))).astype(BF16)
                plgpu.commit_smem()
                plgpu.wgmma(total, ds, keys)
                plgpu.wgmma_wait(0)
                return carry

            loop(along, jnp.int32(0))
            return total[...]

        total = pl.run_scoped(scope, plgpu.ACC((WARPGROUP_ROWS, W), F32))
        store(mine, total * scale, dq.at[here])

    scratch = _smem(W), _smem(U), _smem(STEP), _smem(), _smem(), _bar(4)
    streams = _stream(W), _stream(U)
    kernel = _kernel("attention_dq", streams, work, q.shape, stages, descending=True)
    out = [jax.ShapeDtypeStruct(q.shape, BF16)]
    [dq] = persistent.run(kernel, out, (k, v), (q, do, l, d), scratch=scratch)
    return dq[:, :T]


def gradients_of_keys(
    q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, do_BTNU: Array, l_BNT: Array, d_BNT: Array,
    scale: float, stages: int,
) -> tuple[Array, Array]:  # fmt: skip
    """dk_BTNW and dv_BTNU."""
    T, W, U = q_BTNW.shape[1], q_BTNW.shape[3], v_BTNU.shape[3]
    q, k, v, do = (round_up(x, 1, 8) for x in (q_BTNW, k_BTNW, v_BTNU, do_BTNU))
    l, d = (round_up(x, 2, 8) for x in (l_BNT, d_BNT))
    c = scale * math.log2(math.e)

    def work(loop, place, warpgroup, refs, scratch):
        k, v, dk, dv = refs
        mine, mine_v, _, _, arrived = (ref.at[warpgroup] for ref in scratch)
        _, here = _part(place, warpgroup)
        _fetch(arrived, (k.at[here], mine), (v.at[here], mine_v))
        square = STEP, WARPGROUP_ROWS

        def scope(dk_total, dv_total):
            def down(i, blocks, carry):
                queries, do, l_i, d_i = blocks
                # Asked for anew: addresses and positions are else kept in registers, and spill.
                here = lax.optimization_barrier(warpgroup)
                mine, mine_v, p, ds = (ref.at[here] for ref in scratch[:4])
                first, _ = _part(place, here)
                s = product(queries, mine.transpose((1, 0))) * c
                x = jnp.exp2(s - by_row(plgpu.load(l_i, layout=BY_ROW), square))
                p[...] = _seen(x, i * STEP, first, 0.0).astype(BF16)
                plgpu.commit_smem()
                plgpu.wgmma(dv_total, p.transpose((1, 0)), do)
                dp = product(do, mine_v.transpose((1, 0)))
                dp = dp - by_row(plgpu.load(d_i, layout=BY_ROW), square)
                x = plgpu.load(p, layout=plgpu.Layout.WGMMA).astype(F32)
                ds[...] = (x * dp).astype(BF16)
                plgpu.commit_smem()
                plgpu.wgmma(dk_total, ds.transpose((1, 0)), queries)
                plgpu.wgmma_wait(0)
                return carry

            loop(down, jnp.int32(0))
            return dk_total[...], dv_total[...]

        totals = (plgpu.ACC((WARPGROUP_ROWS, width), F32) for width in (W, U))
        dk_total, dv_total = pl.run_scoped(scope, *totals)
        store(mine, dk_total * scale, dk.at[here])
        store(mine_v, dv_total, dv.at[here])

    scratch = _smem(W), _smem(U), _smem(STEP), _smem(STEP), _bar(2)
    line = Stream((STEP,), lambda at, i: (at.batch, at.head, pl.ds(i * STEP, STEP)), swizzled=False)
    streams = _stream(W), _stream(U), line, line
    kernel = _kernel("attention_dkv", streams, work, q.shape, stages, descending=False)
    out = [jax.ShapeDtypeStruct(x.shape, BF16) for x in (k, v)]
    dk, dv = persistent.run(kernel, out, (q, do, l, d), (k, v), scratch=scratch)
    return dk[:, :T], dv[:, :T]


# --- what they share ---------------------------------------------------------------------------


class Place(NamedTuple):
    batch: Array
    head: Array
    own: Array  # the first position of 128
    first: Any  # step
    steps: Any


def _kernel(
    name: str, streams: tuple[Stream, ...], work: Callable[..., None], shape, stages: int,
    descending: bool,
) -> Persistent:  # fmt: skip
    """Over B x N x tiles of 128; rows of the triangle from the last to the first, or columns."""
    B, length, N, _ = shape
    tiles = -(-length // OWN)

    def locate(index, _):
        head, tile = lax.div(index, jnp.int32(tiles)), lax.rem(index, jnp.int32(tiles))
        own = (tiles - 1 - tile if descending else tile) * OWN
        ends = lax.min(own + OWN, jnp.int32(length)) if descending else jnp.int32(length)
        first = jnp.int32(0) if descending else lax.div(own, jnp.int32(STEP))
        steps = lax.div(ends + (STEP - 1), jnp.int32(STEP)) - first
        return Place(lax.div(head, jnp.int32(N)), lax.rem(head, jnp.int32(N)), own, first, steps)

    count = B * N * tiles
    return Persistent(name, streams, locate, work, count, stages, sms=count, approximate=True)


def _part(place: Place, warpgroup) -> tuple[Array, tuple]:
    """Where a warpgroup's 64 positions begin, and the window on them."""
    first = place.own + warpgroup * WARPGROUP_ROWS
    return first, (place.batch, pl.ds(first, WARPGROUP_ROWS), place.head)


def _stream(width: int) -> Stream:
    return Stream((STEP, width), lambda at, k: (at.batch, pl.ds(k * STEP, STEP), at.head))


def _fetch(arrived, *copies) -> None:
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, arrived)
    plgpu.barrier_wait(arrived)


def store(through, x: Array, target) -> None:
    through[...] = x.astype(target.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, target)


def _seen(x: Array, first_query, first_key, other: float) -> Array:
    """x [queries, keys], or `other` where a key lies behind its query."""
    query, key = (
        plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=plgpu.Layout.WGMMA) + first
        for axis, first in enumerate((first_query, first_key))
    )
    return jnp.where(query >= key, x, other)


def product(a, b) -> Array:
    """a · b in an accumulator of its own."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), F32))


def zeros(shape: tuple[int, int]) -> Array:
    return plgpu.layout_cast(jnp.zeros(shape, F32), plgpu.Layout.WGMMA)


def row_of(value: float) -> Array:
    return plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), value, F32), BY_ROW)


def by_row(x: Array, shape: tuple[int, ...]) -> Array:
    return lax.broadcast_in_dim(x, shape, [0])


def _smem(columns: int | None = None):
    """Room of each warpgroup for 64 rows in BF16, or for 64 numbers in FP32."""
    if columns is None:
        return plgpu.SMEM((WARPGROUPS, WARPGROUP_ROWS), F32)
    shape = WARPGROUPS, WARPGROUP_ROWS, columns
    return plgpu.SMEM(shape, BF16, transforms=swizzle(columns, BF16))


def _bar(arrivals: int):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=WARPGROUPS)


def require(q_BTNW: Array, k_BTNW: Array, v_BTNU: Array) -> None:
    """ValueError naming the dimension that does not fit."""
    for name, x in (("q_BTNW", q_BTNW), ("k_BTNW", k_BTNW), ("v_BTNU", v_BTNU)):
        if x.dtype != BF16:
            raise ValueError(f"{name} is {x.dtype}, not bfloat16")
        if x.shape[:3] != q_BTNW.shape[:3]:
            raise ValueError(f"{name} is {x.shape}: q_BTNW wants {q_BTNW.shape[:3]} in front")
        if x.shape[3] % 64:
            raise ValueError(f"{name} is {x.shape[3]} wide, no multiple of 64")
    if k_BTNW.shape[3] != q_BTNW.shape[3]:
        raise ValueError(f"k_BTNW is {k_BTNW.shape[3]} wide, q_BTNW {q_BTNW.shape[3]}")
