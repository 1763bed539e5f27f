"""What the parts of `gpu` share: the lines of its report, the clock, random arrays."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

REPEATS = 7
SETS = 4  # of operands, taken in turn so that L2 does not keep them


class Report:
    """Lines as they come, and all of them at the end."""

    def __init__(self, seconds: float):
        self.until, self.rows, self.wrong = time.monotonic() + seconds, [], 0

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    def check(self, what: str, figure: float, fine: bool) -> None:
        self.wrong += not fine
        self.add(what, figure=figure, verdict="right" if fine else "WRONG")

    def close(self, what: str, got: Array, wanted: Array, limit: float) -> None:
        figure = error(got, wanted)
        self.check(what, figure, figure <= limit)

    def add(self, what: str, **figures: Any) -> None:
        self.rows.append({"what": what, **figures})
        shown = (
            f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()
        )
        print(f"{what:52s} {'  '.join(shown)}", flush=True)

    def timed(self, what: str, call: Callable, sets: list, unit: str, work: float) -> float | None:
        """Seconds of one call, shown with `work` of it a second; a failure is a line, not the end,
        and has None."""
        if self.late:
            self.add(what, left_out="out of time")
            return None
        try:
            seconds = seconds_of(call, sets)
        except Exception as failure:  # the next kernel may run all the same
            self.add(what, failed=f"{type(failure).__name__}: {str(failure)[:160]}")
            return None
        self.add(what, us=seconds * 1e6, **{unit: work / seconds})
        return seconds

    def best(self, what: str, seconds: dict[str, float | None]) -> None:
        """Which candidate took least, and how much more each of the others."""
        ran = {name: s for name, s in seconds.items() if s is not None}
        if ran:
            first = min(ran, key=lambda name: ran[name])
            times = {name: s / ran[first] for name, s in ran.items() if name != first}
            self.add(f"{what}: the fastest is {first}", **times)


def seconds_of(call: Callable, sets: list) -> float:
    """Median seconds of one call; a program has one for each set, so that none waits for us."""
    program = jax.jit(lambda sets: [call(*arguments) for arguments in sets])
    jax.block_until_ready(program(sets))
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([program(sets) for _ in range(3)])
        samples.append((time.perf_counter() - start) / 3 / len(sets))
    return statistics.median(samples)


def random(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def error(got: Array, wanted: Array) -> float:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
