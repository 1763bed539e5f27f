"""How a run begins: from its newest sound checkpoint, or at the initialisation.

A run may go on with other fields than it was saved with. What changed is said; what cannot change
is refused by the name of the field: what shapes its arrays, its data, its seed.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from dsv3.bindings import apply, difference, parse
from dsv3.checkpoint.store import Restored, Store
from dsv3.checkpoint.trained import restore
from dsv3.config import Config, Data
from dsv3.data.loader import Loader
from dsv3.errors import CheckpointError, ConfigError, DataError, MisfitError, UserError
from dsv3.parallel.shard import path_of
from dsv3.schema import field_types
from dsv3.training import state as train_state

OF_DATA = {f"data.{field}" for field in field_types(Data)} | {"training.sequence_length"}


def start_or_resume(
    config: Config, mesh: Mesh, store: Store, loader: Loader, say: Callable[[str], None]
) -> tuple[train_state.TrainState, int]:
    """The newest sound checkpoint's state, the loader put where it was; else a fresh state."""
    try:
        restored = restore(config, store, mesh)
    except MisfitError as error:
        raise CheckpointError(misfit(config, mesh, store, error)) from error
    if restored is None:
        return train_state.create(config, mesh), 0
    changed = changes(config, restored, say)
    if restored.extra["loader"] is not None:  # None: imported, not trained on anything yet
        if "training.seed" in changed:
            raise ConfigError(
                f"training.seed = {config.training.seed} is not what the run in {store.directory} "
                "began with, and only then does it matter"
            )
        try:
            loader.restore(restored.extra["loader"])
        except DataError as error:
            fields = [f"{path} = {value!r}" for path, value in changed.items() if path in OF_DATA]
            raise DataError(f"{error}{'; changed: ' * bool(fields)}{', '.join(fields)}") from error
    say(f"resuming after step {restored.step}")
    return restored.state, restored.extra["sequences_read"]


def changes(config: Config, restored: Restored, say: Callable[[str], None]) -> dict[str, Any]:
    """Bindings that make of what the checkpoint was saved with this configuration; said."""
    try:
        before = apply(Config(), parse(restored.extra["config"]))
    except UserError as error:
        say(f"step {restored.step} is of another version of this program: {error}")
        return {}
    changed = difference(config, before)
    for path, value in changed.items():
        say(f"changed since step {restored.step}: {path} = {value!r}")
    return changed


def misfit(config: Config, mesh: Mesh, store: Store, error: MisfitError) -> str:
    """The fields that the checkpoint was saved with otherwise and that its arrays depend on."""
    try:
        saved = apply(Config(), parse(error.extra["config"]))
    except UserError:  # fields that this version does not know
        return str(error)
    here, there = difference(config, saved), difference(saved, config)

    def matters(path: str) -> bool:
        try:
            as_saved = apply(config, {path: there[path]})
            return arrays_of(as_saved, mesh) != arrays_of(config, mesh)
        except (KeyError, UserError):  # cannot be bound alone
            return path.startswith("model.")

    fields = [path for path in sorted(here.keys() | there.keys()) if matters(path)]
    if not fields:
        return str(error)
    shown = [f"{p} is {there.get(p, 'absent')!r} in it and {here.get(p, 'absent')!r} here"
             for p in fields[:4]]  # fmt: skip
    where, remedy = str(store.directory), ""
    if error.extra["loader"] is None:
        own = store.directory.parent / "config.gin"
        where, remedy = "what was imported", f"; --bindings {own} is its own"
    return f"{where} is of another configuration: {'; '.join(shown)}{remedy}"


def arrays_of(config: Config, mesh: Mesh) -> dict[str, tuple]:
    """Shape and dtype of every array of a state, by its path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(train_state.abstract(config, mesh))
    return {path_of(path): (leaf.shape, leaf.dtype) for path, leaf in flat}
