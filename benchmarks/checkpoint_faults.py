"""What harms a checkpoint, how often it is noticed, and what noticing costs.

    python -m benchmarks.checkpoint_faults [--flips 200] [--others 60] [--kills 30] [--megabytes 60]

Each fault is done to a copy of a directory with two sound steps, in the newer one, in a file and at
a place drawn at random (half of the draws by file, half by byte, so that small files are met). It
is `detected` when the step is named and set aside, `recovered` when the older step then comes back
bit for bit, `silent` when the harmed step is restored. Orbax alone is given bit flips as well:
there `detected` means an exception, `silent` wrong arrays; the rest did no harm. The full disk is a
small tmpfs and needs root; in mid-write, the check of the free space beforehand is made to pass.
"""

import argparse
import logging
import os
import random
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import orbax.checkpoint as ocp

from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError

ROOT = Path(__file__).parents[1]
LEFT = "left a temporary directory, swept at the next opening"
SAVER = ROOT / "tests" / "checkpoint" / "saver.py"


def state(step: int, megabytes: float = 1, arrays: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    size = int(megabytes * 1e6 / 4 / arrays)
    return {f"w{i}": rng.standard_normal(size, dtype=np.float32) for i in range(arrays)}


def same(a: dict, b: dict) -> bool:
    return all(np.asarray(a[name]).tobytes() == b[name].tobytes() for name in b)


def some_file(step: Path, rng: random.Random) -> Path:
    files = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    by_byte = [path.stat().st_size for path in files] if rng.random() < 0.5 else None
    return rng.choices(files, by_byte)[0]


def flip(step: Path, rng: random.Random) -> None:
    path = some_file(step, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(step: Path, rng: random.Random) -> None:
    path = some_file(step, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(step: Path, rng: random.Random) -> None:
    some_file(step, rng).unlink()


def zero(step: Path, rng: random.Random) -> None:
    path = some_file(step, rng)
    path.write_bytes(bytes(path.stat().st_size))


def add(step: Path, rng: random.Random) -> None:
    (some_file(step, rng).parent / "surplus").write_bytes(rng.randbytes(8))


def swap(step: Path, rng: random.Random) -> None:
    """A file of the older step in the place of one of this, which differs from it."""
    path, older = some_file(step, rng), step.with_name("step-1")
    twin = older / path.relative_to(step)
    if not twin.exists():  # orbax names data files at random
        twin = some_file(older / path.parent.relative_to(step), rng)
    if twin.read_bytes() == path.read_bytes():
        return swap(step, rng)
    shutil.copy(twin, path)


def swap_step(step: Path, rng: random.Random) -> None:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("step-1"), step)


FAULTS = {
    "truncated file": truncate,
    "deleted file": delete,
    "zeroed file": zero,
    "surplus file": add,
    "file of another step": swap,
    "whole other step": swap_step,
}


def harm(sound: Path, fault: Callable[[Path, random.Random], None], n: int) -> Counter:
    rng, counts = random.Random(fault.__name__), Counter(n=n)
    for trial in range(n):
        directory = shutil.copytree(sound, sound.parent / f"{fault.__name__}-{trial}")
        fault(directory / "step-2", rng)
        warned: list[str] = []
        restored = Store(directory, 3, warned.append).restore(state(0))
        assert restored is not None
        counts["detected"] += "step-2 is damaged" in " ".join(warned)
        counts["silent"] += restored.step == 2
        counts["recovered"] += restored.step == 1 and same(restored.state, state(1))
        shutil.rmtree(directory)
    return counts


def flip_orbax_alone(sound: Path, n: int) -> Counter:
    rng, counts, wanted = random.Random("orbax"), Counter(n=n), state(2)
    for trial in range(n):
        arrays = shutil.copytree(sound / "step-2" / "arrays", sound.parent / f"orbax-{trial}")
        flip(arrays, rng)
        try:
            counts["silent"] += not same(restore_orbax(arrays), wanted)
        except Exception:
            counts["detected"] += 1
        shutil.rmtree(arrays)
    return counts


def kill(directory: Path, n: int) -> Counter:
    """SIGKILL at a random moment of continuous saving, the next run going on from what is left."""
    rng, counts, wanted = random.Random(0), Counter(n=n), runpy.run_path(str(SAVER))["state"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, SAVER], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as saver:
        assert saver.stdin and saver.stdout
        for _ in range(n):
            print(directory, file=saver.stdin, flush=True)
            child = int(saver.stdout.readline().split()[1])
            committed = [saver.stdout.readline()]
            time.sleep(rng.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
            while (line := saver.stdout.readline()) != "dead\n":
                committed.append(line)
            counts[LEFT] += any(directory.glob("tmp-*"))
            warned: list[str] = []
            restored = Store(directory, 2, warned.append).restore(wanted(0))
            assert restored is not None
            whole = same(restored.state, wanted(restored.step))
            counts["silent"] += not whole
            counts["recovered"] += whole and not warned and restored.step >= int(committed[-1])
        saver.stdin.close()
    return counts


def fill_disk(sound: Path, n: int) -> Counter:
    """Save 30 MB to a disk with 20 MB."""
    counts = Counter(n=n)
    disk = sound.parent / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk]).returncode:
        return Counter(n=0)
    try:
        for trial in range(n):
            directory = shutil.copytree(sound, disk / str(trial))
            store = Store(directory, 3, print)
            try:
                store.save(3, state(3, megabytes=30), {})
            except CheckpointError as error:
                counts["detected"] += "No space left" in str(error)
            time.sleep(0.5)  # tensorstore still ends the writes that it had begun
            counts[LEFT] += any(directory.glob("tmp-*"))
            restored = Store(directory, 3, print).restore(state(0))
            assert restored is not None
            left = sorted(os.listdir(directory)) == ["step-1", "step-2"]
            counts["recovered"] += left and same(restored.state, state(2))
            shutil.rmtree(directory)
    finally:
        subprocess.run(["umount", disk], check=True)
    return counts


def save_orbax(path: Path, arrays: dict) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(arrays))


