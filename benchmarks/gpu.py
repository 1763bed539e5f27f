"""The kernels on a Hopper GPU: right first, then timed against what they must beat; 8 minutes.

    python -m benchmarks.gpu --out gpu.json                     on an H100 or H200
    python -m benchmarks.gpu --interpret                        smoke test, tiny, on any CPU

Correct, each a line with its figure and a verdict; a wrong one ends the run with exit code 1:

    accumulator   one block of K = 128, unit scales: every bit as `numerics.accumulate` predicts
    promoted      larger K: within 1e-6 of that model with promotion every 128; against the exact
                  product, which no Hopper tensor core reaches, the error is shown
    quantisers    values against `fp8.quantize`, of SwiGLU too; ties may fall either way, one in a
                  thousand
    experts       grouped products against one expert at a time
    attention     with its gradients, and decoding over a cache: within BF16's roundings

Timed, microseconds and TFLOP/s, operands rotated through copies so that L2 does not keep them:
attention and decoding (`gpu_attention`); experts' products, against XLA's batched BF16; products of
the 671B model against XLA's BF16 and per-tensor FP8 (cuBLAS), tunings; quantisers in GB/s; a linear
map with its gradients, quantisation included, FP8 against BF16; and, where flax can be imported,
the training step of configs/v3_1b.py in BF16 and FP8, with its share of the BF16 peak. Where torch
can be imported in the same environment: `torch._scaled_mm` with 1x128 by 128x128 scales,
`torch._grouped_mm`, and the compiled step of transformers' model of the same shape. Whatever does
not fit into `--seconds` is left out by name. On a CPU nothing is timed.
"""

import contextlib
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from benchmarks import gpu_torch
from benchmarks.gpu_attention import (
    check_attention,
    check_decoding,
    time_attention,
    time_decoding,
)
from benchmarks.gpu_report import SETS, Report, error, random
from dsv3 import counts
from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.config import Bf16Dot, Config, Fp8Dot
from dsv3.errors import UserError, exits_cleanly
from dsv3.numerics import fp8
from dsv3.numerics.accumulate import hopper_product
from dsv3.numerics.dot import build
from dsv3.numerics.kernels import bf16_gemm, fp8_gemm, quantize
from dsv3.numerics.kernels.gemm import Tuning
from dsv3.numerics.kernels.persistent import round_up
from dsv3.numerics.operand import Swiglu, value
from dsv3.sweeps import load_config

WIDTHS = ((2112, 7168), (24576, 1536), (4096, 7168), (7168, 2048), (7168, 16384))  # N, K
ROWS = (64, 128, 4096, 8192)
PEAK = 989e12  # BF16 operations a second of an H100 or H200 in SXM form, dense
GROUPED = ((4, 8192), (8, 4096), (32, 1024))  # experts, rows of each
TUNINGS = {
    "rows shared": Tuning(multicast="rows"),
    "columns shared": Tuning(multicast="columns"),
    "4 stages": Tuning(stages=4),
    "snake 16": Tuning(snake=16),
}
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))


# --- right -------------------------------------------------------------------------------------


def check_accumulator(report: Report, K: int) -> None:
    ones, square = jnp.ones((1, 128)), jnp.ones((1, 1, 1, 4))
    draws = {"normal": random(0, 128, 128) * 60, "uniform": jnp.abs(random(1, 128, 128)) * 60}
    for name, x in draws.items():
        a = jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn)
        b = a[::-1]
        y = fp8_gemm.nt(a, ones, b[None], square, dtype=jnp.float32)
        if jax.default_backend() == "cpu":  # the interpreter's products are exact
            equal = error(y, a.astype(jnp.float32) @ b.astype(jnp.float32).T) < 1e-6
        else:
            equal = float(jnp.mean(y == hopper_product(a, b, 128)))
        report.check(f"accumulator, {name}: share of equal bits", float(equal), equal == 1)
    x, w = quantize.tiles(random(0, 128, K), False), quantize.squares(random(1, 1, 128, K), False)
    y = fp8_gemm.nt(*x, *w, dtype=jnp.float32)
    exact, modelled = jnp.zeros((128, 128)), jnp.zeros((128, 128))
    for k in range(K // 128):
        cut = slice(k * 128, (k + 1) * 128)
        a, b = x.values_MK[:, cut], w.values_ENK[0, :, cut]
        scale = x.scales_kM[k][:, None] * w.scales_Ekn4[0, k, 0, 0]
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32).T, precision="highest")
        exact += product * scale
        modelled += hopper_product(a, b, 128) * scale
    wanted = exact if jax.default_backend() == "cpu" else modelled
    report.check(f"promoted, K = {K}", error(y, wanted), error(y, wanted) <= 1e-6)
    report.add(f"promoted, K = {K}, against the exact product", figure=error(y, exact))


