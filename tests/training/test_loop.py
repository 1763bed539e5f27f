"""The loop's host side: when it saves, stops, counts, and gives up."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from dsv3.config import Phase
from dsv3.data.loader import Batch
from dsv3.errors import TrainingError
from dsv3.training.loop import Run, StopRequest
from dsv3.training.schedules import batch_size, steps_to_end
from tests.training.small import CONFIG


@dataclasses.dataclass(frozen=True)
class Counted:
    """A state that only counts."""

    step: int = 0
    sequences: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Desk:
    """Loader, step, recorder and store of a run, all of them notes."""

    def __init__(self, config=CONFIG, refused=(), stop_at=None):
        self.config, self.refused, self.stop_at = config, set(refused), stop_at
        self.batches, self.saved, self.rows, self.waiting = [], [], [], None
        self.ends = []
        self.stop = StopRequest()

    def next_batch(self, sequences):
        self.batches.append(sequences)
        tokens = np.zeros((sequences, 17), np.int32)
        return Batch(tokens, tokens)

    def step(self, state, tokens):
        if len(self.batches) == self.stop_at:
            self.stop.heard = "SIGTERM"
        if len(self.batches) in self.refused:
            row = state.skipped_in_a_row + 1
            state = dataclasses.replace(state, skipped=state.skipped + 1, skipped_in_a_row=row)
        else:
            taken = {"step": state.step + 1, "sequences": state.sequences + len(tokens)}
            state = dataclasses.replace(state, **taken, skipped_in_a_row=0)
        return state, vars(state)

    def record(self, metrics):
        late, self.waiting = self.waiting, metrics
        return late

    def flush(self, last=False):
        late, self.waiting = self.waiting, None
        if last:
            self.ends.append(late["step"])
        return late

    def save(self, state):
        assert self.waiting is None, "a checkpoint while metrics are not yet written"
        self.saved.append(state.step)

    def until(self, last_step, state=Counted()):
        run = Run(self.config, self.step, self, self, self.save, self.rows.append, self.stop)
        return run.until(state, last_step)


def test_it_ends_at_the_step_asked_for_and_saves_there():
    desk = Desk()
    assert desk.until(6).step == 6
    assert desk.saved == [4, 6]  # checkpoint.every = 4
    assert [row["step"] for row in desk.rows] == [1, 2, 3, 4, 5, 6] and desk.ends == [6]


def test_it_ends_when_the_tokens_are_consumed():
    desk = Desk()
    assert desk.until(None).step == 20 == steps_to_end(CONFIG.training)


def test_steps_count_from_the_beginning_resumed_or_not():
    desk = Desk()
    assert desk.until(6, Counted(step=5, sequences=40)).step == 6
    assert desk.saved == [6] and len(desk.batches) == 1
    assert desk.until(6, Counted(step=6, sequences=48)).step == 6  # nothing to do
    assert len(desk.batches) == 1


def test_refused_steps_do_not_count_as_steps():
    desk = Desk(refused=[2, 6])
    assert desk.until(6).step == 6
    assert len(desk.batches) == 8
    assert desk.saved == [4, 6]


def test_too_many_refused_in_a_row_end_the_run_without_a_checkpoint():
    limit = CONFIG.training.max_bad_steps
    desk = Desk(refused=range(6, 100))
    with pytest.raises(TrainingError, match=f"{limit} steps in a row after step 5"):
        desk.until(None)
    assert desk.saved == [4]
    assert len(desk.batches) <= 5 + limit + 1


def test_as_many_refused_with_a_good_one_between_do_not():
    desk = Desk(refused=[*range(3, 12), *range(13, 22)])
    assert desk.until(6).step == 6


def test_a_stop_request_saves_and_ends():
    desk = Desk(stop_at=3)
    assert desk.until(6).step == 3
    assert desk.saved == [3] and not desk.ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_once_and_handlers_put_back(number):
    before = signal.getsignal(number)
    request = StopRequest()
    with request.listening():
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        assert request.heard == signal.Signals(number).name
        assert signal.getsignal(number) == before  # a second one acts as ever
    assert signal.getsignal(number) == before


def test_the_batch_ramp_follows_the_data_and_rounds_down():
    ramp = (Phase("linear", 0.5, 24.0), Phase("constant", 1.0, 24.0))
    training = dataclasses.replace(
        CONFIG.training, tokens=16 * 400, batch=(Phase("constant", 0.01, 8), *ramp)
    )
    config = dataclasses.replace(CONFIG, training=training)
    desk = Desk(config)
    state = desk.until(None)
    assert desk.batches[0] == 8 and desk.batches[-1] == 24
    assert set(desk.batches) == {8, 16, 24} and desk.batches == sorted(desk.batches)
    assert state.step == steps_to_end(training)
    assert [batch_size(training, n) for n in (0, 4, 103, 200, 399)] == [8, 8, 16, 24, 24]
