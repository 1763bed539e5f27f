"""Real processes over gloo on the CPU: they agree, share the data, and miss each other by name."""

import os
import signal
import socket
import subprocess

import pytest

from dsv3.checkpoint.store import Store
from dsv3.errors import UserError
from dsv3.parallel import launch
from dsv3.parallel.launch import Place, place_of
from dsv3.reporting.metrics import read_metrics
from tests.parallel.worker import train
from tests.processes import free_port, outputs, running


def workers(count, workdir, *scenarios, missing=(), seconds=120, devices=1):
    base = ["-m", "tests.parallel.worker", free_port(), count]
    present = [process for process in range(count) if process not in missing]
    commands = [[*base, process, seconds, workdir, *scenarios] for process in present]
    return running(*commands, devices=devices)


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of 20 steps of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, 20)
    return losses(workdir)


def test_four_processes_agree_share_and_stop_as_one(tmp_path, alone):
    with workers(4, tmp_path, "talk", "share", "stop") as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [0] * 4, said
    for me, lines in enumerate(said):
        assert "said ['0!', '1!', '2!', '3!']" in lines
        assert "met DataError no corpus" in lines
        assert ("met ValueError a bug" if me == 2 else "met UserError process 2: a bug") in lines
        rows = [2 * me, 2 * me + 1, 8 + me]
        assert f"read {rows} True" in lines
    (agreed,) = {line for lines in said for line in lines if line.startswith("agreed at")}
    assert int(agreed.split()[-1]) >= 5
    (ended,) = {line for lines in said for line in lines if line.startswith("ended")}
    step = int(ended.split()[2])
    assert ended.endswith("SIGTERM") and 6 <= step <= 8
    assert Store(tmp_path / "checkpoints", 3, pytest.fail).steps() == sorted({4, step})
    train(tmp_path, 20)  # goes on in one process, with the same data and losses
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)


def test_a_killed_process_ends_the_other_and_the_run_resumes(tmp_path, alone):
    with workers(2, tmp_path, "die", devices=2) as begun:
        first, second = outputs(begun)
    assert [process.returncode for process in begun] == [2, 2], (first, second)
    assert second[-1] == "error: process 1: ended by SIGKILL; " + launch.AGAIN
    assert first[-1].startswith("error: process 0") and first[-1].endswith(launch.AGAIN)
    assert Store(tmp_path / "checkpoints", 3, pytest.fail).steps() == [4, 8, 12]
    train(tmp_path, 20)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-6)


def test_a_death_is_announced_to_those_who_wait(tmp_path):
    with workers(3, tmp_path, "vanish") as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [2] * 3, said
    for process, reason in enumerate(["process 1 died", "ended by SIGKILL", "process 1 died"]):
        assert said[process][-1] == f"error: process {process}: {reason}; {launch.AGAIN}"


def test_a_process_that_never_joins_is_named(tmp_path):
    with workers(3, tmp_path, "talk", missing=[1], seconds=25) as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [2, 2], said
    for process, lines in zip((0, 2), said, strict=True):
        (line,) = lines
        assert line.startswith(f"error: process {process}: process 1 of 3 did not join")


def test_a_signal_ends_one_that_waits_and_a_second_one_that_would_save(tmp_path):
    with workers(3, tmp_path, "wait") as begun:
        assert [process.stdout.readline() for process in begun] == ["begun\n"] * 3
        begun[1].send_signal(signal.SIGINT)
        assert outputs(begun[1:2]) == [["interrupted"]] and begun[1].returncode == 130
        begun[2].send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            begun[2].wait(2)
        begun[2].send_signal(signal.SIGTERM)
        (first,), (last,) = outputs(begun[:1]), outputs(begun[2:])
    assert last == [f"error: process 2: ended by SIGKILL; {launch.AGAIN}"]
    assert first == [f"error: process 0: process 2 died; {launch.AGAIN}"]