def check_quantisers(report: Report, M: int, K: int) -> None:
    x = random(2, M, K)
    gated = Swiglu(x, random(3, M, K), random(4, M, 1, dtype=jnp.float32))
    kept = gated.each(lambda x: fp8.quantize(x, fp8.TILE))
    read = kept.each(lambda q: fp8.dequantize(q, x.dtype))
    for name, mine, theirs in (
        ("1x128", quantize.tiles(x, False).values_MK, fp8.quantize(x, fp8.TILE).values),
        ("128x1", quantize.tiles(x, True).values_MK, fp8.quantize(x, fp8.COLUMN).values.T),
        ("128x128", quantize.squares(x[None], True).values_ENK[0],
         fp8.quantize(x, fp8.BLOCK).values.T),
        ("SwiGLU", quantize.swiglu_tiles(gated, x.dtype).values_MK,
         fp8.quantize(value(gated), fp8.TILE).values),
        ("SwiGLU of a cache", quantize.swiglu_tiles(kept.each(_tiles), x.dtype).values_MK,
         fp8.quantize(value(read), fp8.TILE).values),
    ):  # fmt: skip
        mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
        differ = float(jnp.mean(mine[: len(theirs), : theirs.shape[1]] != theirs))
        report.check(f"quantiser {name}: share that differs", differ, differ < 1e-3)


def _tiles(q: fp8.Quantized) -> quantize.Tiles:
    return quantize.Tiles(q.values, round_up(q.scales.T, 1, 4))


def check_experts(report: Report, K: int, N: int) -> None:
    """An expert without rows and an unused block, FP8 and BF16, forward and backward."""
    expert_Z, x, dy = jnp.array([0, 2, 3], jnp.int32), random(3, 384, K), random(4, 384, N)
    w = random(5, 3, K, N)
    rows = {0: slice(0, 128), 2: slice(128, 256)}
    x8, w8 = quantize.tiles(x, False), quantize.squares(w, True)
    y8 = fp8_gemm.nt(*x8, *w8, expert_Z, jnp.float32)
    g8 = fp8_gemm.wgrad(*quantize.tiles(x, True), *quantize.tiles(dy, True), expert_Z, 3)
    y, g = (bf16_gemm.times_experts(x, w, expert_Z), bf16_gemm.expert_gradients(x, dy, expert_Z, 3))
    x, dy, w = (a.astype(jnp.float32) for a in (x, dy, w))
    x_read, w_read = _read(x8), jax.vmap(_read_square)(w8).swapaxes(1, 2)[:, :K, :N]
    for e, cut in rows.items():
        wanted, gradient = jnp.matmul(x[cut], w[e], precision="highest"), x[cut].T @ dy[cut]
        exact = jnp.matmul(x_read[cut, :K], w_read[e], precision="highest")
        report.check(f"experts, FP8, {e}, of what was quantised", error(y8[cut], exact),
                     error(y8[cut], exact) < 2e-3)  # fmt: skip
        for name, got, right, limit in (
            ("FP8", y8[cut], wanted, 0.05), ("FP8 wgrad", g8[e], gradient, 0.05),
            ("BF16", y[cut], wanted, 0.01), ("BF16 wgrad", g[e], gradient, 0.01),
        ):  # fmt: skip
            report.check(f"experts, {name}, {e}", error(got, right), error(got, right) < limit)
    empty = bool(jnp.any(g8[1]) | jnp.any(g[1]) | jnp.any(y8[256:]) | jnp.any(y[256:]))
    report.check("experts: what is unused is zero", float(empty), not empty)


def _read(x: quantize.Tiles) -> Array:
    spread = jnp.repeat(x.scales_kM.T[: len(x.values_MK)], 128, 1)[:, : x.values_MK.shape[1]]
    return x.values_MK.astype(jnp.float32) * spread


def _read_square(w: quantize.Squares) -> Array:
    (N, K), scales_nk = w.values_ENK.shape, w.scales_Ekn4[..., 0].T
    return w.values_ENK.astype(jnp.float32) * jnp.repeat(
        jnp.repeat(scales_nk, 128, 0)[:N], 128, 1)[:, :K]  # fmt: skip


# --- timed -------------------------------------------------------------------------------------


