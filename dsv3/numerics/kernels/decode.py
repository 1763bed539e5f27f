"""Absorbed attention over the latent cache on Hopper: flash decoding, the cache cut in splits.

    s_mj = scale (q~_m · c_j + q^R_m · k^R_j),  j <= position of m     z_m = sum_j softmax_j(s) c_j

All heads share the keys [c ; k^R] and the values c (`model.mla`), so the rows m of a sequence are
its queries times its heads. A place is 64 of them, which the cache is read once for. A sequence's
own length, in steps of 64 keys, is cut into `splits` places, as equal as can be; each yields the
mean over its keys and the log of their mass, from which the mean over all follows.

       latents C            R
    +--------+--------+   +---+      a step is 64 keys and their latents, which are the values
    |        |        |   |   |      warpgroup 0   scores of 64 x 64, their exponentials to shared
    |   0    |   1    |   | 0 |                    memory, where both take them from
    |        |        |   |   |      0 and 1       each sums its half of the latents
    +--------+--------+   +---+

So scores are computed once though the sum is too wide for one warpgroup's registers. Two barriers
go between them: `written` when weights are there, `read` when warpgroup 1 is done with them. The
latter is arrived at in advance, so that the first weights find it as the others do.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from dsv3.numerics.kernels import persistent
from dsv3.numerics.kernels.attention import (
    BF16,
    BY_ROW,
    F32,
    by_row,
    product,
    row_of,
    store,
    zeros,
)
from dsv3.numerics.kernels.persistent import WARPGROUPS, Persistent, Stream, round_up, swizzle

ROWS = KEYS = 64
STAGES, SMS = 2, 132
MIN_KEYS = 256  # of a split
NOTHING = -1e30  # the largest score of no key: finite, so that differences are


def absorbed_attention(
    q_BTNC: Array, q_BTNR: Array, c_LBSC: Array, k_LBSR: Array, layer: Array | int,
    position_BT: Array, scale: float, splits: int | None = None,
) -> Array:  # fmt: skip
    """z_BTNC, from the positions of `layer` up to each query's own; all in BF16.

    C a multiple of 128, R of 64, S of 8. Raises ValueError naming the dimension that does not fit.
    """
    require(q_BTNC, q_BTNR, c_LBSC, k_LBSR)
    B, T, N, C = q_BTNC.shape
    rows = T * N
    q_BMC, q_BMR = (round_up(q.reshape(B, rows, -1), 1, 8) for q in (q_BTNC, q_BTNR))
    at_BM = round_up(jnp.repeat(position_BT.astype(jnp.int32), N, axis=1), 1, 8)
    length_B = jnp.max(position_BT, axis=1).astype(jnp.int32) + 1
    tiles = -(-rows // ROWS)
    if splits is None:
        splits = max(1, min(SMS // (B * tiles), c_LBSC.shape[2] // MIN_KEYS))
    scalars = jnp.asarray(layer, jnp.int32)[None], length_B
    z_ZBMC, l_ZBM = _means(q_BMC, q_BMR, at_BM, c_LBSC, k_LBSR, scalars, scale, splits, tiles)
    if splits == 1:
        return z_ZBMC[0, :, :rows].reshape(B, T, N, C)
    weight_ZBM = jnp.exp2(l_ZBM - l_ZBM.max(axis=0, keepdims=True))
    z_BMC = jnp.sum(z_ZBMC * weight_ZBM[..., None], axis=0) / jnp.sum(weight_ZBM, 0)[..., None]
    return z_BMC[:, :rows].reshape(B, T, N, C).astype(BF16)


class Place(NamedTuple):
    layer: Array
    batch: Array
    split: Array
    row: Array  # the first of 64
    first: Any  # step
    steps: Any


def _means(q_BMC, q_BMR, at_BM, c_LBSC, k_LBSR, scalars, scale: float, splits: int, tiles: int):
    """z [splits, B, M, C] in BF16, the mean over each split's keys, and FP32 log2 of their mass."""
    (B, M, C), R = q_BMC.shape, q_BMR.shape[2]
    c = scale * math.log2(math.e)
    half = C // WARPGROUPS
    width = math.gcd(half, 128)  # of a sum that is begun anew each step

    def locate(index, _, layer, length_B):
        rest, tile = lax.div(index, jnp.int32(tiles)), lax.rem(index, jnp.int32(tiles))
        batch, split = lax.div(rest, jnp.int32(splits)), lax.rem(rest, jnp.int32(splits))
        steps = lax.div(length_B[batch] + (KEYS - 1), jnp.int32(KEYS))
        each = lax.div(steps + (splits - 1), jnp.int32(splits))
        first = split * each
        mine = jnp.clip(steps - first, 0, each)
        return Place(layer[0], batch, split, tile * ROWS, first, mine)

    def work(loop, place, warpgroup, refs, scratch):
        both = functools.partial(_work, c, half, width, loop, place, refs, scratch)
        lax.cond(warpgroup == 0, lambda: both(0), lambda: both(1))

    def window(at, k):
        return at.layer, at.batch, pl.ds(k * KEYS, KEYS)

    scratch = (
        plgpu.SMEM((WARPGROUPS, ROWS, half), BF16, transforms=swizzle(half, BF16)),
        plgpu.SMEM((ROWS, R), BF16, transforms=swizzle(R, BF16)),
        plgpu.SMEM((ROWS,), jnp.int32),
        plgpu.SMEM((ROWS, KEYS), BF16, transforms=swizzle(KEYS, BF16)),
        plgpu.SMEM((2, ROWS), F32),
        plgpu.Barrier(num_arrivals=2 + WARPGROUPS), plgpu.Barrier(), plgpu.Barrier(),
    )  # fmt: skip
    count = B * splits * tiles
    streams = Stream((KEYS, C), window), Stream((KEYS, R), window)
    kernel = Persistent("mla_decode", streams, locate, work, count, STAGES, sms=count,
                        approximate=True)  # fmt: skip
    out = (
        jax.ShapeDtypeStruct((splits, B, M, C), BF16),
        jax.ShapeDtypeStruct((splits, B, M), F32),
    )
    others = q_BMC, q_BMR, at_BM
    return persistent.run(kernel, out, (c_LBSC, k_LBSR), others, scalars, scratch)


