"""The tensors of a folder in the hub's layout, checked on their headers and read into place.

    W = E4M3 · scale        a scale for every block, 128 x 128 in the released files, FP32

A weight in FP8 has `<weight>_scale_inv` beside it, [ceil(outputs / 128), ceil(inputs / 128)], the
multiplier despite its name; blocks at the edge are partial (576 rows have 5 rows of scales). The
product has up to 28 significant bits, so it is rounded once, to FP32: divided by the same scale it
gives the same E4M3 number again, which BF16 would not.

Tensors are read in chunks of rows, each converted and turned straight into its place, on a few
threads: beside what is filled, memory holds a few chunks. Pickles (.bin, .pt) are refused without
being opened: they run code.
"""

import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3.checkpoint import hub
from dsv3.checkpoint.hub_config import Quantization
from dsv3.checkpoint.safetensors_file import DTYPES, Tensor, read_header
from dsv3.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FP8 = "F8_E4M3"
CHUNK_BYTES = 1 << 22  # as stored, at most, but for one row
TILE = 128  # columns converted at once, of at most 4 as many rows: small enough for the cache
FP32 = np.finfo(np.float32)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Target(NamedTuple):
    """`out[...] = tensor[rows, columns]`, converted to the dtype of `out`."""

    tensor: str
    out: np.ndarray  # as the hub stores it, [outputs, inputs]: a view, where ours is the other way
    rows: slice = slice(None)
    columns: slice = slice(None)


