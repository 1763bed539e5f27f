"""Train a model: configuration -> data -> state -> loop, and what a run prints at its end.

    python train.py configs/tiny.py --workdir runs/tiny
    python train.py configs/tiny.py --workdir runs/tiny --set model.moe.experts_per_token=2
    python train.py configs/tiny.py --workdir runs/balance --sweep balance [--index 1]

The same command on the same workdir goes on where the run stopped, bit for bit. Ctrl-C or SIGTERM
saves and ends it; a second one ends it at once. Several processes (SLURM, Open MPI, Kubernetes and
Cloud TPU are recognised, --coordinator HOST:PORT --processes N --process I otherwise) are one run.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import Mesh

from dsv3 import counts
from dsv3.bindings import HEADER, apply, blocks_of, operative, read_bindings
from dsv3.checkpoint.importing import HUB
from dsv3.checkpoint.resume import start_or_resume
from dsv3.checkpoint.store import Store
from dsv3.cli import Parser
from dsv3.config import Config
from dsv3.data.loader import Loader
from dsv3.data.prepare import Prepared, prepare
from dsv3.data.progress import progress_bars
from dsv3.errors import DataError, TrainingError, UserError, exits_cleanly
from dsv3.evaluation.closing import closing_report
from dsv3.files import exclusive, write_atomically
from dsv3.host import keep_freed_memory
from dsv3.model.transformer import Transformer
from dsv3.parallel import launch
from dsv3.parallel import mesh as meshes
from dsv3.parallel.mesh import on_this_platform
from dsv3.parallel.processes import is_first, require_same, together
from dsv3.reporting.fp8 import watching
from dsv3.reporting.metrics import Recorder
from dsv3.reporting.plots import compare_runs, plot_run
from dsv3.reporting.progress import TrainingProgress
from dsv3.reporting.results import collect, write_results
from dsv3.sweeps import Sweep, describe, load_config, load_sweep, select
from dsv3.training import state as train_state
from dsv3.training.average import settled
from dsv3.training.loop import Run, StopRequest
from dsv3.training.schedules import steps_to_end
from dsv3.training.step import make_step

# What a run writes at the top of its workdir, and a foreign folder may hold as well.
WRITTEN = ("config.gin", "tokenizer.json", "metrics.jsonl", "loads.jsonl", "results.json")


def train(
    config: Config, workdir: str | Path, steps: int | None = None, stop: StopRequest | None = None
) -> train_state.TrainState:
    """Train in `workdir`, resuming what is there, to optimizer step `steps` or to the end."""
    workdir, stop = Path(workdir), stop or StopRequest()
    fields = {path: value for block in blocks_of(config) for path, value in block.items()}
    require_same({"--workdir": str(workdir), "--steps": steps, **fields})
    with ExitStack() as stack:
        with together():
            if is_first():
                workdir.mkdir(parents=True, exist_ok=True)
                require_own(workdir)
                stack.enter_context(exclusive(workdir))
        return _train(config, workdir, steps, stop)


def _train(
    config: Config, workdir: Path, steps: int | None, stop: StopRequest
) -> train_state.TrainState:
    jax.config.update(
        "jax_compilation_cache_dir", str(Path(config.data.cache).expanduser() / "xla")
    )
    mesh = meshes.build(config.parallel)
    step = make_step(on_this_platform(config), mesh)
    with progress_bars() as progress:
        prepared = prepare(config, progress)
    total = min(steps or sys.maxsize, steps_to_end(config.training))
    with TrainingProgress(total, config.reporting.every) as shown:
        store = Store(workdir / "checkpoints", config.checkpoint.keep, shown.say)
        loader = Loader(prepared, config, meshes.batch_sharding(mesh))
        state, sequences_read = start_or_resume(config, mesh, store, loader, shown.say)
        describe_run(config, mesh, prepared, shown.say)

        def save(state: train_state.TrainState) -> None:
            position = {"loader": loader.state(), "sequences_read": run.sequences_read}
            packages = {name: version(name) for name in ("jax", "flax", "optax")}
            extra = {**position, "config": operative(config), "packages": packages}
            store.save(int(state.step), settled(config.training, state), extra)

        recorder = Recorder(
            workdir if is_first() else None, config.reporting, config.training.sequence_length,
            step=int(state.step), sequences=int(state.sequences), skipped=int(state.skipped),
        )  # fmt: skip
        step = watching(on_this_platform(config), mesh, step, int(state.step))
        run = Run(config, step, loader, recorder, save, shown.update, stop, sequences_read)
        if ended := run.ended(int(state.step), int(state.sequences), steps):
            shown.say(f"nothing left to train: step {int(state.step)}")
        with together():
            if is_first() and not ended:
                if (store.steps() or (workdir / HUB).exists()) and not sequences_read:
                    require_same_tokenizer(config, prepared, workdir / "tokenizer.json")
                write_inputs(config, prepared, workdir)
        with stop.listening():
            state = settled(config.training, run.until(state, steps))
        if stop.name:
            shown.say(f"{stop.name}: saved step {int(state.step)}; the same command goes on")
        else:
            finish(on_this_platform(config), mesh, workdir, prepared, state, shown.say)
    return state


def require_own(workdir: Path) -> None:
    """Raise UserError where a new run would write over what is not of a run."""
    config = workdir / "config.gin"
    begun = config.is_file() and config.read_bytes().startswith(HEADER.encode())
    if found := [] if begun else [n for n in WRITTEN if (workdir / n).exists()]:
        raise UserError(f"{workdir} is no run's, but holds {found[0]}: choose another --workdir")


def require_same_tokenizer(config: Config, prepared: Prepared, saved: Path) -> None:
    """Raise DataError where the checkpoint's model reads and writes by another tokenizer."""
    ours = prepared.tokenizer
    if ours and saved.exists() and saved.read_bytes() != ours.definition.encode():
        raise DataError(
            f"data.tokenizer = {config.data.tokenizer!r} is not {saved}, which the checkpoints in "
            f"{saved.parent} are of: train on with --set data.tokenizer={saved}"
        )