def _work(c, half, width, loop, place: Place, refs, scratch, warpgroup: int) -> None:
    """The share of warpgroup 0 or 1."""
    q, q_rope, at, z, l = refs
    mine, mine_rope, mine_at, p, lines, arrived, written, read = scratch
    factor, out_l = lines.at[0], lines.at[1]
    here = place.batch, pl.ds(place.row, ROWS)

    def summed(parts, latents):
        by = plgpu.load(factor, layout=BY_ROW)
        return tuple(
            part * by_row(by, part.shape)
            + product(p, latents.at[:, pl.ds(warpgroup * half + i * width, width)])
            for i, part in enumerate(parts)
        )

    def scoring(k, blocks, carry):
        latents, rope = blocks
        parts, largest, mass = carry

        zero = lax.optimization_barrier(jnp.int32(0))  # lest addresses be kept in registers

        def scores(accumulator):
            for i in range(WARPGROUPS):
                part = latents.at[:, pl.ds(i * half, half)]
                plgpu.wgmma(accumulator, mine.at[zero + i], part.transpose((1, 0)))
            plgpu.wgmma(accumulator, mine_rope, rope.transpose((1, 0)))
            return accumulator[...]

        s = pl.run_scoped(scores, plgpu.ACC((ROWS, KEYS), F32))
        key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA) + k * KEYS
        s = jnp.where(key <= by_row(limits, s.shape), s, -jnp.inf)
        now = jnp.maximum(largest, jnp.max(s, axis=1) * c)
        x, kept = jnp.exp2(s * c - by_row(now, s.shape)), jnp.exp2(largest - now)
        mass = mass * kept + x.sum(axis=1)
        plgpu.barrier_wait(read)
        p[...], factor[...] = x.astype(BF16), kept
        plgpu.commit_smem()
        plgpu.barrier_arrive(written)
        return summed(parts, latents), now, mass

    def summing(k, blocks, parts):
        plgpu.barrier_wait(written)
        parts = summed(parts, blocks[0])
        plgpu.barrier_arrive(read)
        return parts

    parts = tuple(zeros((ROWS, width)) for _ in range(half // width))
    if warpgroup == 0:
        copies = [(q_rope.at[here], mine_rope), (at.at[here], mine_at)]
        for i in range(WARPGROUPS):
            copies.append((q.at[*here, pl.ds(i * half, half)], mine.at[i]))
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, arrived)
        plgpu.barrier_wait(arrived)
        limits = plgpu.load(mine_at, layout=BY_ROW)
        parts, largest, mass = loop(scoring, (parts, row_of(NOTHING), row_of(0.0)))
        plgpu.barrier_wait(read)
        factor[...] = 1 / jnp.where(mass > 0, mass, 1.0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(written)
        store(out_l, largest + jnp.log2(mass), l.at[place.split, *here])
    else:
        plgpu.barrier_arrive(read)
        parts = loop(summing, parts)
        plgpu.barrier_wait(written)
    by = plgpu.load(factor, layout=BY_ROW)
    # No score is computed any more: the queries' place takes the result.
    for i, part in enumerate(parts):
        mine[warpgroup, :, pl.ds(i * width, width)] = (part * by_row(by, part.shape)).astype(BF16)
    plgpu.commit_smem()
    columns = pl.ds(warpgroup * half, half)
    plgpu.copy_smem_to_gmem(mine.at[warpgroup], z.at[place.split, *here, columns])


def require(q_BTNC: Array, q_BTNR: Array, c_LBSC: Array, k_LBSR: Array) -> None:
    """ValueError naming the dimension that does not fit."""
    named = {"q_BTNC": q_BTNC, "q_BTNR": q_BTNR, "c_LBSC": c_LBSC, "k_LBSR": k_LBSR}
    for name, x in named.items():
        if x.dtype != BF16:
            raise ValueError(f"{name} is {x.dtype}, not bfloat16")
        multiple = 128 if name[-1] == "C" else 64
        if x.shape[-1] % multiple:
            raise ValueError(f"{name} is {x.shape[-1]} wide, no multiple of {multiple}")
    for name, x, by in (("c_LBSC", c_LBSC, q_BTNC), ("k_LBSR", k_LBSR, q_BTNR)):
        if x.shape[-1] != by.shape[-1] or x.shape[1] != by.shape[0] or x.shape[2] % 8:
            raise ValueError(f"{name} is {x.shape}: queries {by.shape} want B = {by.shape[0]}, "
                             f"S a multiple of 8, and {by.shape[-1]} at the end")  # fmt: skip
