"""The part of `gpu` that is torch: block-scaled and grouped products, transformers' training step.

Everything here needs torch with CUDA in the same environment, and says so where it is not.
"""

import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import REPEATS
from dsv3.config import Config

STEP = Path(__file__).with_name("step_transformers.py")
PATIENCE = 150  # seconds that transformers has for its step, compilation included


def available() -> bool:
    """Whether torch can be imported; without it a line says so."""
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed: no baselines of torch's")
        return False
    return True


def training_step(config: Config, sequences: int) -> dict[str, Any]:
    """Seconds of a compiled step of transformers' model of that shape, in a process of its own: to
    be called before JAX takes the memory of the card."""
    if importlib.util.find_spec("transformers") is None:
        return {"left_out": "transformers is not installed"}
    from dsv3.checkpoint.hub_config import fields_of

    with tempfile.NamedTemporaryFile("w", suffix=".json") as shape:
        json.dump(fields_of(config, "float32", None), shape)
        shape.flush()
        command = [
            sys.executable, str(STEP), "--shape", shape.name, "--device", "cuda", "--compile",
            "--precision", "autocast", "--attention", "sdpa", "--batch", str(sequences),
            "--length", str(config.training.sequence_length), "--steps", "5",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return {"left_out": f"took more than {PATIENCE} seconds"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["without a word"])[-1][:200]}
    said = json.loads(done.stdout.splitlines()[-1])
    tokens = sequences * config.training.sequence_length
    return {"s": said["median_s"], "tokens_per_s": tokens / said["median_s"]}


def scaled_product(M: int, N: int, K: int) -> dict[str, Any]:
    """cuBLASLt's product of 1x128 by 128x128."""

    def make(torch):
        x, w = (torch.randn(n, K, device="cuda").to(torch.float8_e4m3fn) for n in (M, N))
        sx = torch.ones(K // 128, M, device="cuda").t()
        sw = torch.ones(-(-N // 128), K // 128, device="cuda").t()
        return lambda: torch._scaled_mm(x, w.t(), scale_a=sx, scale_b=sw, out_dtype=torch.bfloat16)

    return _timed(make, 2e-12 * M * N * K)


def grouped_product(E: int, each: int, N: int, K: int) -> dict[str, Any]:
    """torch's BF16 product of experts' rows."""

    def make(torch):
        x = torch.randn(E * each, K, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(E, K, N, device="cuda", dtype=torch.bfloat16)
        ends = torch.arange(each, E * each + 1, each, device="cuda", dtype=torch.int32)
        return lambda: torch._grouped_mm(x, w, offs=ends)

    return _timed(make, 2e-12 * E * each * N * K)


def _timed(make: Callable[[Any], Callable], work: float) -> dict[str, Any]:
    import torch

    try:
        call, seconds = make(torch), []
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / 20)
    except Exception as failure:
        return {"failed": f"{type(failure).__name__}: {str(failure)[:160]}"}
    finally:
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()
    middle = statistics.median(seconds)
    return {"us": middle * 1e6, "TFLOPs": work / middle}
