"""A workdir from a checkpoint of the hub, tensor by tensor.

A tensor goes from its file into the workdir while the next one is read and converted, so the peak
is a few tensors and not the model. The workdir holds the weights alone, as step 0, in FP32; moments
and average begin when training does (`trained.restore`).

Weights in FP8 also leave their scales there, in `scales.safetensors`. An export could not find them
again: of dequantised values amax / 448 is another FP32 number than the scale for one block in ten,
and for every block of a quantiser that clamped amax, rounded the scale or remembered an older one.
Divided by the scale that it had, a weight that did not change gives its E4M3 number again. There is
a SHA-256 beside them, for an export to find whether they are as they were left.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3.bindings import operative
from dsv3.checkpoint import beside, hub
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.safetensors_file import Contents, Entry, Writer, read_header
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.weights import Weights
from dsv3.config import Config
from dsv3.errors import CheckpointError
from dsv3.files import appearing
from dsv3.training import state

SCALES = "scales.safetensors"
SUM = f"{SCALES}.sha256"  # as sha256sum writes it
Progress = Callable[[str, int, int | None], None]  # what, done, in all


@dataclass(frozen=True)
class Streamed:
    """An FP32 parameter for `Store.save`, read piece by piece while it is written."""

    folder: Folder
    name: str
    done: Callable[[int], None]  # told the bytes of every tensor read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.folder.shapes[self.name]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def pieces(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """(index on the leading axes, array there); behind the first, one is read ahead."""
        first, *others = self.folder.pieces[self.name]
        yield first.index, self._read(first)
        self.done(self.folder.weights.headers[first.tensor].nbytes)
        with ThreadPoolExecutor(1) as ahead:
            coming = [ahead.submit(self._read, piece) for piece in others[:1]]
            for i, piece in enumerate(others):
                coming += [ahead.submit(self._read, p) for p in others[i + 1 : i + 2]]
                yield piece.index, coming.pop(0).result()
                self.done(self.folder.weights.headers[piece.tensor].nbytes)

    def _read(self, piece: hub.Piece) -> np.ndarray:
        return self.folder.read_piece(piece, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        for index, piece in self.pieces():
            out[index] = piece
        return out


def import_checkpoint(
    folder: str | os.PathLike, workdir: str | os.PathLike, progress: Progress | None = None
) -> Config:
    """Make `workdir`: config.gin, the tokenizer's files if there are any, and weights as step 0.

    It is a run that has not taken a step: `eval.py` reads it, `train.py` goes on from it. Masters
    and router biases are FP32. Raises CheckpointError where `workdir` already holds something; it
    appears whole or not at all, and an import that was interrupted begins anew.
    """
    folder, workdir = Path(folder), Path(workdir).absolute()
    found = Folder(folder)
    config = found.config
    if (folder / "tokenizer.json").exists():
        data = dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer.json"))
        config = dataclasses.replace(config, data=data)
    with new_folder(workdir) as making:
        (making / "config.gin").write_text(operative(config))
        beside.copy(folder, making)
        beside.keep_ids(found.ids, making)
        _keep_scales(found.weights, making / SCALES)
        origin = {"loader": None, "sequences_read": 0, "config": operative(config)}
        store = Store(making / "checkpoints", config.checkpoint.keep, warn=print)
        store.save(0, _streamed(found, progress), origin)
    return config


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`appearing`, for a folder that is new or empty; errors name it, not what is being made.

    Raises CheckpointError for anything else that is there, and where it cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is no folder; wanted is the name of a new or empty one")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; wanted is a new or empty folder")
    hidden = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    try:
        with appearing(folder) as making:
            yield making
    except (CheckpointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or folder}: {error.strerror or error}"
        raise CheckpointError(hidden.sub(lambda _: folder.name, message)) from error


def _streamed(found: Folder, progress: Progress | None) -> state.Weights:
    """The parameters, each to be read when it is saved."""
    headers, read = found.weights.headers, 0
    total = sum(headers[p.tensor].nbytes for pieces in found.pieces.values() for p in pieces)

    def done(size: int) -> None:
        nonlocal read
        read += size
        if progress is not None:
            progress("importing weights", read, total)

    weights = state.abstract_weights(found.config)
    leaves = [Streamed(found, name.partition(".")[2], done) for name in name_leaves(weights)]
    return jax.tree.unflatten(jax.tree.structure(weights), leaves)


def _keep_scales(weights: Weights, file: Path) -> None:
    """Write the scales of all weights in FP8, and the quantization_config; no file without any."""
    if weights.quantization is None or not weights.scales:
        return
    entries = {n: Entry(tensor.dtype, tensor.shape) for n, tensor in weights.scales.items()}
    said = {"quantization_config": json.dumps(weights.quantization.fields)}
    with Writer(file, entries, said) as writer:
        for name in entries:
            writer.write(weights.read_scales(name))
    file.with_name(SUM).write_text(_sum_of(file))


def read_kept_scales(workdir: Path) -> Contents | None:
    """What `_keep_scales` left in a workdir, if anything. CheckpointError unless it is all that."""
    file, beside = workdir / SCALES, workdir / SUM
    if not file.exists() and not beside.exists():
        return None
    try:
        if beside.read_bytes() != _sum_of(file).encode():
            raise CheckpointError(f"{file} is damaged: it does not match {SUM}")
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    return read_header(file)


def _sum_of(file: Path) -> str:
    with open(file, "rb") as opened:
        return f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n"
