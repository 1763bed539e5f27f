"""The part of `gpu` that is attention: its kernels checked, and timed beside what else there is.

Attention at the widths of the report, 192 and 128, causal, forward alone and with its gradients:

    xla       the oracle that is the CPU's core attention
    cudnn     cuDNN's, with values of their own width
    padded    cuDNN's through jax's public function, values padded to the keys' width
    mosaic    the kernels of this repository

in TFLOP/s of the products that the triangle needs, recomputation not counted; then which is the
fastest. Decoding in GB/s of latents that have to be read, and as a share of what a plain copy moves
on the same card: one query with 128 heads and with 16, two queries, rows of equal and of unequal
lengths; the oracle beside the kernel where flax can be imported.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.gpu_report import SETS, Report, random
from dsv3.inference.cache import LatentCache
from dsv3.numerics.attention import CORES
from dsv3.numerics.kernels.decode import absorbed_attention

SCALE = 192**-0.5
SHAPES = ((2, 4096, 16), (1, 4096, 128), (1, 16384, 16))  # B, T, N
DECODED = (
    (64, 1, 128, 4096),
    (64, 1, 16, 4096),
    (64, 2, 16, 4096),
    (4, 1, 128, 32768),
)  # B, T, N, S
C, R = 512, 64
COPIED = 2**30  # numbers in BF16
BF16_ROUNDING = 2**-7  # of p and ds on their way to the tensor cores, and of the results


def check_attention(report: Report, T: int, W: int, U: int, cores: tuple[str, ...]) -> None:
    shape = (1, T, 2)
    q, k, v, do = (random(s, *shape, w) for s, w in enumerate((W, W, U, U)))
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    wanted = _with_gradients(CORES["xla"])(*exact, do.astype(jnp.float32))
    for core in cores:
        try:
            got = _with_gradients(CORES[core])(q, k, v, do)
        except Exception as failure:
            report.add(f"attention, {core}", failed=f"{type(failure).__name__}: {failure}"[:200])
            continue
        for name, mine, right in zip(("o", "dq", "dk", "dv"), got, wanted, strict=True):
            report.close(f"attention, {core}, {name}, T = {T}", mine, right, BF16_ROUNDING)


def check_decoding(report: Report, N: int, S: int, latent: int) -> None:
    q, q_rope = random(0, 2, 2, N, latent), random(1, 2, 2, N, R)
    parts = random(2, 2, 2, S, latent), random(3, 2, 2, S, R)
    position_BT = jnp.array([[0, 1], [S - 2, S - 1]], jnp.int32)
    wanted = _decoded(q, q_rope, parts[0][1], parts[1][1], position_BT)
    for splits in (1, 3):
        got = absorbed_attention(q, q_rope, *parts, 1, position_BT, SCALE, splits)
        report.close(f"decoding, {splits} splits, {N} heads", got, wanted, BF16_ROUNDING)


def _decoded(q: Array, q_rope: Array, c: Array, k: Array, position_BT: Array) -> Array:
    """z_BTNC in FP32, all scores at once."""
    q, q_rope, c, k = (x.astype(jnp.float32) for x in (q, q_rope, c, k))
    s_BTNS = jnp.einsum("btnc,bsc->btns", q, c) + jnp.einsum("btnr,bsr->btns", q_rope, k)
    seen_BTS = jnp.arange(c.shape[1])[None, None] <= position_BT[:, :, None]
    s_BTNS = jnp.where(seen_BTS[:, :, None], s_BTNS * SCALE, -jnp.inf)
    return jnp.einsum("btns,bsc->btnc", jax.nn.softmax(s_BTNS), c)


def _overs() -> dict[str, Callable]:
    """What decodes over a cache: the kernel, and the oracle where its module can be imported."""

    def kernel(q, q_rope, cache, layer, position_BT, scale):
        c, k = cache.parts
        return absorbed_attention(q, q_rope, c, k, layer, position_BT, scale)

    if importlib.util.find_spec("flax") is None:
        return {"mosaic": kernel}
    from dsv3.inference.absorbed import OVER

    return {name: OVER[name] for name in ("mosaic", "xla")}


def _with_gradients(core: Callable) -> Callable:
    def both(q, k, v, do):
        o, vjp = jax.vjp(lambda *qkv: core(*qkv, SCALE), q, k, v)
        return o, *vjp(do)

    return jax.jit(both)


def _padded(q: Array, k: Array, v: Array, scale: float) -> Array:
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - v.shape[3])))
    o = jax.nn.dot_product_attention(
        q, k, wide, scale=scale, is_causal=True, implementation="cudnn"
    )
    return o[..., : v.shape[3]]


def time_attention(report: Report) -> None:
    candidates = {name: CORES[name] for name in ("mosaic", "cudnn", "xla")} | {"padded": _padded}
    W, U = 192, 128
    for B, T, N in SHAPES:
        sets = [
            tuple(random(4 * s + i, B, T, N, w) for i, w in enumerate((W, W, U, U)))
            for s in range(SETS)
        ]
        pairs = 2e-12 * B * N * T * (T + 1) / 2
        for what, work in (("forward", W + U), ("with gradients", (W + U) + (3 * W + 2 * U))):
            name, seconds = f"attention {B}x{T}x{N}, {what}", {}
            for candidate, core in candidates.items():
                if what == "forward":
                    call = functools.partial(_forward, core)
                else:
                    call = _with_gradients(core)
                seconds[candidate] = report.timed(
                    f"{name}, {candidate}", call, sets, "TFLOPs", pairs * work
                )
            report.best(name, seconds)


def _forward(core: Callable, q: Array, k: Array, v: Array, do: Array) -> Array:
    return core(q, k, v, SCALE)


def time_decoding(report: Report) -> None:
    x = random(0, COPIED)
    seconds = report.timed(
        f"copy of {COPIED:,} numbers", lambda x: x + 1, [(x,)], "GBs", 4e-9 * x.size
    )
    if seconds is None:
        return
    copied = 4e-9 * x.size / seconds
    del x
    for B, T, N, S in DECODED:
        parts = random(0, 1, B, S, C), random(1, 1, B, S, R)
        q, q_rope = random(2, B, T, N, C), random(3, B, T, N, R)
        lengths = jax.random.randint(jax.random.key(4), (B,), S // 4, S + 1)
        for kind, length_B in (("equal", jnp.full(B, S)), ("unequal", lengths)):
            position_BT = (length_B[:, None] - T + jnp.arange(T)[None]).astype(jnp.int32)
            work = 2e-9 * (C + R) * float(length_B.sum())
            name = f"decoding {B}x{T}x{N} over {S}, {kind}"
            seconds = {}
            for candidate, over in _overs().items():

                def call(q, q_rope, c, k, position_BT, over=over):
                    cache = LatentCache((c, k), "compute", jnp.dtype(jnp.bfloat16))
                    return over(q, q_rope, cache, 0, position_BT, SCALE)

                sets = [(q, q_rope, *parts, position_BT)]
                took = report.timed(f"{name}, {candidate}", call, sets, "GBs", work)
                seconds[candidate] = took
                if took is not None:
                    report.add(f"{name}, {candidate}: of a copy", share=work / took / copied)
            report.best(name, seconds)
