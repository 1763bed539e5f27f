"""Checkpoints of the hub: DeepSeek-V3 in the released layout, read into our model.

    config, model = huggingface.load("DIR")
    python -m dsv3.checkpoint.huggingface import --hf DIR --workdir DIR

DIR holds config.json and model.safetensors, or shards of it with an index. All is checked on the
files' headers before the first weight is read: every tensor of the model is there, no other is, and
shapes fit. Then tensors are read one at a time, each straight into its place in the stacked
parameters, so the peak is the model and its largest parameter. MTP layers come along; where
config.json announces some that the files do not hold (transformers writes it so), there are none.

Pickles (.bin, .pt) are refused without being opened: they run code. Quantized weights are refused
until FP8 blocks are read; `Weights.__getitem__`, where every tensor comes from, is the place.
"""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsv3 import counts
from dsv3.bindings import operative
from dsv3.checkpoint import hub
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.store import Store
from dsv3.config import Config
from dsv3.errors import CheckpointError, UserError, exits_cleanly
from dsv3.files import fsync_directory, fsync_tree
from dsv3.model.transformer import Transformer
from dsv3.training import state

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


class Header(NamedTuple):
    """Where a tensor is and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...


class Weights:
    """The tensors of a folder: `headers` by name, read at once, and `weights[name]`, on demand.

    Raises CheckpointError where there are no weights, only pickles, a damaged file, or an index
    that names a file outside the folder or a tensor that its file does not hold.
    """

    def __init__(self, folder: Path):
        index = _read_index(folder)
        self._files = {file: _open(folder / file) for file in set(index.values()) or [SINGLE]}
        self.headers = {}
        for file, tensors in self._files.items():
            for name in tensors.keys():
                tensor = tensors.get_slice(name)
                shape = tuple(tensor.get_shape())
                self.headers[name] = Header(folder / file, shape, tensor.get_dtype())
        for name, file in index.items():
            if name not in self.headers or self.headers[name].file.name != file:
                raise CheckpointError(f"{folder / INDEX} places {name} in {file}, which lacks it")

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor as stored."""
        return self._files[self.headers[name].file.name].get_tensor(name)


