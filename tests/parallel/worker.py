"""One of several processes that train a stand-in for a model; `test_processes.py` starts them.

    worker.py PORT PROCESSES PROCESS SECONDS WORKDIR SCENARIO

The state is a vector cut over all devices, a step one jitted program over a sharded batch; loop,
loader, recorder, store and launch are the real ones.
"""

import dataclasses
import itertools
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.checkpoint.store import Store
from dsv3.data.loader import Loader
from dsv3.data.prepare import prepare
from dsv3.errors import DataError, UserError, exits_cleanly
from dsv3.parallel import launch
from dsv3.parallel.processes import Agreement, exchange, is_first, together
from dsv3.reporting.metrics import Recorder
from dsv3.training.loop import Run, StopRequest
from tests.training.small import CONFIG


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    sequences: jax.Array
    w: jax.Array


@jax.jit
def advance(state, tokens):
    target = jnp.mean(tokens.astype(jnp.float32))
    loss = jnp.mean((state.w - target) ** 2)
    w = state.w + 0.1 * (target - state.w)
    state = State(state.step + 1, state.sequences + len(tokens), w)
    return state, {
        "step": state.step, "sequences": state.sequences, "loss": loss, "skipped_in_a_row": 0,
    }  # fmt: skip


def train(workdir, steps=None, meanwhile=lambda step: None):
    """To step `steps`, resuming; `meanwhile` is told of each step in each process."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (jax.NamedSharding(mesh, spec) for spec in (jax.P("d"), jax.P()))
    loader = Loader(prepare(CONFIG), CONFIG, rows)
    store = Store(Path(workdir) / "checkpoints", 3, print)
    fresh = jax.jit(
        lambda: State(jnp.uint32(0), jnp.uint32(0), jnp.arange(8.0)),
        out_shardings=State(everywhere, everywhere, rows),
    )
    restored = store.restore(jax.tree.map(lambda x: x, jax.eval_shape(fresh)))
    state, read = fresh(), 0
    if restored:
        state, read = restored.state, restored.extra["read"]
        loader.restore(restored.extra["loader"])

    def save(state):
        store.save(int(state.step), state, {"loader": loader.state(), "read": run.sequences_read})

    def step(state, tokens):
        meanwhile(int(state.step) + 1)
        return advance(state, tokens)

    reporting, length = CONFIG.reporting, CONFIG.training.sequence_length
    recorder = Recorder(workdir if is_first() else None, reporting, length, step=int(state.step))
    stop = StopRequest()
    run = Run(CONFIG, step, loader, recorder, save, lambda row: None, stop, read)
    with stop.listening():
        state = run.until(state, steps)
    print("ended at", int(state.step), stop.name)


def talk(workdir):
    """What one says, wants and meets, all do."""
    me = jax.process_index()
    print("said", exchange(f"{me}!"))
    for error in (DataError("no corpus"), ValueError("a bug")):
        try:
            with together(DataError):
                if me == 2:
                    raise error
        except (UserError, ValueError) as met:
            print("met", type(met).__name__, met)
    agree = Agreement()
    calls = (
        call for call in itertools.count() if agree("SIGINT" if (me, call) >= (3, 5) else None)
    )
    print("agreed at", next(calls))


def share(workdir):
    """Batches are the same whoever reads them, and each process reads its rows alone."""
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    prepared, read = prepare(CONFIG), []
    sharded = Loader(prepared, CONFIG, jax.NamedSharding(mesh, jax.P("d")))
    alone, windows = Loader(prepared, CONFIG), sharded._windows
    for size in (8, 4):
        sharded._windows = type(
            "", (), {"__getitem__": lambda _, n: read.append(n) or windows[n]}
        )()
        found, wanted = sharded.next_batch(size), alone.next_batch(size)
        for shard in found.tokens.addressable_shards:
            np.testing.assert_array_equal(shard.data, wanted.tokens[shard.index])
    print("read", read, sharded.state() == alone.state())


def stop(workdir):
    def meanwhile(step):
        if jax.process_index() == 1 and step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    train(workdir, meanwhile=meanwhile)


def die(workdir):
    def meanwhile(step):
        if jax.process_index() == 1 and step == 15:
            os.kill(os.getpid(), signal.SIGKILL)

    train(workdir, meanwhile=meanwhile)


def vanish(workdir):
    """One dies while the others wait for it, and for no device."""
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    exchange("")


def wait(workdir):
    """The first does not come; of those who wait for it, the last would save first."""
    stop = StopRequest()
    with stop.listening() if jax.process_index() == 2 else nullcontext():
        print("begun", flush=True)
        if is_first():
            time.sleep(1000)
        exchange("")


@exits_cleanly
def main(port, processes, process, seconds, workdir, *scenarios):
    launch.HEARTBEAT_SECONDS = 1000  # longer than a test: deaths are announced

    def work():
        for scenario in scenarios:
            globals()[scenario](workdir)

    place = launch.place_of(f"127.0.0.1:{port}", int(processes), int(process))
    launch.run(place, int(seconds), work)


if __name__ == "__main__":
    main(*sys.argv[1:])