class Weights:
    """The tensors of `folder`: `headers` by name without the scales, which are `scales` by weight.

    `quantization` is what config.json announces, `nbytes` the size of all files; `identity`, JSON,
    says of each where it is and when it changed. Raises CheckpointError where there are no weights,
    only pickles, a damaged file, or an index that names a file outside the folder or a tensor that
    its file does not hold; and where a weight in FP8 has no scales, or scales have no such weight.
    """

    def __init__(self, folder: Path, quantization: Quantization | None):
        self.folder = folder
        self.quantization = quantization
        self.nbytes = 0
        self.identity: dict[str, tuple] = {}
        self._pool = ThreadPoolExecutor()
        index = _read_index(folder)
        self.indexed = bool(index)
        found: dict[str, Tensor] = {}
        for file in sorted(set(index.values())) or [SINGLE]:
            path = inside(folder, file)
            self.identity[file] = _identity(path)
            tensors = read_header(path)
            self.nbytes += path.stat().st_size
            for name, tensor in tensors.items():
                if name in found:
                    files = f"{found[name].file.name} and in {file}"
                    raise CheckpointError(f"{folder}: {name} stands in {files}")
                found[name] = tensor
        for name, file in index.items():
            if name not in found or found[name].file.name != file:
                raise CheckpointError(f"{folder / INDEX} places {name} in {file}, which lacks it")
        self._tensors = found
        self.headers = {n: t for n, t in found.items() if not n.endswith(hub.SCALES)}
        self.scales = {
            n.removesuffix(hub.SCALES): t for n, t in found.items() if n.endswith(hub.SCALES)
        }
        self._check_scales()

    def _check_scales(self) -> None:
        quantized = {name for name, tensor in self.headers.items() if tensor.dtype == FP8}
        if quantized and self.quantization is None:
            first = min(quantized)
            raise CheckpointError(
                f"{self.folder}: {first} is in FP8, but config.json has no quantization_config"
            )
        for names, fault in (
            (quantized - self.scales.keys(), "is in FP8 without its scales"),
            (self.scales.keys() - quantized, "has scales, but is no tensor in FP8"),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise CheckpointError(
                    f"{self.folder}: {min(names)} {fault}, {hub.scale_of(min(names))}{more}"
                )
        for name in sorted(quantized):
            tensor, scales = self.headers[name], self.scales[name]
            if len(tensor.shape) != 2:
                raise CheckpointError(f"{self.folder}: {name} is in FP8, but no matrix")
            wanted = self._grid(tensor.shape)
            if scales.shape != wanted or scales.dtype != "F32":
                raise CheckpointError(
                    f"{self.folder}: {hub.scale_of(name)} in {scales.file.name} is {scales.dtype} "
                    f"{list(scales.shape)}, not F32 {list(wanted)}"
                )

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        assert self.quantization is not None  # or no tensor is in FP8
        return tuple(-(-n // b) for n, b in zip(shape, self.quantization.block, strict=True))

    def read_scales(self, name: str) -> np.ndarray:
        """The FP32 scales of a weight in FP8; CheckpointError unless all are positive,
        neither subnormal nor so large that 448 times it is no FP32 number."""
        scales = self.scales[name].read()
        self._require_numbers(hub.scale_of(name), scales)
        return scales

    def stored(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, or of scales by their own name, in chunks. Raises CheckpointError
        for NaN in FP8, for scales that are not usable and for what cannot be read."""
        tensor = self._tensors[name]
        for start in range(0, tensor.nbytes, CHUNK_BYTES):
            part = tensor.read_bytes(start, min(start + CHUNK_BYTES, tensor.nbytes))
            if name.endswith(hub.SCALES):
                self._require_numbers(name, part.view(np.float32))
            elif tensor.dtype == FP8:
                self._require_numbers(name, part)
            yield part

    def files(self) -> dict[str, Iterator[np.ndarray]]:
        """Every file of weights by name, as its bytes in chunks, checked as those of `stored`."""
        names: dict[Path, list[str]] = {}
        for name in sorted(self._tensors, key=lambda name: self._tensors[name].begin):
            names.setdefault(self._tensors[name].file, []).append(name)
        return {file.name: self._file(within) for file, within in sorted(names.items())}

    def _file(self, names: list[str]) -> Iterator[np.ndarray]:
        first = self._tensors[names[0]]
        yield first.read_bytes(-first.begin, 0)
        for name in names:
            yield from self.stored(name)
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Raise CheckpointError where a file is another than the one whose header was read."""
        for file, identity in self.identity.items():
            if _identity(self.folder / file) != identity:
                raise CheckpointError(f"{self.folder / file} changed while it was read")

    def _require_numbers(self, name: str, part: np.ndarray) -> None:
        """CheckpointError unless these scales, or codes of E4M3, are what may be multiplied."""
        file = self._tensors[name].file
        if part.dtype == np.uint8:
            if np.any((part & 0x7F) == 0x7F):
                raise CheckpointError(f"{file}: {name} holds NaN")
        elif not np.all(usable(part)):
            wrong = part[~usable(part)][0]
            fault = "no usable scale" if 0 < wrong < np.inf else "no positive number"
            raise CheckpointError(f"{file}: {name} holds {wrong}, {fault}")

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, FP8 dequantised to FP32, others as they are stored."""
        tensor = self.headers[name]
        out = np.empty(tensor.shape, np.float32 if tensor.dtype == FP8 else DTYPES[tensor.dtype])
        self.read_into([Target(name, out)])
        return out

    def read_into(self, targets: Iterable[Target]) -> None:
        """Fill every target. Raises CheckpointError for NaN in FP8 and for what cannot be read."""
        for _ in self._pool.map(self._fill, (c for t in targets for c in self._chunks(t))):
            pass

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; compared in chunks."""
        shape = self.headers[one].shape
        if shape != self.headers[other].shape:
            return False
        step = max(CHUNK_BYTES // max(math.prod(shape[1:]), 1), 1)
        for begin in range(0, shape[0], step):
            rows = slice(begin, min(begin + step, shape[0]))
            parts = np.empty((2, rows.stop - begin, *shape[1:]), np.float32)
            self.read_into([Target(one, parts[0], rows), Target(other, parts[1], rows)])
            if not np.array_equal(parts[0], parts[1]):
                return False
        return True

    def _chunks(self, target: Target) -> Iterator[Target]:
        """The target in parts that are read at once, each with its rows in numbers."""
        tensor = self.headers[target.tensor]
        if not tensor.shape:
            yield target
            return
        start, stop, _ = target.rows.indices(tensor.shape[0])
        row = max(tensor.nbytes // max(tensor.shape[0], 1), 1)
        step = max(CHUNK_BYTES // row, 1)
        if len(tensor.shape) > 1:
            step = min(step, 4 * TILE)
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            part = target.out[begin - start : end - start]
            yield Target(target.tensor, part, slice(begin, end), target.columns)

    def _fill(self, chunk: Target) -> None:
        tensor = self.headers[chunk.tensor]
        stored = tensor.read(chunk.rows)
        if tensor.dtype == FP8:
            self._fill_dequantised(chunk, stored)
        elif stored.ndim == 2:
            stored = stored[:, chunk.columns]
            for begin in range(0, stored.shape[1], TILE):
                tile = slice(begin, begin + TILE)
                chunk.out[:, tile] = _widened(stored[:, tile], chunk.out.dtype)
        else:
            chunk.out[...] = _widened(stored, chunk.out.dtype)

    def _fill_dequantised(self, chunk: Target, stored: np.ndarray) -> None:
        assert self.quantization is not None
        code = stored.view(np.uint8)
        self._require_numbers(chunk.tensor, code)
        rows, columns = self.quantization.block
        scales = self.read_scales(chunk.tensor)
        of_row = scales[np.arange(chunk.rows.start, chunk.rows.stop) // rows]
        start, stop, _ = chunk.columns.indices(code.shape[1])
        for block in range(start // columns, -(-stop // columns)):
            begin, end = max(block * columns, start), min((block + 1) * columns, stop)
            values = np.take(_E4M3, code[:, begin:end].T, mode="clip").T
            np.multiply(
                values, of_row[:, block, None], out=chunk.out[:, begin - start : end - start],
                casting="same_kind",
            )  # fmt: skip


def _identity(path: Path) -> tuple:
    """What no other file has, nor the same one with another content; None of one that is gone."""
    try:
        now = path.stat()
    except OSError:
        return (None,)
    where = str(path.resolve()), now.st_dev, now.st_ino
    return *where, now.st_size, now.st_mtime_ns, now.st_ctime_ns


def usable(scales: np.ndarray) -> np.ndarray:
    """Where E4M3 · scale and its division by the scale are exact in FP32."""
    return (scales >= FP32.tiny) & (scales <= FP32.max / 448)


def _widened(stored: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`stored`, in FP32 where it is BF16 and that is wanted: 20 times the speed of the cast."""
    if stored.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        return (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored


# --- finding the files -------------------------------------------------------------------------


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is a single file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        hint = f"; {others[0]} is a pickle, which is never opened: convert it" if others else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    for name, file in index.items():
        if not f"{name}{file}".isprintable():
            raise CheckpointError(
                f"{folder / INDEX} places {name[:60]!a} in {ascii(file)[:60]}: no printable name"
            )
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX} places {name} outside the folder, in {file!r}")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} places {name} in {file}: no safetensors file")
    return index


def inside(folder: Path, file: str) -> Path:
    """The file's path; CheckpointError where a link leads out of the folder, or to no file.

    A snapshot in the hub's cache is a folder of links into the `blobs` two levels above it.
    """
    path = folder / file
    try:
        home, target, odd = folder.resolve(), path.resolve(), _is_odd(path)
    except (ValueError, RuntimeError):  # a NUL, half a character, a link to itself
        raise CheckpointError(f"{str(path)!r} is no name of a file") from None
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(f"{path} is a link that leads outside the folder")
    if odd:
        raise CheckpointError(f"{path} is no regular file")
    return path


def _is_odd(path: Path) -> bool:
    """Whether it is something that to open could wait for ever, or never end."""
    return path.exists() and not path.is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError naming the file for anything else."""
    inside(path.parent, path.name)
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number
