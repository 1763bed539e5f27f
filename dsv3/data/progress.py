"""The progress of data preparation as a bar on the terminal."""

from collections.abc import Generator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dsv3.data import build


@contextmanager
def progress_bars() -> Generator[build.Progress]:
    """A `progress` for `prepare`: one bar for each stage, none where nothing is to be done."""
    bars = Progress(TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    tasks = {}

    def progress(what: str, done: int, total: int | None) -> None:
        bars.start()
        if what not in tasks:
            for task in bars.tasks:
                bars.update(task.id, total=task.completed)  # the stage before is over
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()
