"""safetensors files, read and written piece by piece.

    8 bytes      length of the header, little-endian
    header       JSON: name -> {dtype, shape, data_offsets: [begin, end] behind the header}
    bytes        of every tensor, row by row, without a gap or an overlap

The library maps a file, or wants all tensors of a new one at once. Here a part of a tensor is read
by its position, so that memory holds that part alone and a file cut short underneath is an error
and no signal, and a file is written tensor by tensor. Nothing of a header is trusted before it was
found to describe exactly the bytes that are there.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsv3.errors import CheckpointError

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
OTHER_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4,
    "U32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | OTHER_BYTES
LONGEST_HEADER = 100_000_000  # the library's limit
METADATA = {"format": "pt"}  # transformers insists on it


class Tensor(NamedTuple):
    """Where a tensor is and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: F32, BF16, ...
    begin: int  # of its bytes in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor as stored, or `rows` of its first dimension."""
        dtype = DTYPES[self.dtype]
        start, stop, _ = rows.indices(self.shape[0]) if self.shape else (0, 1, 1)
        rest = self.shape[1:]
        shape = (stop - start, *rest) if self.shape else ()
        row = math.prod(rest) * dtype.itemsize
        return self.read_bytes(start * row, stop * row).view(dtype).reshape(shape)

    def read_bytes(self, start: int, stop: int) -> np.ndarray:
        """Bytes `start` to `stop` of it, uint8."""
        try:
            content = np.fromfile(self.file, np.uint8, stop - start, offset=self.begin + start)
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror}") from error
        if content.size != stop - start:
            raise CheckpointError(f"{self.file} became shorter while it was read")
        return content


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of `file`. Raises CheckpointError where it is missing, damaged or another kind of
    file: tensors have to tile it exactly."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise _damaged(file, f"{size} bytes cannot hold a header of {length}")
            header = json.loads(opened.read(length), object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not sound: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(file, 8 + length, name, entry) for name, entry in header.items()}
    _require_tiling(file, tensors, 8 + length, size)
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        times = Counter(name for name, _ in pairs)
        raise ValueError(f"{times.most_common(1)[0][0]!r} stands there twice")
    return found


def _entry(file: Path, data: int, name: str, entry: Any) -> Tensor:
    if not name.isprintable():
        raise _damaged(file, f"a tensor is named {name[:60]!a}")
    try:
        dtype, shape, (begin, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        whole = [begin, end, *shape]
    except (KeyError, TypeError, ValueError):
        raise _damaged(file, f"{name} lacks dtype, shape or data_offsets") from None
    counted = all(type(n) is int and n >= 0 for n in whole)
    if not counted or not isinstance(dtype, str) or dtype not in BYTES:
        raise _damaged(file, f"{name} is {dtype!r} {shape} at {begin} to {end}")
    tensor = Tensor(file, tuple(shape), dtype, data + begin)
    if tensor.nbytes != end - begin:
        raise _damaged(file, f"{name}, {dtype} {shape}, is said to take {end - begin} bytes")
    return tensor


def _require_tiling(file: Path, tensors: Mapping[str, Tensor], data: int, size: int) -> None:
    expected, before = data, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if tensor.begin != expected:
            fault = "overlaps" if tensor.begin < expected else "leaves a gap behind"
            raise _damaged(file, f"{name} {fault} {before}")
        expected, before = tensor.begin + tensor.nbytes, name
    if expected != size:
        raise _damaged(file, f"it has {size} bytes, its header describes {expected}")


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged or no safetensors file: {reason}")


class Entry(NamedTuple):
    """A tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def file_bytes(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], parts: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """A file for `entries`: its header, then `parts`, of any size, which are their bytes in order.

    Raises ValueError where these are not as many as the entries announce.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    yield np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    written = 0
    for part in parts:
        written += part.nbytes
        yield part
    if written != end:
        raise ValueError(f"{written} bytes written, {end} announced")


def bytes_of(array: np.ndarray) -> memoryview:
    """Its elements in order, to be written."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
