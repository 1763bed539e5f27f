"""A trained model with its configuration and tokenizer: where evaluation starts.

It comes from a run's workdir (config.gin, tokenizer.json and the newest sound checkpoint, or before
the first one what was imported) or from a folder in the layout of the Hugging Face hub. The
tokenizer is read on demand: logits need none.

The model lies on the mesh of `parallel`, or on one device if nothing else is bound: `bind` makes of
the configuration found there the one to go on with, before any weight is read.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dsv3.bindings import apply, read_bindings
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.importing import imported
from dsv3.checkpoint.manifest import difference, name_leaves
from dsv3.checkpoint.store import Restored, Store
from dsv3.cluster import Parallel
from dsv3.config import Config
from dsv3.data import tokenizer
from dsv3.errors import CheckpointError, DataError, MisfitError, nearest
from dsv3.model.transformer import Transformer
from dsv3.parallel import mesh as meshes
from dsv3.parallel.mesh import on_this_platform
from dsv3.training import state

Bind = Callable[[Config], Config]


@dataclass(frozen=True)
class Trained:
    """`config` as it was bound, `model` on its mesh, and the folder they came from."""

    config: Config
    model: Transformer
    folder: Path

    def tokenizer(self) -> tokenizer.Tokenizer:
        """Raises DataError where the folder has none, or one with more ids than the model."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            raise DataError(f"{self.folder} has no tokenizer.json, so it cannot read or write text")
        found = tokenizer.load(path)
        ids, vocab = found.vocab_size, self.config.model.vocab
        if ids > vocab:
            raise DataError(f"{path} has {ids} ids, more than model.vocab = {vocab}")
        return found


def on_one_device(config: Config) -> Config:
    """`config`, but for the mesh that it was trained on."""
    return replace(config, parallel=Parallel())


def from_workdir(
    workdir: str | os.PathLike, warn: Callable[[str], None], *, ema: bool = False,
    bind: Bind = on_one_device,
) -> Trained:  # fmt: skip
    """The model of a run at its newest sound checkpoint: the live parameters, or their average.

    `warn` hears of damaged checkpoints. Raises ConfigError or CheckpointError where there is no
    run, no checkpoint, one that does not fit config.gin, or no average.
    """
    folder = _folder(workdir, "workdir")
    if not (folder / "config.gin").exists():
        raise CheckpointError(f"{folder} is no run: it has no config.gin")
    config = bind(on_this_platform(apply(Config(), read_bindings(folder / "config.gin"))))
    mesh = meshes.build(config.parallel)
    store = Store(folder / "checkpoints", config.checkpoint.keep, warn)
    restored = store.restore(state.abstract(config, mesh))
    if restored is None:
        if (found := imported(folder)) is None:
            raise CheckpointError(f"no checkpoint in {store.directory} yet")
        if ema:
            raise CheckpointError(f"{folder} is an import that was not trained: it has no average")
        model = _model(found, config, mesh)
        return Trained(config, state.on_mesh(config, model, mesh), folder)
    params = restored.state.params
    if ema:
        if restored.state.ema is None:
            raise CheckpointError(f"{folder} keeps no average: training.ema_decay = None")
        params = jax.device_put(restored.state.ema, jax.memory.Space.Device)
    model = state.merge(state.graphdef(config), params, restored.state.router_bias)
    return Trained(config, state.on_mesh(config, model, mesh), folder)


def restore(config: Config, store: Store, mesh: Mesh | None = None) -> Restored | None:
    """The newest sound state of a run, on `mesh`, by default on one device; of an import in whose
    workdir `store` lies and has no step yet, the state that begins training from it."""
    restored = store.restore(state.abstract(config, mesh))
    if restored or (found := imported(store.directory.parent)) is None:
        return restored
    begun = state.from_model(config, _model(found, config, mesh), mesh)
    return Restored(0, begun, _extra(found))


def _model(found: Folder, config: Config, mesh: Mesh | None = None) -> Transformer:
    """The model of `config` with the parameters of an import, FP32, where training has them."""
    begun = state.abstract(config, mesh)
    wanted = state.merge(state.graphdef(config), begun.params, begun.router_bias)
    leaves = name_leaves(wanted)
    if misfit := difference(name_leaves(found.abstract), leaves):
        raise MisfitError(f"{found.path} does not fit this configuration: {misfit}", _extra(found))
    model = found.model(jnp.float32, lambda name, _: leaves[name].sharding)
    return jax.tree.unflatten(jax.tree.structure(wanted), jax.tree.leaves(model))


def _extra(found: Folder) -> dict:
    """What a checkpoint says of a run that has read nothing yet."""
    config = (found.path / "config.gin").read_text()
    return {"loader": None, "sequences_read": 0, "config": config}


def from_hf(
    directory: str | os.PathLike, bind: Bind = on_one_device, dtype: str | None = None
) -> Trained:
    """The model of a Hugging Face folder, its parameters in `dtype` or in the checkpoint's
    precision, FP32 where it has any FP8."""
    found = Folder(_folder(directory, "Hugging Face folder"))
    config = bind(on_this_platform(found.config))
    mesh = meshes.build(config.parallel)

    def place(name: str, shape: tuple[int, ...]) -> NamedSharding:
        sizes = meshes.sizes_of(mesh)
        return NamedSharding(mesh, meshes.place_of(config, sizes, name, shape).spec(len(shape)))

    model = state.on_mesh(config, found.model(dtype, place), mesh)
    return Trained(config, model, Path(directory))


def _folder(path: str | os.PathLike, kind: str) -> Path:
    path = Path(path)
    if not path.is_dir():
        beside = [p.name for p in path.parent.glob("*/")]
        raise CheckpointError(f"no {kind} {path}{nearest(path.name, beside) if beside else ''}")
    return path
