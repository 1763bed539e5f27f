"""Import and export of a checkpoint of some GB: speed and peak memory against the goals.

    python -m benchmarks.interchange [--gb 4] [--folder /tmp]

Writes a synthetic checkpoint in the released layout (E4M3 blocks with scales, BF16 beside them; the
numbers are random) of about `--gb`, then one that is BF16 throughout, into a folder that it removes
again, and needs five times that on the disk. Each job is a process of its own; its peak is VmHWM,
everything included. The files lie in the page cache, as they were just written. `load` is what
`huggingface.load` does, but that every parameter is forgotten once it is there; its peak is that of
the largest parameter, which stacks all experts. An import may be bound by the disk: `disk` is how
fast a plain file is written and fsynced.

The goals of an import: 500 MB/s, and a peak of at most 3 times the largest tensor and 1 GiB.
"""

import argparse
import filecmp
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dsv3.checkpoint import exporting, hub_config, importing
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.hub_config import Quantization
from dsv3.checkpoint.safetensors_file import METADATA, Entry, bytes_of, file_bytes
from dsv3.checkpoint.weights import INDEX
from dsv3.cli import Parser
from dsv3.config import Config, Mla, Model, Moe
from dsv3.errors import exits_cleanly

GOAL_SPEED = 500.0  # MB/s of the files
SHARD_BYTES = 10**9
PLAIN_BYTES = 2 * 10**9  # written to find the disk's speed


def shape_of(gigabytes: float, quantization: Quantization | None) -> Config:
    """A model of which the embedding is the largest tensor, as experts go up with the size."""
    mla = Mla(heads=16, query_latent=768, kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128)
    model = Model(vocab=49_152, width=4096, layers=3, dense_layers=1, dense_width=8192, mla=mla,
                  mtp_depths=0)  # fmt: skip
    width = 1 if quantization else 2  # bytes of what is in FP8 otherwise
    fixed, expert = 0.8 + 0.25 * width, width * 2 * 3 * 4096 * 2048 / 1e9
    experts = max(round((gigabytes - fixed) / expert / 4), 1) * 4
    moe = Moe(routed_experts=experts, groups=2, experts_per_token=2, expert_width=2048)
    return Config(model=Model(**(vars(model) | {"moe": moe})))


def make(folder: Path, config: Config, quantization: Quantization | None) -> tuple[int, int]:
    """Write the checkpoint; its bytes, and those of the largest tensor."""
    pieces = exporting.in_file_order(config.model)
    entries = exporting.plan(pieces, "BF16", quantization, exporting.projections(pieces))
    fields = hub_config.fields_of(config, "bfloat16", quantization)
    (folder / "config.json").write_text(json.dumps(fields))
    rng, places = np.random.default_rng(0), {}
    codes = rng.integers(0, 0x7F, 1 << 24, np.uint8) | (rng.integers(0, 2, 1 << 24, np.uint8) << 7)
    wide = rng.standard_normal(1 << 22, np.float32)
    pools = {"F8_E4M3": codes, "BF16": (wide.view(np.uint32) >> 16).astype(np.uint16),
             "F32": np.abs(wide) / 448}  # fmt: skip
    for name, part in exporting.in_files(entries, SHARD_BYTES).items():
        places |= dict.fromkeys(part, name)
        parts = (chunk for entry in part.values() for chunk in filling(entry, pools[entry.dtype]))
        with open(folder / name, "xb") as file:
            for chunk in file_bytes(part, METADATA, parts):
                file.write(bytes_of(chunk))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    sizes = [entry.nbytes for entry in entries.values()]
    return sum(sizes), max(sizes)


def filling(entry: Entry, pool: np.ndarray) -> Iterator[np.ndarray]:
    left = entry.nbytes // pool.itemsize
    while left:
        yield pool[:left]
        left -= min(left, pool.size)


# --- the jobs, each in a process of its own ----------------------------------------------------


def job(name: str, folder: Path) -> None:
    """Run one job and print its seconds and peak in bytes."""
    hf, workdir, out = folder / "hf", folder / "workdir", folder / name
    began = time.perf_counter()
    match name:
        case "load":
            deque(Folder(hf).parameters(), maxlen=0)
        case "import":
            importing.import_checkpoint(hf, workdir)
        case _:
            exporting.export(exporting.of_workdir(workdir, print), out, fp8=name == FP8,
                             shard_bytes=SHARD_BYTES)  # fmt: skip
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak * 1024}))


FP8, BF16 = "export in FP8", "export in BF16"
JOBS = ("load", "import", FP8, BF16)


def measured(name: str, folder: Path) -> tuple[float, float, int]:
    command = [sys.executable, "-m", "benchmarks.interchange", "--job", name, "--folder", folder]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    found = json.loads(said.splitlines()[-1])
    return found["seconds"], found["cpu"], found["peak"]


def disk_speed(folder: Path, size: int) -> float:
    """MB/s of writing and fsyncing `size` bytes."""
    block = np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8)
    began = time.perf_counter()
    with open(folder / "plain", "wb") as file:
        for _ in range(-(-size // block.nbytes)):
            file.write(block.data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    (folder / "plain").unlink()
    return size / 1e6 / seconds


def tree_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def report(gigabytes: float, quantization: Quantization | None, folder: Path) -> None:
    (folder / "hf").mkdir()
    size, largest = make(folder / "hf", shape_of(gigabytes, quantization), quantization)
    limit = 3 * largest + 2**30
    form = "FP8 blocks" if quantization else "BF16"
    print(f"{size / 1e9:.2f} GB in {form}, largest tensor {largest / 1e6:.0f} MB; "
          f"goals: {GOAL_SPEED:.0f} MB/s, {limit / 1e9:.2f} GB")  # fmt: skip
    print("| job | seconds | CPU s | MB/s | MB a CPU s | written GB | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for name in JOBS:
        seconds, cpu, peak = measured(name, folder)
        out = folder / ("workdir" if name == "import" else name)
        written = tree_bytes(out)
        files = (written if name.startswith("export") else size) / 1e6
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {files / seconds:.0f} | {files / cpu:.0f} | "
              f"{written / 1e9:.2f} | {peak / 1e9:.2f} |", flush=True)  # fmt: skip
        if name == "import":
            speed = disk_speed(folder, min(written, PLAIN_BYTES))
            print(f"| disk | | | {speed:.0f} | | | |", flush=True)
        elif name == (FP8 if quantization else BF16):
            shards_of = sorted((folder / "hf").glob("*.safetensors"))
            same = all(filecmp.cmp(f, out / f.name, shallow=False) for f in shards_of)
            print(f"| the same bytes as imported: {same} | | | | | | |", flush=True)
        if name.startswith("export"):
            shutil.rmtree(out)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="of each checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        job(options.job, options.folder)
        return
    for quantization in (Quantization(hub_config.DEEPSEEK_FP8), None):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="interchange-") as folder:
            report(options.gb, quantization, Path(folder))


if __name__ == "__main__":
    main()