def load(folder: str | os.PathLike, dtype: Any = None) -> tuple[Config, Transformer]:
    """The configuration and model of a checkpoint folder.

    Parameters have the precision of the files, the wider one where tensors stacked into one
    parameter differ; or `dtype`. The router's selection bias is FP32 always. Raises
    CheckpointError, one line naming the file, field or tensor, for whatever is wrong in the folder.
    """
    folder = Path(folder)
    config = hub.config_of(_read_json(folder / "config.json"), str(folder / "config.json"))
    weights = Weights(folder)
    if not any(hub.in_mtp_layer(config.model, name) for name in weights.headers):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, mtp_depths=0))
    model = config.model

    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    shapes = {name: leaf.shape for name, leaf in name_leaves(abstract).items()}
    pieces = list(hub.pieces(model, shapes))
    copies = {c: main for c, main in hub.copies(model).items() if c in weights.headers}
    _require_names(folder, {p.tensor for p in pieces}, weights.headers.keys() - copies)
    for piece in pieces:
        _require_fit(folder, weights.headers[piece.tensor], piece)

    arrays = _read_parameters(weights, pieces, shapes, dtype)
    for copy, main in copies.items():
        if not np.array_equal(weights[copy], weights[main]):
            raise CheckpointError(f"{folder}: {copy} is no copy of {main}, which MTP shares")
    parameters = [jnp.asarray(arrays.pop(name)) for name in shapes]
    return config, jax.tree.unflatten(jax.tree.structure(abstract), parameters)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is a single file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        hint = f"; {others[0]} is a pickle, which is never opened: convert it" if others else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX} places {name} outside the folder, in {file!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} places {name} in {file}: no safetensors file")
    return index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _open(file: Path) -> Any:
    """The open safetensors file, its header parsed and found to cover the whole file."""
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {INDEX} names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def _require_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    """Raise CheckpointError unless `found` is `wanted`, naming the first few on either side."""
    if any(name.endswith("weight_scale_inv") for name in found):
        raise CheckpointError(f"{folder} holds FP8 blocks (weight_scale_inv): {hub.QUANTIZED}")
    surplus = {name for name in found - wanted if not hub.IGNORED.fullmatch(name)}
    faults = []
    for verb, names in (("lacks", wanted - found), ("has surplus", surplus)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            faults.append(f"{verb} {len(names)} tensor{'s' * (len(names) > 1)}: {first}")
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json: it {'; it '.join(faults)}")


def _require_fit(folder: Path, header: Header, piece: hub.Piece) -> None:
    """Raise CheckpointError unless the tensor has its shape and a dtype that we read."""
    where = f"{folder}: {piece.tensor} in {header.file.name} has"
    if header.shape != piece.shape:
        raise CheckpointError(f"{where} shape {list(header.shape)}, not {list(piece.shape)}")
    if header.dtype not in DTYPES:
        reason = hub.QUANTIZED if header.dtype.startswith("F8") else f"read are {', '.join(DTYPES)}"
        raise CheckpointError(f"{where} dtype {header.dtype}: {reason}")


def _read_parameters(
    weights: Weights, pieces: list[hub.Piece], shapes: dict[str, tuple[int, ...]], dtype: Any
) -> dict[str, np.ndarray]:
    """The stacked parameters by path, filled tensor by tensor."""
    dtypes: dict[str, Any] = {}
    for piece in pieces:
        own = dtype or DTYPES[weights.headers[piece.tensor].dtype]
        own = np.float32 if piece.parameter.endswith("router.bias") else own
        dtypes[piece.parameter] = jnp.promote_types(dtypes.get(piece.parameter, own), own)
    arrays = {name: np.empty(shape, dtypes[name]) for name, shape in shapes.items()}
    for piece in pieces:
        tensor = weights[piece.tensor]
        arrays[piece.parameter][piece.index] = tensor.T if piece.transposed else tensor
    return arrays


# --- a workdir from it -------------------------------------------------------------------------


def import_checkpoint(folder: str | os.PathLike, workdir: str | os.PathLike) -> Config:
    """Make `workdir`: config.gin, tokenizer.json if there is one, and the weights as step 0.

    It is a run that has not taken a step: `eval.py` reads it. Masters and router biases are FP32.
    Raises CheckpointError where `workdir` already holds something; it appears whole or not at all.
    """
    folder, workdir = Path(folder), Path(workdir).absolute()
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise CheckpointError(f"{workdir} is not empty; an import wants a new or empty workdir")
    config, model = load(folder)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        data = dataclasses.replace(config.data, tokenizer=str(workdir / tokenizer.name))
        config = dataclasses.replace(config, data=data)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    making = workdir.with_name(f".{workdir.name}.{os.getpid()}.tmp")
    try:
        making.mkdir()
        (making / "config.gin").write_text(operative(config))
        if tokenizer.exists():
            shutil.copyfile(tokenizer, making / tokenizer.name)
        origin = {"loader": None, "sequences_read": 0, "config": operative(config)}
        store = Store(making / "checkpoints", config.checkpoint.keep, warn=print)
        store.save(0, state.from_model(config, model), origin)
        fsync_tree(making)
        making.rename(workdir)
        fsync_directory(workdir.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = _Parser(prog="python -m dsv3.checkpoint.huggingface")
    commands = parser.add_subparsers(required=True, metavar="import")
    command = commands.add_parser("import", help="make a workdir from a checkpoint of the hub")
    command.add_argument("--hf", required=True, metavar="DIR", help="config.json, *.safetensors")
    command.add_argument("--workdir", required=True, metavar="DIR", help="new, or an empty folder")
    options = parser.parse_args(arguments)
    model = import_checkpoint(options.hf, options.workdir).model
    print(
        f"{options.workdir}: {model.layers} layers, {model.dense_layers} of them dense, "
        f"{model.mtp_depths} MTP, {counts.parameters(model).total:,} parameters"
    )


if __name__ == "__main__":
    main()
