"""The store: what was saved comes back bit for bit, or is refused by name."""

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
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3.checkpoint import store as store_module
from dsv3.checkpoint.manifest import fingerprint, name_leaves
from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def mixed(seed=0):
    """Every dtype a state holds, with the values that a lossy path would change."""
    rng = np.random.default_rng(seed)
    odd_bf16 = np.array([0x7FA1, 0xFFC3, 0x8000, 0x0001, 0x7F80], np.uint16)  # NaNs, -0, denormal
    odd_f32 = np.array([0x7FA00001, 0xFFC12345, 0x80000000, 1], np.uint32)
    return {
        "w": rng.standard_normal((16, 32), dtype=np.float32),
        "odd": {"bf16": odd_bf16.view(jnp.bfloat16.dtype), "f32": odd_f32.view(np.float32)},
        "fp8": rng.standard_normal(8).astype(jnp.float8_e4m3fn.dtype),
        "count": np.int32(seed),
        "key": rng.integers(0, 2**32, 2, dtype=np.uint32),
        "mask": np.array([True, False, True]),
        "empty": (np.zeros((0, 3), np.float32), np.zeros(0, jnp.bfloat16.dtype)),
        "long": np.array(2**40 + seed),
    }


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def small(step):
    return {"a": np.full((8, 8), step, np.float32), "b": np.arange(step, step + 9, dtype=np.int32)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the sound steps 1 and 2, to be copied and harmed."""
    directory = tmp_path_factory.mktemp("sound") / "checkpoints"
    store = Store(directory, keep=3, warn=pytest.fail)
    for step in (1, 2):
        store.save(step, small(step), {"position": step})
    return directory


@pytest.fixture
def harmed(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def expect_recovery(directory, to=1, reason=""):
    """Restoring warns once, naming step 2 and the reason, sets it aside, and yields step `to`."""
    warned = []
    restored = Store(directory, 3, warned.append).restore(small(0))
    assert restored is not None and restored.step == to and restored.extra == {"position": to}
    assert_same_bits(restored.state, jax.tree.map(jnp.asarray, small(to)))
    assert len(warned) == 1 and "step-2 is damaged" in warned[0] and reason in warned[0]
    assert "\n" not in warned[0]
    assert (directory / "damaged-2-1").is_dir() and not (directory / "step-2").exists()


class TestRoundTrip:
    def test_every_dtype_bit_for_bit(self, tmp_path):
        store = Store(tmp_path / "new" / "checkpoints", 3, pytest.fail)
        state, extra = mixed(), {"position": {"shard": 3}, "config": "a = 'ü'\n", "loss": 0.1}
        store.save(7, state, extra)
        restored = store.restore(mixed(1))
        assert restored.step == 7 and restored.extra == extra
        assert_same_bits(restored.state, state)

    def test_modules_states_and_optimizers(self, tmp_path):
        class Layer(nnx.Module):
            def __init__(self, rngs):
                self.w = nnx.Param(rngs.normal((3, 4)).astype(jnp.bfloat16))
                self.parts = nnx.List([nnx.Param(jnp.ones(2)), nnx.BatchStat(jnp.zeros(1))])

        @jax.tree_util.register_dataclass
        @dataclass(frozen=True)
        class State:
            model: nnx.Module
            moments: object
            value: jax.Array

        def create():
            model = Layer(nnx.Rngs(0))
            return State(model, optax.adamw(1e-3).init(nnx.state(model)), jnp.array(2))

        state = create()
        assert {
            "model.w",
            "model.parts.1",
            "moments.0.count",
            "moments.0.mu.w",
            "value",
        } <= name_leaves(state).keys()
        store = Store(tmp_path, 3, pytest.fail)
        store.save(0, state, {})
        restored = store.restore(jax.eval_shape(create))
        assert isinstance(restored.state.model, Layer)
        assert_same_bits(restored.state, state)
        as_state = store.restore(State(nnx.state(state.model), state.moments, state.value))
        assert_same_bits(as_state.state.model, nnx.state(state.model))

    def test_shardings_are_kept(self, tmp_path):
        store = Store(tmp_path, 3, pytest.fail)
        store.save(1, {"x": np.ones((4, 2), np.float32)}, {})
        mesh = jax.make_mesh((1, 1), ("a", "b"))
        wanted = jax.NamedSharding(mesh, jax.P("a", "b"))
        given = {"x": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=wanted)}
        assert store.restore(given).state["x"].sharding == wanted
        with jax.set_mesh(mesh):
            abstract = jax.eval_shape(lambda: {"x": jax.reshard(jnp.ones((4, 2)), jax.P("a", "b"))})
            assert store.restore(abstract).state["x"].sharding == wanted

    def test_restored_arrays_can_be_donated(self, tmp_path):
        store = Store(tmp_path, 3, pytest.fail)
        store.save(1, {"x": np.ones(4096, np.float32)}, {})
        step = jax.jit(lambda s: {"x": s["x"] * 2}, donate_argnums=0)
        doubled = step(store.restore({"x": jax.ShapeDtypeStruct((4096,), jnp.float32)}).state)
        store.save(2, doubled, {})
        step(doubled)
        assert store.restore({"x": np.zeros(4096, np.float32)}).state["x"].max() == 2

    def test_an_empty_state_and_a_lone_array(self, tmp_path):
        store = Store(tmp_path, 3, pytest.fail)
        for step, state in enumerate([{}, np.arange(3, dtype=np.int32)]):
            store.save(step, state, {})
            assert_same_bits(store.restore(state).state, state)

    @settings(max_examples=8, deadline=None)
    @given(
        st.dictionaries(
            st.text(max_size=6),
            st.lists(st.floats(width=32), max_size=4).map(lambda x: np.array(x, np.float32)),
            max_size=4,
        )
    )
    def test_any_names_and_floats(self, tmp_path_factory, state):
        directory = tmp_path_factory.mktemp("any")
        Store(directory, 1, pytest.fail).save(1, state, {})
        assert_same_bits(Store(directory, 1, pytest.fail).restore(state).state, state)

    def test_only_arrays(self, tmp_path):
        with pytest.raises(TypeError, match=r"opt\.lr is 0\.1"):
            Store(tmp_path, 3, pytest.fail).save(1, {"opt": {"lr": 0.1}}, {})
        assert not os.listdir(tmp_path)


nested = st.recursive(
    st.just(0), lambda inner: st.dictionaries(st.text("a.%/é", max_size=3), inner, min_size=1)
)


@given(nested)
@example({"a.a": 0, "a": {"a": 0}, "": 0, "%": 0, "a%2Ea": 0})
def test_names_never_collide_and_are_plain(tree):
    names = list(name_leaves(tree))
    assert len(names) == len(jax.tree.leaves(tree))
    assert all(set(name) <= set("ABCDEF0123456789a.%") for name in names)


@given(st.binary(min_size=4, max_size=64), st.data())
def test_a_fingerprint_tells_bits_shapes_and_dtypes_apart(raw, data):
    array = np.frombuffer(raw[: len(raw) // 4 * 4], np.uint8).copy()
    known = fingerprint(array)
    assert fingerprint(array.view(np.float32)) != known != fingerprint(array.reshape(1, -1))
    array[data.draw(st.integers(0, len(array) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint(array) != known


class TestDamage:
    def test_random_bit_flips_in_every_file(self, two_steps, tmp_path):
        rng = random.Random(0)
        files = [p.relative_to(two_steps) for p in (two_steps / "step-2").rglob("*") if p.is_file()]
        for trial in range(40):
            directory = shutil.copytree(two_steps, tmp_path / str(trial))
            path = directory / files[trial % len(files)]
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            expect_recovery(directory, reason=path.name)

    @pytest.mark.parametrize("harm", ["truncate", "delete", "zero", "directory"])
    @pytest.mark.parametrize("name", ["MANIFEST", "extra.json", "arrays/_METADATA", "arrays/d/*"])
    def test_lost_and_emptied_files(self, harmed, harm, name):
        path = max((harmed / "step-2").glob(name), key=lambda p: p.stat().st_size)
        size = path.stat().st_size
        if harm == "truncate":
            os.truncate(path, size // 2)
        elif harm == "zero":
            path.write_bytes(bytes(size))
        else:
            path.unlink()
        if harm == "directory":
            path.mkdir()
        expect_recovery(harmed, reason=path.name)

    def test_a_surplus_file(self, harmed):
        (harmed / "step-2" / "arrays" / "more").write_bytes(b"")
        expect_recovery(harmed, reason="arrays/more does not belong to it")

    def test_files_swapped_between_steps(self, harmed):
        for name in ("MANIFEST", "extra.json", "arrays"):
            directory = shutil.copytree(harmed, harmed.with_name(name))
            a, b, aside = directory / "step-1" / name, directory / "step-2" / name, directory / "x"
            b.rename(aside)
            if a.is_dir():
                shutil.copytree(a, b)
            else:
                shutil.copy(a, b)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            expect_recovery(directory)

    def test_whole_steps_swapped(self, harmed):
        shutil.rmtree(harmed / "step-2")
        shutil.copytree(harmed / "step-1", harmed / "step-2")
        expect_recovery(harmed, reason="it holds step 1")

    def test_corruption_between_file_and_array(self, harmed, monkeypatch):
        def corrupt(path, manifest):
            arrays = read(path, manifest)
            if path.name == "step-2":
                arrays["a"] = arrays["a"] + np.float32(1e-6)
            return arrays

        read = store_module._read_arrays
        monkeypatch.setattr(store_module, "_read_arrays", corrupt)
        expect_recovery(harmed, reason="the array a does not match its fingerprint")

    def test_nothing_sound_is_never_a_fresh_start(self, harmed):
        for step in (1, 2):
            (harmed / f"step-{step}" / "MANIFEST").unlink()
        warned = []
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
                Store(harmed, 3, warned.append).restore(small(0))
        assert len(warned) == 2
        assert sorted(os.listdir(harmed)) == ["damaged-1-1", "damaged-2-1"]

    def test_damage_that_cannot_be_set_aside_is_passed_over(self, harmed, monkeypatch):
        def read_only(*_):
            raise OSError(errno.EROFS, "Read-only file system")

        (harmed / "step-2" / "extra.json").unlink()
        monkeypatch.setattr(Path, "rename", read_only)
        warned = []
        assert Store(harmed, 3, warned.append).restore(small(0)).step == 1
        assert len(warned) == 1 and "Read-only file system" in warned[0]

    def test_a_step_can_be_damaged_twice(self, harmed):
        store = Store(harmed, 3, lambda _: None)
        for n in (1, 2):
            (harmed / "step-2" / "extra.json").write_text("{}")
            assert store.restore(small(0)).step == 1
            assert (harmed / f"damaged-2-{n}" / "extra.json").read_text() == "{}"
            store.save(2, small(2), {"position": 2})

    def test_extra_alone_is_verified(self, harmed):
        warned = []
        store = Store(harmed, 3, warned.append)
        assert store.read_extra() == {"position": 2} and store.read_extra(1) == {"position": 1}
        (harmed / "step-2" / "extra.json").write_text('{"position": 3}')
        assert store.read_extra() == {"position": 1} and len(warned) == 1


class TestRefusals:
    def test_nothing_there_is_none(self, tmp_path):
        for directory in (tmp_path, tmp_path / "absent"):
            store = Store(directory, 3, pytest.fail)
            assert store.restore(small(0)) is None and store.read_extra() is None
            assert store.steps() == []
        assert not os.listdir(tmp_path)

    def test_another_configuration_is_named_and_not_set_aside(self, harmed):
        store = Store(harmed, 3, pytest.fail)
        other = {"a": np.zeros((8, 4), np.float32), "c": np.zeros(2, jnp.bfloat16.dtype)}
        with pytest.raises(CheckpointError) as error:
            store.restore(other)
        assert str(error.value).endswith(
            "step-2 does not fit this configuration: a is float32[8,8] in it and float32[8,4] "
            "here; b is int32[9] in it and absent here; c is absent in it and bfloat16[2] here"
        )
        with pytest.raises(CheckpointError, match=r"; 9 more$"):
            store.restore({f"x{i}": np.zeros(1) for i in range(10)})
        assert store.steps() == [1, 2]

    def test_a_step_that_is_asked_for(self, harmed):
        warned = []
        store = Store(harmed, 3, warned.append)
        assert store.restore(small(0), step=1).step == 1
        with pytest.raises(CheckpointError, match=r"no sound step 5; steps: 1, 2"):
            store.restore(small(0), step=5)
        (harmed / "step-1" / "extra.json").unlink()
        with pytest.raises(CheckpointError, match=r"no sound step 1; steps: 2"):
            store.restore(small(0), step=1)
        assert len(warned) == 1 and "step-1 is damaged" in warned[0]

    def test_foreign_directories(self, two_steps, tmp_path):
        raw = shutil.copytree(two_steps / "step-1" / "arrays", tmp_path / "raw")
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "todo.txt").write_text("x")
        (tmp_path / "file").write_text("x")
        for name, reason in (("notes", "todo.txt"), ("raw", "_METADATA"), ("file", "not a dir")):
            with pytest.raises(CheckpointError, match=f"{name}.*{reason}"):
                Store(tmp_path / name, 3, pytest.fail)
        assert (raw / "_METADATA").exists()

    def test_a_later_format_is_not_damage(self, harmed, monkeypatch):
        monkeypatch.setattr("dsv3.checkpoint.manifest.FORMAT", 2)
        store = Store(harmed, 3, pytest.fail)
        with pytest.raises(CheckpointError, match="has format 1; this program reads 2"):
            store.restore(small(0))
        assert store.steps() == [1, 2]

    def test_a_committed_step_is_never_rewritten(self, harmed):
        store = Store(harmed, 3, pytest.fail)
        before = (harmed / "step-2" / "MANIFEST").stat().st_mtime_ns
        store.save(2, small(2), {"position": "elsewhere"})
        assert (harmed / "step-2" / "MANIFEST").stat().st_mtime_ns == before
        with pytest.raises(CheckpointError, match="step-2 is already saved, with other arrays"):
            store.save(2, small(3), {})


class TestKeep:
    def test_the_newest_are_kept(self, tmp_path):
        store = Store(tmp_path, 2, pytest.fail)
        for step in (5, 10, 100, 20):
            store.save(step, small(step), {})
        assert store.steps() == [20, 100]
        assert sorted(os.listdir(tmp_path)) == ["step-100", "step-20"]

    def test_the_step_just_saved_stays_whatever_its_number(self, tmp_path):
        store = Store(tmp_path, 1, pytest.fail)
        for step in (5, 3):
            store.save(step, small(step), {})
        assert store.steps() == [3]

    def test_nothing_goes_before_the_new_one_is_committed(self, tmp_path, monkeypatch):
        store = Store(tmp_path, 1, pytest.fail)
        store.save(1, small(1), {})
        monkeypatch.setattr(store_module, "fsync_tree", _fails(OSError(errno.EIO, "I/O error")))
        with pytest.raises(CheckpointError, match=r"step-2 cannot be saved: I/O error"):
            store.save(2, small(2), {})
        assert os.listdir(tmp_path) == ["step-1"]


class TestDisk:
    @pytest.mark.parametrize(
        "place", ["fsync_tree", "_write_arrays", "_require_space", "fsync_directory"]
    )
    def test_a_full_disk_at_any_stage(self, harmed, monkeypatch, place):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if place == "_write_arrays":
            full = ValueError("Failed to write 9 bytes: No space left [os_error_code='28']")
        store = Store(harmed, 3, pytest.fail)
        with monkeypatch.context() as patched:
            patched.setattr(store_module, place, _fails(full))
            with pytest.raises(CheckpointError, match=r"step-3 cannot be saved: No space left"):
                store.save(3, small(3), {})
        assert not [name for name in os.listdir(harmed) if name.startswith("tmp-")]
        store.save(4, small(4), {})
        assert Store(harmed, 3, pytest.fail).restore(small(0)).step == 4

    def test_what_a_failed_save_left_is_swept_by_the_next(self, harmed):
        store = Store(harmed, 3, pytest.fail)
        (harmed / "tmp-step-3-late").mkdir()  # tensorstore may write on after orbax has raised
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
        monkeypatch.setattr(Path, "mkdir", _fails(read_only))
        with pytest.raises(CheckpointError, match="step-3 cannot be saved: Read-only file system"):
            Store(harmed, 3, pytest.fail).save(3, small(3), {})

    def test_an_error_that_is_ours_stays_one(self, harmed, monkeypatch):
        monkeypatch.setattr(store_module, "_write_arrays", _fails(ValueError("a bug")))
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
        monkeypatch.setattr(store_module, "_write_arrays", then_copy(store_module._write_arrays))
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
        def write(path, arrays):
            Store(harmed, 3, pytest.fail)  # as eval.py does beside a training run
            assert path.parent.exists()

        monkeypatch.setattr(store_module, "_write_arrays", write)
        Store(harmed, 3, pytest.fail).save(3, {}, {})
        (harmed / "tmp-step-4-dead").mkdir()
        assert Store(harmed, 3, pytest.fail).steps() == [1, 2, 3]
        assert not (harmed / "tmp-step-4-dead").exists()


def _fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail
