"""What one checkpoint step holds, to the last bit.

Orbax restores a flipped bit without a word: none of its formats hashes array data. So a step
carries a `MANIFEST`, written after everything else: its first line is the SHA-256 of what follows,
which is JSON with the format, the step, the size and SHA-256 of every file, and for every array its
dtype, its shape, how it is cut into chunks, and the fingerprint of each. The two layers catch
different things: the files' hashes what happened on disk, the arrays' what happened between the
disk and memory, also where a process reads only what it needs. The fingerprint of an array is the
sum of its chunks' and says what it holds, however it was cut.

Where several processes save, each writes a part, `MANIFEST.<process>`, of what it wrote itself; the
first process joins them, finds every chunk written once, and removes the parts.

Nothing of a manifest is parsed before its own hash is checked, and nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np

from dsv3.checkpoint.pieces import Grid, Index
from dsv3.errors import CheckpointError

FORMAT = 2
NAME = "MANIFEST"
_DISK_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


class DamageError(Exception):
    """What is on disk is not what was saved; the message is the reason."""


class FilePrint(NamedTuple):
    size: int
    sha256: str


class ArrayPrint(NamedTuple):
    """An array by its chunks, those of one process or all: their fingerprints by number."""

    dtype: str
    shape: Index
    chunk: Index
    sums: dict[int, int]

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.chunk)

    @property
    def content(self) -> tuple[str, Index, int]:
        """The same for arrays that are the same bit for bit, however they were cut."""
        return self.dtype, self.shape, sum(self.sums.values()) % (1 << 64)


@dataclass(frozen=True)
class Manifest:
    """The contents of a step: `files` by path relative to it, `arrays` by name."""

    step: int
    files: dict[str, FilePrint]
    arrays: dict[str, ArrayPrint]

    @classmethod
    def of(
        cls, directory: Path, step: int, arrays: dict[str, ArrayPrint], below: str = "",
        known: Mapping[str, FilePrint] | None = None,
    ) -> "Manifest":  # fmt: skip
        """Describe `arrays` and the files in `directory`, those in `known` as it says.

        below: the folder in it of whose files alone it is.
        """
        files = dict(known or {})
        sizes = {n: size for n, size in _sizes(directory, below).items() if n not in files}
        for name, sha256 in zip(sizes, hash_files(directory, sizes), strict=True):
            files[name] = FilePrint(sizes[name], sha256)
        return cls(step, files, arrays)

    @classmethod
    def read(cls, directory: Path, step: int, part: int | None = None) -> "Manifest":
        """The manifest of `directory`, which must be that of `step`; or a process's part of it.

        Raises DamageError, or CheckpointError where another format was written.
        """
        name = _part(part)
        with _lost_is_damaged():
            sha256, _, body = (directory / name).read_bytes().partition(b"\n")
        if sha256 != hashlib.sha256(body).hexdigest().encode():
            raise DamageError(f"{name} does not match its own hash")
        content = json.loads(body)
        if content["format"] != FORMAT:
            found = content["format"]
            raise CheckpointError(f"{directory} has format {found}; this program reads {FORMAT}")
        if content["step"] != step:
            raise DamageError(f"it holds step {content['step']}")
        files = {name: FilePrint(*entry) for name, entry in content["files"].items()}
        arrays = {
            name: ArrayPrint(
                dtype, tuple(shape), tuple(chunk), {int(n): int(s, 16) for n, s in sums.items()}
            )
            for name, (dtype, shape, chunk, sums) in content["arrays"].items()
        }
        return cls(step, files, arrays)

    def write(self, directory: Path, part: int | None = None) -> None:
        arrays = {
            name: [a.dtype, a.shape, a.chunk, {n: f"{s:016x}" for n, s in sorted(a.sums.items())}]
            for name, a in self.arrays.items()
        }
        content = {"format": FORMAT, "step": self.step, "files": self.files, "arrays": arrays}
        body = json.dumps(content, indent=1).encode()
        sha256 = hashlib.sha256(body).hexdigest().encode()
        (directory / _part(part)).write_bytes(sha256 + b"\n" + body)

    @classmethod
    def join(cls, directory: Path, step: int, processes: int) -> "Manifest":
        """The manifest of a step from the parts of all processes, which go."""
        files: dict[str, FilePrint] = {}
        arrays: dict[str, ArrayPrint] = {}
        for process in range(processes):
            if not (directory / _part(process)).exists():
                raise DamageError(f"process {process} wrote nothing here: all need the same disk")
            part = cls.read(directory, step, process)
            (directory / _part(process)).unlink()
            files |= part.files
            for name, array in part.arrays.items():
                before = arrays.setdefault(name, array)
                if array is not before and before.sums.keys() & array.sums.keys():
                    raise ValueError(f"two processes wrote the same of {name}")
                if array is not before and array.sums:
                    arrays[name] = array._replace(sums=before.sums | array.sums)
        for name, array in arrays.items():
            if len(array.sums) != array.grid.size:
                raise ValueError(
                    f"{len(array.sums)} of {array.grid.size} chunks of {name} are there"
                )
        return cls.of(directory, step, arrays, known=files)

    def check_files(
        self, directory: Path, hashed: Callable[[int, int], bool] | None = None
    ) -> None:
        """Raise DamageError unless `directory` holds exactly these files with these contents.

        `hashed(number, size)` says of which files the contents are looked at; of all without it.
        """
        with _lost_is_damaged():
            sizes = _sizes(directory)
            if absent := sorted(self.files.keys() - sizes.keys()):
                raise DamageError(f"{absent[0]} is missing")
            if surplus := sorted(sizes.keys() - self.files.keys()):
                raise DamageError(f"{surplus[0]} does not belong to it")
            for name, size in sizes.items():
                if size != self.files[name].size:
                    raise DamageError(f"{name} has {size} bytes instead of {self.files[name].size}")
            names = [n for i, n in enumerate(sizes) if hashed is None or hashed(i, sizes[n])]
            for name, sha256 in zip(names, hash_files(directory, names), strict=True):
                if sha256 != self.files[name].sha256:
                    raise DamageError(f"{name} does not match its hash")

    def read_file(self, directory: Path, name: str) -> bytes:
        """The verified content of one small file."""
        with _lost_is_damaged():
            content = (directory / name).read_bytes()
        if name not in self.files or hashlib.sha256(content).hexdigest() != self.files[name].sha256:
            raise DamageError(f"{name} does not match its hash")
        return content


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where names, dtypes and shapes of what was saved differ from `wanted`; '' where they fit."""
    there, here = ({name: _typed(leaf) for name, leaf in of.items()} for of in (saved, wanted))
    differing = [n for n in [*there, *(here.keys() - there)] if there.get(n) != here.get(n)]
    shown = [
        f"{n} is {there.get(n, 'absent')} in it and {here.get(n, 'absent')} here"
        for n in sorted(differing)[:3]
    ]
    more = [f"{len(differing) - 3} more"] if len(differing) > 3 else []
    return "; ".join(shown + more)