def time_products(report: Report, torch: bool) -> None:
    for N, K in WIDTHS:
        weights = [random(s, N, K) for s in range(SETS)]
        squares = [quantize.squares(w[None], False) for w in weights]
        for M in ROWS:
            xs = [random(s, M, K) for s in range(SETS)]
            tiles = [quantize.tiles(x, False) for x in xs]
            name, work = f"{M}x{N}x{K}", 2e-12 * M * N * K
            ours = [(*t, *s) for t, s in zip(tiles, squares, strict=True)]
            plain = [(t.values_MK, s.values_ENK[0]) for t, s in zip(tiles, squares, strict=True)]
            report.timed(f"{name} kernel", fp8_gemm.nt, ours, "TFLOPs", work)
            report.timed(f"{name} XLA BF16", _xla(None), list(zip(xs, weights, strict=True)),
                         "TFLOPs", work)  # fmt: skip
            report.timed(f"{name} cuBLASLt FP8, one scale", _xla("ANY_F8_ANY_F8_F32"), plain,
                         "TFLOPs", work)  # fmt: skip
            if torch:
                report.add(f"{name} torch._scaled_mm", **gpu_torch.scaled_product(M, N, K))
            if M == 4096:
                for tuning_name, tuning in TUNINGS.items():
                    report.timed(f"{name} kernel, {tuning_name}", lambda *a, t=tuning: fp8_gemm.nt(
                        *a, tuning=t), ours, "TFLOPs", work)  # fmt: skip


def _xla(algorithm: str | None) -> Callable:
    preset = algorithm and getattr(lax.DotAlgorithmPreset, algorithm)
    return lambda a, b: lax.dot_general(
        a, b, ROWS_BY_ROWS, precision=preset, preferred_element_type=jnp.bfloat16
    )