def write_inputs(config: Config, prepared: Prepared, workdir: Path) -> None:
    """What reproduces the run, and what its model needs to read and write text."""
    write_atomically(workdir / "config.gin", operative(config))
    if prepared.tokenizer is not None:
        prepared.tokenizer.save(workdir / "tokenizer.json")


def describe_run(
    config: Config, mesh: Mesh, prepared: Prepared, say: Callable[[str], None]
) -> None:
    """Say what will be trained, and on what."""
    total, active = counts.parameters(config.model).total, counts.activated(config.model).total
    dot = on_this_platform(config).model.dot
    say(f"data: {prepared.describe()}")
    say(
        f"model: {total:,} parameters, {active:,} activated a token; dot rule "
        f"{config.model.dot.tag!r} (backend {dot.backend!r}) in {config.training.compute_dtype} on "
        f"{meshes.describe(config, mesh)}"
    )
    say(f"backends: {meshes.backends(config)}")


def finish(
    config: Config, mesh: Mesh, workdir: Path, prepared: Prepared,
    state: train_state.TrainState, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Evaluate, sample and plot, in the first process; the others wait for it."""
    graph = train_state.graphdef(config)
    whole = meshes.on_one_device((state.params, state.router_bias), mesh)
    model = train_state.merge(graph, *whole)
    with together():
        if is_first():
            report(config, workdir, prepared, model, int(state.step), say)


def report(
    config: Config, workdir: Path, prepared: Prepared, model: Transformer, step: int,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Figures to `results.json`, lines and plots."""
    figures, lines = closing_report(config, model, prepared)
    for line in lines:
        say(line)
    if figures:
        figures = {"step": step, **figures}
        write_atomically(workdir / "results.json", json.dumps(figures) + "\n")
    if config.reporting.plots:
        say(f"plots: {', '.join(str(path) for path in plot_run(workdir))}")


def sweep(
    base: Config, sweep: Sweep, folder: str | Path, index: int | None = None,
    steps: int | None = None,
) -> str:  # fmt: skip
    """Train every run of a sweep in `folder/<run id>`, or run `index` alone; the results' table."""
    runs, stop = sweep.runs(base), StopRequest()
    say = functools.partial(print, flush=True) if is_first() else lambda line: None
    for run in runs if index is None else [select(runs, index)]:
        say(f"run {run.id}: {describe(run.bindings)}")
        try:
            train(run.config, Path(folder) / run.id, steps, stop)
        except TrainingError as error:  # a run that diverges is a result, and not of the others
            if index is not None:
                raise
            say(f"run {run.id} ended: {error}")
        if stop.name:
            break
    if not is_first():
        return ""
    rows = collect(folder, runs)
    begun = [run for run, found in rows if found]
    if begun and base.reporting.plots:
        labels = [describe(run.bindings) for run in begun]
        compare_runs([Path(folder) / run.id for run in begun], labels, Path(folder) / "losses.png")
    return write_results(folder, rows)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_argument("--workdir", required=True, help="where the run, or the sweep, is kept")
    parser.add_bindings()
    parser.add_argument("--bindings", metavar="FILE", help="a file of bindings, made before --set")
    parser.add_argument("--sweep", metavar="NAME", help="a sweep of the configuration file")
    parser.add_argument("--index", type=int, help="only this run of the sweep, from 0")
    parser.add_argument("--steps", type=int, help="end after this optimizer step")
    parser.add_processes()
    options = parser.parse_args(arguments)
    if not options.workdir:
        parser.error("--workdir is empty")
    if options.index is not None and options.sweep is None:
        parser.error("--index wants --sweep")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps} must be at least 1")
    return options


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    options = parsed(arguments)
    bindings = read_bindings(options.bindings) if options.bindings else []
    config = apply(load_config(options.config), bindings + options.set)
    named = load_sweep(options.config, options.sweep) if options.sweep else None

    def work() -> None:
        require_same({"--sweep": options.sweep, "--index": options.index})
        if named is None:
            train(config, options.workdir, options.steps)
        else:
            print(sweep(config, named, options.workdir, options.index, options.steps), end="")

    place = launch.place_of(options.coordinator, options.processes, options.process)
    launch.run(place, options.join_seconds, work)


if __name__ == "__main__":
    main()