def name_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in flattening order: `model.blocks.attention.q_a.w`, `opt.0.count`.

    Names come from the path alone, so a checkpoint knows no Python class. An `nnx.Variable` shows
    as a last `.value`, which is dropped; characters other than letters, digits, `_`, `-` and `~`
    are percent-escaped, so two leaves never share a name.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        name = ".".join(_escape(jax.tree_util.keystr((key,), simple=True)) for key in path)
        if name in leaves:
            raise ValueError(f"two leaves are named {name!r}")
        leaves[name] = leaf
    return leaves


def _escape(key: str) -> str:
    return quote(key, safe="").replace(".", "%2E") or "%"


def _typed(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _sizes(directory: Path, below: str = "") -> dict[str, int]:
    """Size of everything in `directory`/`below` that is no directory, but for the manifest."""
    found = {}
    for folder, _, names in os.walk(directory / below):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(directory).as_posix()] = path.lstat().st_size
    found.pop(NAME, None)
    return dict(sorted(found.items()))


def _part(process: int | None) -> str:
    return NAME if process is None else f"{NAME}.{process}"


def hash_files(directory: Path, names: Collection[str]) -> Iterator[str]:
    """The SHA-256 of files in `directory`, in their order."""
    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        yield from pool.map(lambda name: _hash_file(directory / name), names)


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lost_is_damaged() -> Iterator[None]:
    """A file that is gone or cannot be read back is damage; a refused permission is not."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_LOST:
            raise
        raise DamageError(f"{Path(error.filename).name}: {error.strerror}") from error
