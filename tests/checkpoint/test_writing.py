"""Saving on a disk that refuses, and being killed while saving."""

import errno
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.checkpoint import arrays as arrays_module
from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError
from tests.checkpoint.states import assert_same_bits, fails, small

ROOT = Path(__file__).parents[2]


class TestDisk:
    @pytest.mark.parametrize(
        "place",
        ["fsync_tree", "arrays.write", "arrays.merge", "_require_space", "fsync_directory"],
    )
    def test_a_full_disk_at_any_stage(self, harmed, monkeypatch, place):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if place == "arrays.write":
            full = ValueError("Failed to write 9 bytes: No space left [os_error_code='28']")
        store = Store(harmed, 3, pytest.fail)
        with monkeypatch.context() as patched:
            patched.setattr(f"dsv3.checkpoint.store.{place}", fails(full))
            with pytest.raises(CheckpointError, match=r"step-3 cannot be saved: No space left"):
                store.save(3, small(3), {})
        assert not [name for name in os.listdir(harmed) if name.startswith("tmp-")]
        store.save(4, small(4), {})
        assert Store(harmed, 3, pytest.fail).restore(small(0)).step == 4

    def test_what_a_failed_save_left_is_swept_by_the_next(self, harmed):
        store = Store(harmed, 3, pytest.fail)
        (harmed / "tmp-step-3-1a7e1a7e").mkdir()  # tensorstore may write on after orbax has raised
        store.save(4, small(4), {})
        assert sorted(os.listdir(harmed)) == ["step-1", "step-2", "step-4"]

    def test_too_little_space_is_noticed_before_writing(self, harmed, monkeypatch):
        usage = shutil.disk_usage(harmed)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="No space left on device for 5 MB"):
            Store(harmed, 3, pytest.fail).save(3, {"a": np.zeros(1_250_000, np.float32)}, {})
        assert sorted(os.listdir(harmed)) == ["step-1", "step-2"]

    def test_the_system_refusing_a_write_inside_orbax(self, harmed):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        state = {"a": np.random.default_rng(0).standard_normal(250_000)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(CheckpointError, match="step-3 cannot be saved: File too large"):
                Store(harmed, 3, pytest.fail).save(3, state, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert Store(harmed, 3, pytest.fail).restore(small(0)).step == 2

    def test_a_read_only_directory(self, harmed, monkeypatch):
        read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
        monkeypatch.setattr(Path, "mkdir", fails(read_only))
        with pytest.raises(CheckpointError, match="step-3 cannot be saved: Read-only file system"):
            Store(harmed, 3, pytest.fail).save(3, small(3), {})

    def test_an_error_that_is_ours_stays_one(self, harmed, monkeypatch):
        monkeypatch.setattr(arrays_module, "write", fails(ValueError("a bug")))
        with pytest.raises(ValueError, match="a bug"):
            Store(harmed, 3, pytest.fail).save(3, small(3), {})
        assert sorted(os.listdir(harmed)) == ["step-1", "step-2"]


class TestKill:
    def test_at_every_file_operation(self, two_steps, tmp_path, monkeypatch):
        """Copies of the directory as it was after each step of a save that retires another."""
        directory, copies = shutil.copytree(two_steps, tmp_path / "live"), []

        def then_copy(call):
            def wrapped(*args, **kwargs):
                result = call(*args, **kwargs)
                copies.append(shutil.copytree(directory, tmp_path / f"copy-{len(copies)}"))
                return result

            return wrapped

        store = Store(directory, 2, pytest.fail)
        for name in ("fsync", "rename", "unlink"):
            monkeypatch.setattr(os, name, then_copy(getattr(os, name)))
        for name in ("write", "merge"):
            monkeypatch.setattr(arrays_module, name, then_copy(getattr(arrays_module, name)))
        store.save(3, small(3), {"position": 3})
        monkeypatch.undo()
        assert len(copies) > 10 and store.steps() == [2, 3]
        found = []
        for copy in copies:
            store = Store(copy, 2, pytest.fail)
            assert sorted(os.listdir(copy)) == [f"step-{step}" for step in store.steps()]
            for step in store.steps():
                restored = store.restore(small(0), step)
                assert_same_bits(restored.state, jax.tree.map(jnp.asarray, small(step)))
            found.append(store.steps())
        assert found == sorted(found) and found[0] == [1, 2] and [1, 2, 3] in found

    def test_kill_9_while_saving(self, tmp_path):
        rng, program = random.Random(0), Path(__file__).with_name("saver.py")
        state = runpy.run_path(str(program))["state"]
        with subprocess.Popen(
            [sys.executable, "-W", "error", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as saver:
            for _ in range(3):
                print(tmp_path, file=saver.stdin, flush=True)
                child = int(saver.stdout.readline().split()[1])
                committed = [saver.stdout.readline() for _ in range(2)]
                time.sleep(rng.uniform(0, 0.2))
                os.kill(child, signal.SIGKILL)
                while (line := saver.stdout.readline()) != "dead\n":
                    committed.append(line)
                store = Store(tmp_path, 2, pytest.fail)
                assert max(store.steps()) - int(committed[-1]) in (0, 1)
                assert sorted(os.listdir(tmp_path)) == sorted(f"step-{s}" for s in store.steps())
                for step in store.steps():
                    restored = store.restore(state(0), step)
                    assert restored.extra == {"step": step}
                    assert_same_bits(restored.state, state(step))
            saver.stdin.close()

    def test_opening_leaves_a_live_writer_alone(self, harmed, monkeypatch):
        def write(path, leaves):
            Store(harmed, 3, pytest.fail)  # as eval.py does beside a training run
            assert path.exists()
            return {}

        monkeypatch.setattr(arrays_module, "write", write)
        Store(harmed, 3, pytest.fail).save(3, {}, {})
        (harmed / "tmp-step-4-deaddead").mkdir()
        assert Store(harmed, 3, pytest.fail).steps() == [1, 2, 3]
        assert not (harmed / "tmp-step-4-deaddead").exists()