def restore_orbax(path: Path) -> dict:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path)


def speed(directory: Path, megabytes: float, repeats: int = 9) -> None:
    arrays, store = state(1, megabytes, arrays=60), Store(directory / "store", 2, print)
    jobs: dict[str, Callable[[int], object]] = {
        "save, orbax alone": lambda i: save_orbax(directory / f"orbax-{i}", arrays),
        "save, store": lambda i: store.save(i, arrays, {}),
        "restore, orbax alone": lambda i: restore_orbax(directory / f"orbax-{i}"),
        "restore, store": lambda i: store.restore(arrays, i),
    }
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(repeats + 1):  # in turn, so that a busy machine slows all alike; the first warms
        for name, job in jobs.items():
            began, used = time.perf_counter(), time.process_time()
            job(i)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - used)
    print(f"\n{megabytes:.0f} MB in 60 arrays, median of {repeats}, {os.cpu_count()} cores\n")
    print("| | s | MB/s | CPU s |\n|---|---|---|---|")
    for name in jobs:
        seconds, used = statistics.median(wall[name][1:]), statistics.median(cpu[name][1:])
        print(f"| {name} | {seconds:.3f} | {megabytes / seconds:.0f} | {used:.3f} |")


def row(name: str, counts: Counter) -> None:
    cells = [counts[column] for column in ("n", "detected", "silent", "recovered", LEFT)]
    print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoint faults and their cost.")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--others", type=int, default=60)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--megabytes", type=float, default=60)
    args = parser.parse_args()
    sys.unraisablehook = lambda _: None  # what tensorstore had in flight when orbax raised,
    logging.disable()  # and what asyncio says of it
    with tempfile.TemporaryDirectory() as temporary:
        sound = Path(temporary) / "sound"
        for step in (1, 2):
            Store(sound, 3, print).save(step, state(step), {"step": step})
        print(f"| fault | n | detected | silent | recovered | {LEFT} |\n|---|---|---|---|---|---|")
        row("bit flip, orbax alone", flip_orbax_alone(sound, args.flips))
        row("bit flip", harm(sound, flip, args.flips))
        for name, fault in FAULTS.items():
            row(name, harm(sound, fault, args.others))
        row("kill -9", kill(Path(temporary) / "killed", args.kills))
        row("full disk", fill_disk(sound, 10))
        plenty = shutil.disk_usage(sound)
        with mock.patch("shutil.disk_usage", lambda _: plenty):
            row("full disk in mid-write", fill_disk(sound, 10))
        speed(Path(temporary), args.megabytes)


if __name__ == "__main__":
    main()
