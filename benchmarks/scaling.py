"""What the machinery of a mesh costs: virtual devices on this host's cores against one device.

    python -m benchmarks.scaling
    python -m benchmarks.scaling configs/tiny.py --devices 8 --rounds 7

One device and meshes of several virtual ones take turns on the same global batch with the same
cores, so what a mesh loses is what it does besides: gathering parameters, scattering gradients,
exchanging rows, waiting, small products. 'replica' has no exchange of rows, which separates the
two. Prints a table of median seconds of wall clock and of CPU time a step, then, for each, what a
step of it executed by kind of operation, from XLA's own profile: summed over the devices, with the
time that a collective waits for the others. Needs a quiet machine.
"""

import collections
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.config import Config, Parallel
from dsv3.errors import exits_cleanly
from dsv3.host import keep_freed_memory
from dsv3.parallel import mesh as meshes
from dsv3.sweeps import load_config
from dsv3.training import state as train_state
from dsv3.training.schedules import batch_size
from dsv3.training.step import make_step

KINDS = (  # of an operation, by its name in the compiled program
    ("gathers and scatters", r"all.gather|reduce.scatter"),
    ("exchanges", r"all.to.all"),
    ("sums over devices", r"all.reduce|psum"),
    ("products", r"dot|conv|gemm|ynn"),
    ("loops", r"while|call|conditional"),
    ("the rest", r""),
)


def layouts(devices: int) -> dict[str, Parallel]:
    half = devices // 2
    return {
        "1 device": Parallel(),
        f"replica {devices}": Parallel(replica=devices),
        f"local {devices}": Parallel(local=devices),
        f"node 2 · local {half}": Parallel(node=2, local=half),
    }


def stepper(config: Config, tokens_BS: np.ndarray) -> Callable[[], None]:
    """A call that takes one step and waits for it; compiled already."""
    mesh = meshes.build(config.parallel)
    step = make_step(config, mesh)
    state: Any = train_state.create(config, mesh)

    def take():
        nonlocal state
        state, _ = jax.block_until_ready(step(state, jax.numpy.asarray(tokens_BS)))

    take()
    return take


def in_turns(steps: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of wall clock and of CPU time of each, a step of each in every round."""
    seen: dict[str, list[Any]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, take in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            take()
            seen[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: (statistics.median(w for w, _ in both), statistics.median(c for _, c in both))
        for name, both in seen.items()
    }


def profile(take: Callable) -> dict[str, float]:
    """Seconds that one step spent in each kind of operation, summed over threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            take()
        [path] = Path(folder).rglob("*.xplane.pb")
        found = jax.profiler.ProfileData.from_file(str(path))
    spent: dict[str, float] = collections.defaultdict(float)
    for plane in found.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name[:1].islower():  # an operation of the program, not of its runtime
                    kind = next(kind for kind, names in KINDS if re.search(names, event.name))
                    spent[kind] += event.duration_ns / 1e9
    return spent


@exits_cleanly
def main() -> None:
    keep_freed_memory()
    parser = Parser(__doc__)
    parser.add_argument("config", nargs="?", default="configs/tiny.py")
    parser.add_bindings()
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    config = apply(load_config(args.config), args.set)
    shape = (batch_size(config.training, 0), config.training.sequence_length + 1)
    tokens_BS = np.random.default_rng(0).integers(config.model.vocab, size=shape, dtype=np.int32)
    steps = {
        name: stepper(replace(config, parallel=parallel), tokens_BS)
        for name, parallel in layouts(args.devices).items()
    }
    times = in_turns(steps, args.rounds)
    alone, _ = times["1 device"]
    print("| mesh | step, s | CPU, s | throughput lost |\n|---|---|---|---|")
    for name, (wall, cpu) in times.items():
        print(f"| {name} | {wall:.3f} | {cpu:.3f} | {1 - alone / wall:.0%} |")
    names = [kind for kind, _ in KINDS]
    print("\n| seconds, devices summed | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for name, take in steps.items():
        spent = profile(take)
        print(f"| {name} | " + " | ".join(f"{spent[kind]:.3f}" for kind in names) + " |")


if __name__ == "__main__":
    main()
