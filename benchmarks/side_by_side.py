"""Our training step beside transformers', in one run on the same cores.

    python -m benchmarks.side_by_side --torch-python PATH [--rounds 4] [--steps 8]

PATH is the interpreter of an environment that has torch and transformers (`step_transformers.py`
says which). Contenders take turns, each in a process of its own, held to the same `--cores`; every
second round runs in reverse order, so that a machine that slows down or is shared harms all alike.
Printed are each contender's median and fastest step of all rounds, the spread of the rounds'
medians, and the ratios of median and fastest to those of transformers in FP32, which on CPUs
without BF16 instructions is the fastest it gets; `--torch-bf16` lets its autocast run as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path

from benchmarks.step_transformers import BATCH, LENGTH, SHAPE
from dsv3.bindings import difference
from dsv3.checkpoint import hub_config
from dsv3.errors import ConfigError, exits_cleanly
from dsv3.sweeps import load_config
from dsv3.training.schedules import batch_size

ROOT = Path(__file__).parents[1]
CONFIG = "configs/bench_cpu.py"
OURS = [sys.executable, "-m", "benchmarks.step", CONFIG]
YARDSTICK = "transformers float32"


def require_same_shape() -> None:
    """Raise ConfigError where the two time different models or batches."""
    ours, theirs = load_config(ROOT / CONFIG), hub_config.config_of(SHAPE, "SHAPE")
    shape = {*hub_config.FIELDS, "model.mtp_depths", "model.mla.yarn", "model.mla.rope_theta"}
    if unequal := shape & difference(ours, theirs).keys():
        raise ConfigError(f"{CONFIG} and SHAPE differ in {', '.join(sorted(unequal))}")
    batch = (batch_size(ours.training, 0), ours.training.sequence_length)
    if batch != (BATCH, LENGTH):
        raise ConfigError(f"{CONFIG} has a batch of {batch}, transformers one of {(BATCH, LENGTH)}")


def contenders(torch_python: str, attention: str, torch_bf16: bool) -> dict[str, list[str]]:
    """Name to command."""
    torch = [torch_python, "benchmarks/step_transformers.py", "--attention", attention]
    found = {
        YARDSTICK: [*torch, "--precision", "float32"],
        "dsv3 float32": [*OURS, "--set", "training.compute_dtype=float32"],
        "dsv3 bfloat16": [*OURS, "--set", "training.compute_dtype=bfloat16"],
    }
    if torch_bf16:
        found["transformers autocast"] = [*torch, "--precision", "autocast"]
    return found


def seconds_of(command: list[str], cores: set[int]) -> list[float]:
    """Run a contender on `cores` and return the seconds of its steps."""
    run = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])["seconds"]


def table(rounds: dict[str, list[list[float]]]) -> str:
    median = {name: statistics.median(chain.from_iterable(of)) for name, of in rounds.items()}
    fastest = {name: min(chain.from_iterable(of)) for name, of in rounds.items()}
    lines = ["| contender | median step | ratio | fastest step | ratio | rounds' medians |"]
    lines.append("|---|---|---|---|---|---|")
    for name, of in rounds.items():
        each = sorted(statistics.median(seconds) for seconds in of)
        cells = [name, f"{median[name]:.3f} s", f"{median[name] / median[YARDSTICK]:.2f}"]
        cells += [f"{fastest[name]:.3f} s", f"{fastest[name] / fastest[YARDSTICK]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {each[0]:.3f} to {each[-1]:.3f} s |")
    return "\n".join(lines)


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", required=True, metavar="PATH")
    parser.add_argument("--torch-bf16", action="store_true", help="also time autocast")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cores", type=int, default=2)
    args = parser.parse_args()
    require_same_shape()
    cores = set(sorted(os.sched_getaffinity(0))[: args.cores])
    commands = contenders(args.torch_python, args.attention, args.torch_bf16)
    rounds: dict[str, list[list[float]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name in sorted(commands, key=list(commands).index, reverse=bool(number % 2)):
            command = [*commands[name], "--steps", str(args.steps)]
            if name.startswith("transformers"):
                command += ["--threads", str(args.cores)]
            rounds[name].append(seconds_of(command, cores))
            median = statistics.median(rounds[name][-1])
            print(f"round {number + 1}: {name} {median:.3f} s", file=sys.stderr, flush=True)
    print(table(rounds))


if __name__ == "__main__":
    main()
