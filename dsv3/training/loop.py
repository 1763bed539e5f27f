"""The loop around the step: host code that feeds it, watches it, saves it and can be stopped.

Nothing here changes numbers. The metrics of a step are looked at once the next one is on its way,
so the device never waits for the host; only before a checkpoint and at the end is everything
settled. What the loop needs from other rooms it is handed: a loader, a recorder, and what saves.
Several processes run it in step: what it decides follows from what is the same in all of them.

Three counts differ when the guard refuses steps: `state.step` counts optimizer steps and ends the
run, the loader counts what was read, and a refused batch is read but not trained on.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from dsv3.config import Config
from dsv3.errors import TrainingError
from dsv3.parallel.processes import Agreement
from dsv3.training.schedules import batch_size
from dsv3.training.state import TrainState
from dsv3.training.step import Metrics

Row = Mapping[str, Any]


class Recorder(Protocol):
    """Takes the metrics of a step just dispatched, gives back the step before's, read."""

    def record(self, metrics: Metrics) -> Row | None: ...
    def flush(self, last: bool = False) -> Row | None: ...


class Loader(Protocol):
    """The data position, and batches from it."""

    def next_batch(self, sequences: int) -> Any: ...
    def state(self) -> dict: ...


class StopRequest:
    """Made by the first SIGTERM or SIGINT; a second one acts as it would have without us.

    `heard` is the signal that this process got. Called between steps, by all processes, it gives
    the one that any of them got, `name` from then on.
    """

    def __init__(self):
        self.heard: str | None = None
        self.name: str | None = None
        self._agree = Agreement()

    def __call__(self) -> str | None:
        self.name = self._agree(self.heard)
        return self.name

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch the signals while inside; the handlers from before are put back."""
        caught = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in caught}

        def handle(number, frame):
            self.heard = signal.Signals(number).name
            for one in caught:
                signal.signal(one, before[one])

        for number in caught:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Run:
    """One process's run, from wherever `state` and `loader` stand."""

    config: Config
    step: Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]
    loader: Loader
    recorder: Recorder
    save: Callable[[TrainState], None]
    show: Callable[[Row], None]
    stop: StopRequest
    sequences_read: int = 0  # those of refused steps too; the batch ramp follows it

    def until(self, state: TrainState, last_step: int | None) -> TrainState:
        """Train to optimizer step `last_step`, the end of `training.tokens`, or a stop request.

        Saves every `checkpoint.every` steps and at the end, whatever ends it, except for
        TrainingError: raised after `training.max_bad_steps` refused steps in a row, it leaves the
        last checkpoint as it is.
        """
        every = self.config.checkpoint.every
        step, sequences = _position(state)
        saved = step
        while not (self.stop() or self.ended(step, sequences, last_step)):
            batch = self.loader.next_batch(batch_size(self.config.training, self.sequences_read))
            self.sequences_read += len(batch.tokens)
            state, metrics = self.step(state, batch.tokens)
            self._see(self.recorder.record(metrics))
            step, sequences = step + 1, sequences + len(batch.tokens)  # unless it was refused:
            ended = self.ended(step, sequences, last_step)
            if step - saved >= every or ended:
                self._see(self.recorder.flush(last=ended))
                step, sequences = _position(state)
            if step - saved >= every:
                self.save(state)
                saved = step
        self._see(self.recorder.flush())
        if int(state.step) != saved:
            self.save(state)
        return state

    def ended(self, step: int, sequences: int, last_step: int | None) -> bool:
        """Whether `last_step` or the end of `training.tokens` is reached there."""
        training = self.config.training
        all_tokens = sequences * training.sequence_length >= training.tokens
        return all_tokens or (last_step is not None and step >= last_step)

    def _see(self, row: Row | None) -> None:
        if row is None:
            return
        self.show(row)
        limit = self.config.training.max_bad_steps
        if row["skipped_in_a_row"] >= limit:
            raise TrainingError(
                f"{limit} steps in a row after step {row['step']} had a non-finite loss or "
                f"gradient (training.max_bad_steps); a checkpoint from before them is intact"
            )


def _position(state: TrainState) -> tuple[int, int]:
    return int(state.step), int(state.sequences)
