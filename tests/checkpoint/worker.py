"""One of several processes that save and restore together; `test_processes.py` starts them.

    worker.py PORT PROCESSES PROCESS DIRECTORY SCENARIO...

Prints a line for each thing that held, as seen by this process, and `done` at the end.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from dsv3.checkpoint import arrays, huggingface
from dsv3.checkpoint.importing import HUB
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.trained import restore
from dsv3.cluster import Parallel
from dsv3.errors import UserError
from dsv3.parallel import mesh as meshes
from dsv3.training import state
from tests.checkpoint.states import assert_same_bits


def whole(step):
    """The state of `step` as numpy arrays."""
    rng = np.random.default_rng(step)
    return {
        "rows": rng.standard_normal((8, 6), dtype=np.float32),
        "columns": rng.integers(0, 99, (3, 16), dtype=np.int32),
        "both": rng.standard_normal((8, 4, 2)).astype("float16"),
        "everywhere": rng.standard_normal(5, dtype=np.float32),
        "count": np.uint32(step),
    }


def abstract(specs):
    """What to restore into: `whole` on all devices, in a mesh of two rows."""
    mesh = jax.make_mesh((2, jax.device_count() // 2), ("a", "b"))
    return {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=jax.NamedSharding(mesh, specs.get(name, jax.P()))
        )
        for name, array in whole(0).items()
    }


ONE = {"rows": jax.P("a"), "columns": jax.P(None, ("a", "b")), "both": jax.P("a", "b")}
OTHER = {"rows": jax.P(("b", "a")), "columns": jax.P(None, "b"), "everywhere": jax.P()}


def on_devices(step, specs):
    """`whole(step)` as jax arrays, each process making its own shards."""
    state = whole(step)
    return {
        name: jax.make_array_from_callback(like.shape, like.sharding, lambda i, n=name: state[n][i])
        for name, like in abstract(specs).items()
    }


def assert_restored(state, step, specs):
    for name, array in state.items():
        assert array.sharding == abstract(specs)[name].sharding
        for shard in array.addressable_shards:
            assert_same_bits(np.asarray(shard.data), whole(step)[name][shard.index])


def raised(call, *args):
    try:
        call(*args)
    except UserError as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def save_and_restore(directory):
    """Commit on one mesh, restore on another; what is read is what the devices need."""
    store = Store(directory, 5, print)
    for step in (1, 2):
        store.save(step, on_devices(step, ONE), {"step": step})
    store.save(2, on_devices(2, OTHER), {})  # the same arrays on another mesh: nothing to do
    print("other arrays", raised(store.save, 2, on_devices(1, ONE), {})[0])
    read, stored = [], arrays.Arrays._stored
    arrays.Arrays._stored = lambda self, name, box: read.append(name) or stored(self, name, box)
    restored = store.restore(abstract(ONE))
    assert restored.step == 2 and restored.extra == {"step": 2}
    assert_restored(restored.state, 2, ONE)
    print("chunks read", read.count("rows"), read.count("columns"), read.count("everywhere"))
    assert_restored(store.restore(abstract(OTHER)).state, 2, OTHER)
    store.save(3, {"w": whole(3)["both"], "n": np.int32(3)}, {})


def begin_from_an_import(directory):
    """Each process hashes its share and reads what its devices hold; damage is damage for all."""
    workdir = Path(directory).parent / "imported"
    config, plain = huggingface.load(workdir / HUB, "float32")
    config = replace(config, parallel=Parallel(replica=None))
    mesh, store = meshes.build(config.parallel), Store(workdir / "checkpoints", 5, print)
    begun = restore(config, store, mesh).state
    here = state.placement(config, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, begun) == here
    for found, wanted in zip(
        jax.tree.leaves(begun.params), jax.tree.leaves(state.split(plain)[1]), strict=True
    ):
        for shard in found.addressable_shards:
            assert_same_bits(np.asarray(shard.data), np.asarray(wanted)[shard.index])
    if jax.process_index() == 0:
        (workdir / HUB / "config.json").write_text("{}")  # the second file: process 1 looks at it
    print("import", *raised(restore, config, store, mesh))


def fail_in_one(directory):
    """What one process cannot write is no step for any, what one finds damaged for none."""
    store = Store(directory, 5, print)
    write = arrays.write
    if jax.process_index() == 1:
        arrays.write = lambda *_: os.stat("/nowhere")
    print(*raised(store.save, 4, on_devices(4, ONE), {}))
    arrays.write = write
    if jax.process_index() == 0:
        data = max(
            store._path(2).rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size
        )
        data.write_bytes(data.read_bytes()[:-1] + b"!")
        (store._path(3) / "extra.json").unlink()
    restored = store.restore(abstract(OTHER))
    assert_restored(restored.state, 1, OTHER)
    print("restored", restored.step)


def die_in_one(directory):
    """The second process is killed while it writes."""
    store, write = Store(directory, 5, print), arrays.write

    def then_die(*args):
        write(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    if jax.process_index() == 1:
        arrays.write = then_die
    store.save(5, on_devices(5, ONE), {})


def restore_elsewhere(directory):
    """On all devices of this process."""
    restored = Store(directory, 5, print).restore(abstract(OTHER), 1)
    assert_restored(restored.state, 1, OTHER)


def main(port, processes, process, directory, *scenarios):
    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    for scenario in scenarios:
        print(">", scenario)
        globals()[scenario](directory)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