def test_a_second_process_0_finds_the_port_taken(tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with running(["-m", "tests.parallel.worker", port, 2, 0, 60, tmp_path]) as begun:
            (said,) = outputs(begun)
    assert begun[0].returncode == 2
    reason = "Address already in use"
    assert said == [f"error: process 0 cannot listen at 127.0.0.1:{port}: {reason}"]


def test_all_count_the_same_processes(tmp_path):
    base = ["-m", "tests.parallel.worker", free_port()]
    with running(*([*base, 2 + me, me, 60, tmp_path, "wait"] for me in range(2))) as begun:
        assert outputs(begun[1:]) == [["error: --processes 3 is 2 in process 0"]]
    assert begun[1].returncode == 2


def said_by(child: str, capfd) -> tuple[str, bytes, str, float]:
    """What of the words of a shell that is `child` was heard, held, and passed on when it ended."""
    read, write = os.pipe()
    process = subprocess.Popen(["sh", "-c", child], stderr=write)
    os.close(write)
    said, held, status = launch._listen(read, process.pid)
    os.close(read)
    process.returncode = os.waitstatus_to_exitcode(status)
    return said, held, capfd.readouterr().err, process.returncode


def test_the_runtimes_complaints_are_held_back_and_never_lost(monkeypatch, capfd):
    monkeypatch.setattr(launch, "HOLD_SECONDS", 0.5)
    harmless, fatal = "E1124 13:22:09.081325 a.cc:1] odd", "F1124 13:22:09.081325 b.cc:2] dead"
    say = f"echo before >&2; echo '{harmless}' >&2; sleep"
    heard = f"before\n{harmless}\n"
    for seconds in (0, 1):  # to its end, or until it has lived on
        said, held, passed, code = said_by(f"{say} {seconds}; exit 3", capfd)
        assert said == passed + held.decode() == heard and code == 3
        assert (held == b"") == (seconds == 1)
    said, held, passed, code = said_by(f"{say} 0; echo '{fatal}' >&2; sleep 1; kill -6 $$", capfd)
    assert said == passed + held.decode() == f"{heard}{fatal}\n" and code == -signal.SIGABRT
    assert fatal.encode() in held


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("... stopped sending heartbeats):\n1\n3\nThe tasks", "processes 1, 3 died; give all"),
        ("ABORTED: 12 unexpectedly tried to connect with a", "process 12 died; give all"),
        ("Either the leader task was preempted/died", "process 0 died or cannot be reached"),
        ("RPC: /xla.coordination.CoordinationService/RegisterTask", "process 0 did not answer"),
    ],
)
def test_the_runtimes_last_words_are_understood(said, meaning):
    place = Place("host:1", 4, 2)
    assert launch._reason(said, place, 9).startswith(meaning)
    assert launch._reason("Segmentation fault", place, 9) is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("host:1", 2, None), "go together"),
        ((None, 2, 0), "go together"),
        (("host", 2, 0), "--coordinator host is not HOST:PORT"),
        (("host:0", 2, 1), "--coordinator host:0 .*, with a port of 1 to 65535"),
        (("host:65536", 2, 0), "--coordinator host:65536 is not"),
        (("host:1", 2, 2), "--process 2 must lie between 0 and 1"),
        (("host:1", 0, 0), "--process"),
    ],
)
def test_options_that_do_not_fit(options, complaint):
    with pytest.raises(UserError, match=complaint):
        place_of(*options)


@pytest.mark.parametrize("seconds", [0, -5, 10**6])
def test_others_are_waited_for_a_second_or_more_and_at_most_a_day(seconds):
    with pytest.raises(UserError, match=f"--join-seconds {seconds} must lie between 1 and 86400"):
        launch.run(Place("host:1", 2, 0), seconds, pytest.fail)


SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip


def test_a_launcher_is_recognised(monkeypatch):
    assert place_of(None, None, None) is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert place_of(None, None, None) == Place("node3:61517", 2, 1, [0])
    assert place_of("host:1", 3, 2) == Place("host:1", 3, 2)  # options go before
    assert place_of(None, 1, None) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert place_of(None, None, None) is None
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(UserError, match=r"the launcher was not understood: .*many"):
        place_of(None, None, None)