def time_experts(report: Report, torch: bool) -> None:
    for E, each in GROUPED:
        P, (N, K) = E * each, (4096, 7168)
        expert_Z = jnp.repeat(jnp.arange(E, dtype=jnp.int32), each // 128)
        x, dy, w = random(0, P, K), random(1, P, N), random(2, E, K, N)
        work, name = 2e-12 * P * N * K, f"{E} experts of {each}x{N}x{K}"
        forward = [(*quantize.tiles(x, False), *quantize.squares(w, True), expert_Z)]
        backward = [(*quantize.tiles(x, True), *quantize.tiles(dy, True), expert_Z)]
        for kind, call, arguments in (
            ("FP8", fp8_gemm.nt, forward),
            ("FP8 wgrad", functools.partial(fp8_gemm.wgrad, experts=E), backward),
            ("BF16", bf16_gemm.times_experts, [(x, w, expert_Z)]),
            ("BF16 by XLA, batched", _batched, [(x.reshape(E, each, K), w)]),
            (
                "BF16 wgrad",
                functools.partial(bf16_gemm.expert_gradients, experts=E),
                [(x, dy, expert_Z)],
            ),
        ):
            report.timed(f"{name} {kind}", call, arguments, "TFLOPs", work)
        if torch:
            report.add(f"{name} torch._grouped_mm", **gpu_torch.grouped_product(E, each, N, K))


def _batched(x: Array, w: Array) -> Array:
    return jnp.einsum("erk,ekn->ern", x, w, preferred_element_type=jnp.bfloat16)


def time_quantisers(report: Report) -> None:
    xs = [(random(s, 8192, 7168),) for s in range(SETS)]
    for name, call, moved in (
        ("1x128", lambda x: quantize.tiles(x, False), 3),
        ("128x1 turned", lambda x: quantize.tiles(x, True), 3),
        ("both at once", quantize.both_ways, 4),
        ("128x128 turned", lambda x: quantize.squares(x[None], True), 3),
        ("1x128 by XLA", lambda x: fp8.quantize(x, fp8.TILE), 3),
        ("128x1 turned by XLA", lambda x: fp8.quantize(x, fp8.COLUMN).values.T, 3),
    ):  # bytes a number
        report.timed(f"quantiser {name}, 8192x7168", call, xs, "GBs", 1e-9 * moved * 8192 * 7168)
    pairs = [(xs[i][0], xs[i - 2][0]) for i in range(SETS)]
    caches = [tuple(quantize.tiles(x, False) for x in pair) for pair in pairs]
    for name, call, sets, moved in (
        ("SwiGLU", _swiglu, pairs, 5),
        ("SwiGLU by XLA, then 1x128", _swiglu_apart, pairs, 5),
        ("SwiGLU of a cache", _swiglu, caches, 3),
        ("SwiGLU of a cache by XLA, then 1x128", _swiglu_apart, caches, 3),
    ):  # bytes that have to be moved
        report.timed(f"{name}, 8192x7168", call, sets, "GBs", 1e-9 * moved * 8192 * 7168)


def _swiglu(gate, up):
    return quantize.swiglu_tiles(Swiglu(gate, up), jnp.bfloat16)


def _swiglu_apart(gate, up):
    if isinstance(up, quantize.Tiles):
        gate, up = (_read(x).astype(jnp.bfloat16) for x in (gate, up))
    return quantize.tiles(value(Swiglu(gate, up)), False)


def time_linear(report: Report) -> None:
    """Fprop, Dgrad and Wgrad with quantisation, weights from their FP32 masters."""
    for I, O in ((7168, 4096), (7168, 16384)):
        x, w, dy = random(0, 8192, I), random(1, I, O, dtype=jnp.float32), random(2, 8192, O)
        for name, config in (("BF16", Bf16Dot()), ("FP8", Fp8Dot(backend="mosaic"))):
            rule = build(config)

            def step(x, w, dy, rule=rule):
                y, vjp = jax.vjp(lambda x, w: rule.last_axis(x, w)[0], x, w)
                return y, vjp(dy)

            report.timed(f"linear 8192x{I}x{O} with gradients, {name}", step, [(x, w, dy)],
                         "TFLOPs", 6e-12 * 8192 * I * O)  # fmt: skip


def step_config(sequences: int, torch: bool) -> Config:
    """configs/v3_1b.py with so many sequences a step; without MTP beside transformers, which has
    none."""
    bindings: dict[str, Any] = {
        "training.micro_batch": None, "training.batch_increment": sequences,
        "training.batch": (("constant", 1, sequences),),
    }  # fmt: skip
    return apply(
        load_config("configs/v3_1b.py"), bindings | ({"model.mtp_depths": 0} if torch else {})
    )


def time_training(report: Report, config: Config) -> None:
    if importlib.util.find_spec("flax") is None:
        report.add("training step of configs/v3_1b.py", left_out="flax is not installed")
        return
    from benchmarks.step import measure
    from dsv3.parallel.mesh import on_this_platform

    tokens = config.training.batch_increment * config.training.sequence_length
    each = counts.training_flops(config.model, config.training.sequence_length)
    seconds: dict[str, float | None] = {}
    for dot in ("bf16", "fp8"):
        what = f"training step of configs/v3_1b.py, {dot}"
        if report.late:
            report.add(what, left_out="out of time")
            continue
        here = on_this_platform(apply(config, {"model.dot": dot}))
        try:
            measured, first = measure(here, 8, 2)
        except Exception as failure:
            report.add(what, failed=f"{type(failure).__name__}: {failure}"[:300])
            continue
        seconds[dot] = middle = statistics.median(measured)
        report.add(what, products=here.model.dot.backend, attention=here.model.mla.attention,
                   s=middle, compiled_s=first, tokens_per_s=tokens / middle,
                   of_bf16_peak=each * tokens / middle / PEAK)  # fmt: skip
    report.best("training step", seconds)


def time_all(report: Report, config: Config, torch: bool) -> None:
    time_attention(report)
    time_decoding(report)
    time_experts(report, torch)
    time_linear(report)
    time_quantisers(report)
    time_training(report, config)
    time_products(report, torch)


@exits_cleanly
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, nothing timed")
    parser.add_argument("--out", metavar="FILE", help="write every line there as JSON")
    parser.add_argument("--seconds", type=float, default=420, help="start nothing after these")
    parser.add_argument(
        "--sequences", type=int, default=8, help="of 4096 tokens in a training step"
    )
    options = parser.parse_args()
    report, tiny = Report(options.seconds), options.interpret
    torch = gpu_torch.available()
    config = step_config(options.sequences, torch)
    if torch and not tiny:
        baseline = gpu_torch.training_step(config, options.sequences)
        report.add("training step of transformers, compiled", **baseline)
    device = jax.devices()[0]
    if not tiny and getattr(device, "compute_capability", None) != "9.0":
        raise UserError(f"{device.device_kind} is no Hopper GPU; --interpret is for this machine")
    report.add("device", kind=device.device_kind, jax=jax.__version__)
    with plgpu.force_gpu_interpret_mode() if tiny else contextlib.nullcontext():
        check_accumulator(report, 256 if tiny else 7168)
        check_quantisers(report, *((136, 144) if tiny else (4100, 7168)))
        check_experts(report, *((72, 40) if tiny else (2048, 576)))
        cores = ("mosaic",) if tiny else ("mosaic", "cudnn")
        check_attention(report, *((72, 64, 64) if tiny else (1003, 192, 128)), cores)
        check_decoding(report, *((3, 72, 128) if tiny else (128, 1032, 512)))
    if not tiny and not report.wrong:
        time_all(report, config, torch)
    if options.out:
        Path(options.out).write_text(json.dumps(report.rows, indent=1) + "\n")
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
