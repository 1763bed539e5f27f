"""The store: what was saved comes back bit for bit, or is refused by name."""

import errno
import os
import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3.checkpoint import store as store_module
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError
from tests.checkpoint.states import assert_same_bits, fails, mixed, small


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

    def test_another_format_is_not_damage(self, harmed, monkeypatch):
        monkeypatch.setattr("dsv3.checkpoint.manifest.FORMAT", 3)
        store = Store(harmed, 3, pytest.fail)
        with pytest.raises(CheckpointError, match="has format 2; this program reads 3"):
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
        monkeypatch.setattr(store_module, "fsync_tree", fails(OSError(errno.EIO, "I/O error")))
        with pytest.raises(CheckpointError, match=r"step-2 cannot be saved: I/O error"):
            store.save(2, small(2), {})
        assert os.listdir(tmp_path) == ["step-1"]
