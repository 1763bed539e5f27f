"""The golden checkpoints of the hub, their tensors by both names, and what harms a folder."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3.checkpoint import hub, huggingface
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.safetensors_file import (
    DTYPES,
    METADATA,
    Entry,
    Tensor,
    bytes_of,
    file_bytes,
    read_header,
)
from dsv3.checkpoint.weights import INDEX, SINGLE
from dsv3.config import Model
from dsv3.errors import CheckpointError
from dsv3.model.transformer import Transformer

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem != "fp8")


def golden(case: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{case}.npz"))


def save(file: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a new file, as exports do."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries = {name: Entry(names[array.dtype], array.shape) for name, array in tensors.items()}
    with open(file, "xb") as opened:
        for part in file_bytes(entries, metadata, tensors.values()):
            opened.write(bytes_of(part))


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as its files have them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= read_header(file)
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    """Names, dtypes, shapes and every bit."""
    a, b = stored(one), stored(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].read().tobytes() == b[name].read().tobytes(), name


def in_hub_layout(model: Model, leaves: dict) -> dict[str, np.ndarray]:
    """The tables in the other direction: tensors of the hub from arrays of the model."""
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    tensors = {}
    for piece in hub.pieces(model, {name: array.shape for name, array in arrays.items()}):
        part = arrays[piece.parameter][piece.index]
        tensors[piece.tensor] = part.T if piece.transposed else part
    return tensors


def pieces_of(model: Model) -> list[hub.Piece]:
    """Every tensor of a model, without its copies."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    shapes = {name: leaf.shape for name, leaf in name_leaves(abstract).items()}
    return list(hub.pieces(model, shapes))


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def rewrite(folder: Path, edit) -> None:
    """Put all tensors, after `edit` of the dictionary, into a single file."""
    tensors = {name: tensor.read() for name, tensor in stored(folder).items()}
    edit(tensors)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    save(folder / SINGLE, tensors, METADATA)


def edit_index(folder: Path, name: str, file: object) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        huggingface.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)
