"""Several real processes save and restore one checkpoint, over gloo on the CPU."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from dsv3.checkpoint import huggingface
from dsv3.checkpoint.store import Store
from tests.checkpoint.folders import GOLDEN
from tests.checkpoint.states import assert_same_bits
from tests.checkpoint.worker import restore_elsewhere, whole
from tests.processes import PATIENCE, free_port, outputs, running


def workers(processes, devices, directory, *scenarios):
    program = ["-m", "tests.checkpoint.worker", free_port(), processes]
    return running(
        *([*program, process, directory, *scenarios] for process in range(processes)),
        devices=devices,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("together")
    huggingface.import_checkpoint(GOLDEN / "fp8", directory / "imported")
    return directory / "checkpoints"


@pytest.fixture(scope="module")
def said(directory):
    """What two processes of two devices printed, line by line."""
    scenarios = "save_and_restore", "begin_from_an_import", "fail_in_one"
    with workers(2, 2, directory, *scenarios) as begun:
        found = outputs(begun)
    assert [lines[-1:] for lines in found] == [["done"], ["done"]], found
    return found


def test_two_processes_save_what_any_mesh_restores(said, directory):
    for lines in said:
        assert "other arrays CheckpointError" in lines
        # of 2 row blocks its own, of 4 column blocks its own two, and the replicated one once
        assert "chunks read 1 2 1" in lines
    restored = Store(directory, 5, pytest.fail).restore(whole(0), 1)
    assert_same_bits(restored.state, jax.tree.map(jnp.asarray, whole(1)))
    restore_elsewhere(directory)


def test_an_import_is_restored_by_all_or_none(said):
    for lines in said:
        [line] = [line for line in lines if line.startswith("import ")]
        assert line.startswith("import CheckpointError") and "hub is damaged: config.json" in line


def test_the_error_of_one_is_that_of_all(said, directory):
    for lines in said:
        step = directory / "step-4"
        assert f"CheckpointError {step} cannot be saved: No such file or directory" in lines
        assert "restored 1" in lines
    warnings = [line for line in said[0] if "set aside" in line]
    assert [("extra.json" in w, "ocdbt.process_1/d" in w) for w in warnings] == [(1, 0), (0, 1)]
    assert not [line for line in said[1] if "set aside" in line]
    assert sorted(os.listdir(directory)) == ["damaged-2-1", "damaged-3-1", "step-1"]


def test_a_process_killed_while_saving_leaves_no_step(said, directory):
    with workers(2, 2, directory, "die_in_one") as (_, second):
        assert second.wait(timeout=PATIENCE) == -signal.SIGKILL
        assert any(name.startswith("tmp-step-5") for name in os.listdir(directory))
    store = Store(directory, 5, pytest.fail)
    assert store.steps() == [1] and not list(directory.glob("tmp-*"))
    assert_same_bits(store.restore(whole(0)).state, jax.tree.map(jnp.asarray, whole(1)))
