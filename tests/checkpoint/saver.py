"""Saves without end, to be killed: for each directory named on stdin a fork of this process.

It prints `pid N`, then every step once it is committed, then `dead`. Forking spares the import.
The arrays of a step tell which step they are of. `benchmarks/checkpoint_faults.py` uses it too.
"""

import os
import sys

import numpy as np

from dsv3.checkpoint.store import Store


def state(step: int) -> dict[str, np.ndarray]:
    base = np.random.default_rng(0).integers(0, 1 << 30, (8, 64, 512), dtype=np.int32)
    return {f"w{i}": part + step for i, part in enumerate(base)}


def save_until_killed(directory: str) -> None:
    store = Store(directory, 2, print)
    for step in range(max(store.steps(), default=0) + 1, sys.maxsize):
        store.save(step, state(step), {"step": step})
        print(step, flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if not child:
            save_until_killed(line.strip())
        print("pid", child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
