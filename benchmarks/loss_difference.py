"""Losses of runs that differ in precision only, compared as in Fig. 10 of the report.

    python train.py configs/tiny.py --workdir runs/precision --sweep precision \\
        --set training.tokens=6e5 --set reporting.every=1
    python -m benchmarks.loss_difference runs/precision/BF16_RUN runs/precision/FP8_RUN [...]

Takes pairs of workdirs. The main loss of each is smoothed by an exponential average with
coefficient 0.9; printed for each pair is (second - first) / first, at the end, as a mean and at
its worst over the second half, and at last how far the first runs of the pairs are apart: runs
that differ in their seed only, without which a difference says nothing.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv3.cli import Parser
from dsv3.errors import UserError, exits_cleanly

SMOOTHING = 0.9


def smoothed(workdir: str) -> np.ndarray:
    """The smoothed main loss of every logged step."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: no run has logged there")
    losses = [json.loads(line)["loss_main"] for line in path.read_text().splitlines()]
    if len(losses) < 2:
        raise UserError(f"{path} has {len(losses)} steps: nothing to compare")
    average = itertools.accumulate(losses, lambda a, x: SMOOTHING * a + (1 - SMOOTHING) * x)
    return np.array(list(average))


def difference(first: str, second: str) -> np.ndarray:
    """(second - first) / first over the second half of the steps that both have."""
    a, b = smoothed(first), smoothed(second)
    steps = min(len(a), len(b))
    return ((b[:steps] - a[:steps]) / a[:steps])[steps // 2 :]


def line(name: str, relative: np.ndarray) -> str:
    end, mean, worst = relative[-1], relative.mean(), np.abs(relative).max()
    return f"| {name} | {end:+.2%} | {mean:+.2%} | {worst:.2%} |"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("workdirs", nargs="+", metavar="FIRST SECOND")
    workdirs = parser.parse_args(arguments).workdirs
    if len(workdirs) % 2:
        raise UserError(f"{len(workdirs)} workdirs are no pairs")
    pairs = list(itertools.batched(workdirs, 2))
    print("| pair | at the end | mean | largest |\n|---|---|---|---|")
    for first, second in pairs:
        print(line(f"{Path(second).name} against {Path(first).name}", difference(first, second)))
    for (one, _), (other, _) in itertools.pairwise(pairs):
        print(line(f"seeds: {Path(other).name} against {Path(one).name}", difference(one, other)))


if __name__ == "__main__":
    main()
