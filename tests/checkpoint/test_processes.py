"""Several real processes save and restore one checkpoint, over gloo on the CPU."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv3.checkpoint.store import Store
from tests.checkpoint.states import assert_same_bits
from tests.checkpoint.worker import whole

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(processes, devices, directory, *scenarios):
    program, port = [sys.executable, "-m", "tests.checkpoint.worker"], free_port()
    return [
        subprocess.Popen(
            [*program, port, *map(str, (processes, process, devices, directory)), *scenarios],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("together") / "checkpoints"


@pytest.fixture(scope="module")
def said(directory):
    """What two processes of two devices printed, line by line."""
    workers = start(2, 2, directory, "save_and_restore", "fail_in_one")
    outputs = [worker.communicate(timeout=60) for worker in workers]
    assert [out.splitlines()[-1:] for out, _ in outputs] == [["done"], ["done"]], outputs
    return [out.splitlines() for out, _ in outputs]


def test_two_processes_save_what_any_mesh_restores(said, directory):
    for lines in said:
        assert "other arrays CheckpointError" in lines
        # of 2 row blocks its own, of 4 column blocks its own two, and the replicated one once
        assert "chunks read 1 2 1" in lines
    restored = Store(directory, 5, pytest.fail).restore(whole(0), 1)
    assert_same_bits(restored.state, jax.tree.map(jnp.asarray, whole(1)))
    (worker,) = start(1, 8, directory, "restore_elsewhere")
    out, error = worker.communicate(timeout=100)
    assert out.splitlines()[-1:] == ["done"], error


def test_the_error_of_one_is_that_of_all(said, directory):
    for lines in said:
        step = directory / "step-4"
        assert f"CheckpointError {step} cannot be saved: No such file or directory" in lines
        assert "restored 1" in lines
    warnings = [line for line in said[0] if "is damaged" in line]
    assert [("extra.json" in w, "ocdbt.process_1/d" in w) for w in warnings] == [(1, 0), (0, 1)]
    assert not [line for line in said[1] if "is damaged" in line]
    assert sorted(os.listdir(directory)) == ["damaged-2-1", "damaged-3-1", "step-1"]


def test_a_process_killed_while_saving_leaves_no_step(said, directory):
    first, second = start(2, 2, directory, "die_in_one")
    assert second.wait(timeout=100) == -signal.SIGKILL
    assert any(name.startswith("tmp-step-5") for name in os.listdir(directory))
    first.kill()
    for worker in (first, second):
        worker.communicate()
    store = Store(directory, 5, pytest.fail)
    assert store.steps() == [1] and not list(directory.glob("tmp-*"))
    assert_same_bits(store.restore(whole(0)).state, jax.tree.map(jnp.asarray, whole(1)))
