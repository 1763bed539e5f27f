"""Where a run stands: a bar on a terminal, a line now and then anywhere else.

step   120/300 · loss 3.2143 · 12,345 tokens/s · 2m 10s left
"""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dsv3.parallel.processes import is_first


class TrainingProgress:
    """Shows the rows that a `Recorder` returns, on the way to step `total`.

    On a terminal a bar that follows every step; otherwise a line for step 1, every `every`-th
    step and the last. Of several processes the first shows them. To be used as a context manager.
    """

    def __init__(self, total: int, every: int, console: Console | None = None):
        self._total, self._every = total, every
        self._console = console or Console(highlight=False, quiet=not is_first())
        self._start: tuple[int, float] | None = None
        self._bar = None
        if self._console.is_interactive:
            columns = (BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("compiling the first step", total=total)

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show `step`, `loss` and `tokens_per_second` of `row`, and the time that is left."""
        step, now = row["step"], time.perf_counter()
        self._start = self._start or (step, now)
        text = f"step {step:>{len(str(self._total))}}/{self._total} · loss {row['loss']:.4f}"
        if row.get("skipped_in_a_row"):
            text += " · refused"
        if "tokens_per_second" in row:
            text += f" · {row['tokens_per_second']:,.0f} tokens/s"
        if step > self._start[0]:
            seconds = (now - self._start[1]) / (step - self._start[0])
            text += f" · {duration(seconds * max(self._total - step, 0))} left"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif step in (1, self._total) or step % self._every == 0:
            self.say(text)

    def say(self, message: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """'45s', '2m 10s' or '3h 05m'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"
