"""The recorder: late reading, strict JSON, and one line a step however often a run is killed."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Reporting
from dsv3.errors import DataError
from dsv3.reporting.metrics import Recorder, read_loads, read_metrics

QUIET = Reporting(every=2, tensorboard=False)
LENGTH = 100  # tokens of a sequence


def metrics(step, **others):
    load = jnp.full((2, 4), step, jnp.int32)
    return {"step": step, "sequences": step, "loss": jnp.float32(1 / step), "load": load, **others}


def run(recorder, steps):
    for step in steps:
        recorder.record(metrics(step))
    recorder.flush()


def without_rates(rows):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


class Probe:
    """A scalar on a device, which notes when it is read."""

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, dtype=None, copy=None):
        self.read.append(self.value)
        return np.asarray(self.value, dtype)


def test_a_step_is_read_after_the_next_is_dispatched(tmp_path):
    recorder, read = Recorder(tmp_path, QUIET, LENGTH), []
    assert recorder.record({"step": 1, "loss": Probe(1.5, read)}) is None
    assert read == []
    assert recorder.record({"step": 2, "loss": Probe(2.5, read)}) == {"step": 1, "loss": 1.5}
    assert read == [1.5]
    assert recorder.flush() == {"step": 2, "loss": 2.5}
    assert recorder.flush() is None
    assert read == [1.5, 2.5]


def test_logged_are_the_first_step_every_kth_the_last_and_the_broken_ones(tmp_path):
    recorder = Recorder(tmp_path, QUIET, LENGTH)
    run(recorder, range(1, 6))
    recorder.record(metrics(7, grad_norm=np.float32("inf")))
    recorder.record(metrics(9))
    recorder.flush(last=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 4, 7, 9]
    steps, loads_nLE = read_loads(tmp_path)
    assert steps.tolist() == [1, 2, 4, 9]  # the load of a refused step says nothing
    assert loads_nLE.shape == (4, 2, 4)
    assert (loads_nLE[2] == 4).all()


def test_lines_are_strict_json_of_plain_numbers(tmp_path):
    recorder = Recorder(tmp_path, QUIET, LENGTH)
    odd = {"loss": jnp.float32("nan"), "grad_norm": float("-inf"), "lr": jnp.bfloat16(0.5)}
    recorder.record({"step": 1, **odd, "skipped": np.uint32(3), "loss_mtp": jnp.array([1, 2])})
    recorder.flush()

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row["loss"] is row["grad_norm"] is None
    assert row["non_finite"] == {"loss": "nan", "grad_norm": "-inf"}
    (row,) = read_metrics(tmp_path)
    expected = {"step": 1, "grad_norm": -np.inf, "lr": 0.5, "skipped": 3}
    expected |= {"loss_mtp/0": 1, "loss_mtp/1": 2}
    assert np.isnan(row.pop("loss"))
    assert row == expected


def test_floats_are_kept_exactly(tmp_path):
    value = np.float32(1) / 3
    recorder = Recorder(tmp_path, QUIET, LENGTH)
    recorder.record({"step": 1, "loss": jnp.asarray(value)})
    recorder.flush()
    assert np.float32(read_metrics(tmp_path)[0]["loss"]) == value


def test_the_rate_counts_from_the_last_logged_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    recorder = Recorder(tmp_path, QUIET, LENGTH, step=4, sequences=4)
    rates = []
    for step in range(5, 10):
        recorder.record(metrics(step))
        now[0] += 1.0 if step < 7 else 0.5
        row = recorder.flush()
        assert row is not None
        rates.append(row["tokens_per_second"])
    # Steps 5 and 6 from the start at 400 tokens, 7 and 8 from 6, 9 from 8.
    np.testing.assert_allclose(rates, [100, 100, 200, 200, 200])


# --- killed and resumed ------------------------------------------------------------------------


def test_a_run_cut_anywhere_and_resumed_has_every_line_once(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    recorder = Recorder(whole, QUIET, LENGTH)
    run(recorder, range(1, 5))
    safe = {name: (whole / name).stat().st_size for name in ("metrics.jsonl", "loads.jsonl")}
    run(recorder, range(5, 9))

    killed = tmp_path / "killed"
    killed.mkdir()
    for name, least in safe.items():
        content = (whole / name).read_bytes()
        for size in [*range(least - 1, len(content), 9), len(content)]:  # the first takes a newline
            for file in safe:
                (killed / file).write_bytes((whole / file).read_bytes())
            (killed / name).write_bytes(content[:size])
            run(Recorder(killed, QUIET, LENGTH, step=4, sequences=4), range(5, 9))
            assert without_rates(read_metrics(killed)) == without_rates(read_metrics(whole))
            assert (killed / "loads.jsonl").read_bytes() == (whole / "loads.jsonl").read_bytes()


def test_a_fresh_start_drops_the_lines_of_a_run_without_checkpoint(tmp_path):
    run(Recorder(tmp_path, QUIET, LENGTH), range(1, 5))
    Recorder(tmp_path, QUIET, LENGTH)
    assert read_metrics(tmp_path) == []
    assert read_loads(tmp_path)[1].shape == (0, 0, 0)


def test_refused_steps_beyond_the_checkpoint_are_dropped(tmp_path):
    """A refused step does not move `step`, so `skipped` tells what a checkpoint knew of."""
    recorder = Recorder(tmp_path, QUIET, LENGTH)
    for step, loss, skipped in [(2, 1.0, 0), (2, np.nan, 1), (2, np.nan, 2), (4, 1.0, 2)]:
        recorder.record({"step": step, "loss": loss, "skipped": skipped})
    recorder.flush()
    Recorder(tmp_path, QUIET, LENGTH, step=2, skipped=1)
    assert [row["skipped"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_damaged_line_is_named_and_a_missing_run_too(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl in .*: it is no run's workdir"):
        read_metrics(tmp_path)
    run(Recorder(tmp_path, QUIET, LENGTH), range(1, 5))
    file = tmp_path / "metrics.jsonl"
    first, *rest = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + b"\0\0\n" + b"".join(rest))
    for use in (lambda: read_metrics(tmp_path), lambda: Recorder(tmp_path, QUIET, LENGTH, step=4)):
        with pytest.raises(DataError, match=r"metrics\.jsonl:2 is no line of metrics"):
            use()


def test_a_full_disk_names_the_file(tmp_path):
    recorder = Recorder(tmp_path, QUIET, LENGTH)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder.record(metrics(1))
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        recorder.flush()


# --- TensorBoard -------------------------------------------------------------------------------


def events(path):
    from tensorboardX.proto.event_pb2 import Event  # pyrefly: ignore
    from tensorboardX.record_writer import masked_crc32c

    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, crc, data = (
            data[12 : 12 + length],
            data[12 + length : 16 + length],
            data[16 + length :],
        )
        assert crc == struct.pack("<I", masked_crc32c(event))
        found.append(Event.FromString(event))
    return found


def test_tensorboard_gets_the_scalars(tmp_path):
    run(Recorder(tmp_path, Reporting(every=2), LENGTH), range(1, 5))
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    first, session, *steps = events(file)
    assert first.file_version == "brain.Event:2"
    assert session.session_log.status == session.session_log.START
    assert [event.step for event in steps] == [1, 2, 4]
    values = {v.tag: v.simple_value for v in steps[-1].summary.value}
    assert values["loss"] == 0.25
    assert set(values) == {"loss", "tokens", "tokens_per_second"}


def test_a_resumed_run_marks_the_first_step_that_earlier_files_no_longer_count_for(tmp_path):
    for step in (0, 40):
        Recorder(tmp_path, Reporting(every=2), LENGTH, step=step)
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for file in files for event in events(file)] == [1, 1, 41, 41]
