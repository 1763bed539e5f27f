"""Import and export of a checkpoint of some GB: speed and peak memory against the goals.

    python -m benchmarks.interchange [--gb 4] [--folder /tmp]

Writes a synthetic checkpoint in the released layout (E4M3 blocks with scales, BF16 beside them; the
numbers are random) of about `--gb` into a folder that it removes again, and needs seven times that
on the disk. Each job is a process of its own; its peak is VmHWM, everything included. The files lie
in the page cache, as they were just written. A workdir holds FP32, four bytes for one, so an import
is bound by the disk: `disk` is how fast a plain file is written and fsynced, and what that is in
bytes of the hub's files. `convert` is an import without the writing.

The goals: reading at 500 MB/s, and a peak of at most 3 times the largest tensor and 1 GiB.
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv3.checkpoint import exporting, hub_config, importing
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.hub_config import Quantization
from dsv3.checkpoint.safetensors_file import METADATA, Entry, Writer, shards
from dsv3.checkpoint.weights import INDEX
from dsv3.cli import Parser
from dsv3.config import Config, Mla, Model, Moe
from dsv3.errors import exits_cleanly

GOAL_SPEED = 500.0  # MB/s of the files
SHARD_BYTES = 10**9
PLAIN_BYTES = 2 * 10**9  # written to find the disk's speed


def shape_of(gigabytes: float) -> Config:
    """A model of which the embedding is the largest tensor, as experts go up with the size."""
    mla = Mla(heads=16, query_latent=768, kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128)
    model = Model(vocab=49_152, width=4096, layers=3, dense_layers=1, dense_width=8192, mla=mla,
                  mtp_depths=0)  # fmt: skip
    fixed, expert = 1.1, 2 * 3 * 4096 * 2048 / 1e9
    experts = max(round((gigabytes - fixed) / expert / 4), 1) * 4
    moe = Moe(routed_experts=experts, groups=4, experts_per_token=2, expert_width=2048)
    return Config(model=Model(**(vars(model) | {"moe": moe})))


def make(folder: Path, config: Config) -> tuple[int, int]:
    """Write the checkpoint; its bytes, and those of the largest tensor."""
    quantization = Quantization(hub_config.DEEPSEEK_FP8)
    pieces = exporting.in_file_order(config.model)
    entries = exporting.plan(pieces, "BF16", quantization, exporting.projections(pieces))
    fields = hub_config.fields_of(config, "bfloat16", quantization)
    (folder / "config.json").write_text(json.dumps(fields))
    rng, places = np.random.default_rng(0), {}
    codes = rng.integers(0, 0x7F, 1 << 24, np.uint8) | (rng.integers(0, 2, 1 << 24, np.uint8) << 7)
    wide = rng.standard_normal(1 << 22, np.float32)
    pools = {"F8_E4M3": codes, "BF16": (wide.view(np.uint32) >> 16).astype(np.uint16),
             "F32": np.abs(wide) / 448}  # fmt: skip
    parts = list(shards(entries, SHARD_BYTES))
    for i, part in enumerate(parts, start=1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        places |= dict.fromkeys(part, file)
        with Writer(folder / file, part, METADATA) as writer:
            for entry in part.values():
                fill(writer, entry, pools[entry.dtype])
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    sizes = [entry.nbytes for entry in entries.values()]
    return sum(sizes), max(sizes)


def fill(writer: Writer, entry: Entry, pool: np.ndarray) -> None:
    left = entry.nbytes // pool.itemsize
    while left:
        writer.write(pool[:left])
        left -= min(left, pool.size)


# --- the jobs, each in a process of its own ----------------------------------------------------


def convert(folder: Path) -> None:
    """Read every tensor into place and forget it: an import without the writing."""
    found = Folder(folder)
    for name in found.shapes:
        deque(importing.Streamed(found, name, lambda size: None).pieces(), maxlen=0)


def job(name: str, folder: Path) -> None:
    """Run one job and print its seconds and peak in bytes."""
    hf, workdir = folder / "hf", folder / "workdir"
    began = time.perf_counter()
    match name:
        case "convert":
            convert(hf)
        case "import":
            importing.import_checkpoint(hf, workdir)
        case "export in FP8":
            exporting.export(exporting.of_workdir(workdir, print), folder / "fp8", fp8=True,
                             shard_bytes=SHARD_BYTES)  # fmt: skip
        case "export in BF16":
            exporting.export(exporting.of_workdir(workdir, print), folder / "bf16")
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak * 1024}))


JOBS = ("convert", "import", "export in FP8", "export in BF16")


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


def report(gigabytes: float, folder: Path) -> None:
    (folder / "hf").mkdir()
    size, largest = make(folder / "hf", shape_of(gigabytes))
    limit = 3 * largest + 2**30
    print(f"{size / 1e9:.2f} GB in the released layout, largest tensor {largest / 1e6:.0f} MB; "
          f"goals: {GOAL_SPEED:.0f} MB/s, {limit / 1e9:.2f} GB")  # fmt: skip
    print("| job | seconds | CPU s | MB/s of the hub's files | written GB | peak GB |")
    print("|---|---|---|---|---|---|")
    outputs = {"import": "workdir", "export in FP8": "fp8", "export in BF16": "bf16"}
    for name in JOBS:
        seconds, cpu, peak = measured(name, folder)
        out = folder / outputs.get(name, "nothing")
        written = tree_bytes(out)
        files = written if name.startswith("export") else size
        speed, fault = files / 1e6 / seconds, " > goal" if peak > limit else ""
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {speed:.0f} | {written / 1e9:.2f} | "
              f"{peak / 1e9:.2f}{fault} |", flush=True)  # fmt: skip
        if name == "import":
            speed = disk_speed(folder, min(written, PLAIN_BYTES))
            print(f"| disk, {speed:.0f} MB/s | | | {speed * size / written:.0f} | | |", flush=True)
        if name == "export in FP8":
            shards_of = sorted((folder / "hf").glob("*.safetensors"))
            same = all(filecmp.cmp(f, out / f.name, shallow=False) for f in shards_of)
            print(f"| the same bytes as imported: {same} | | | | | |", flush=True)
            shutil.rmtree(out)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--gb", type=float, default=4.0, help="of the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.job:
        job(options.job, options.folder)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="interchange-") as folder:
        report(options.gb, Path(folder))


if __name__ == "__main__":
    main()
