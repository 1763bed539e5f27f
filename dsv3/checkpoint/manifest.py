"""What one checkpoint step holds, to the last bit.

Orbax restores a flipped bit without a word: none of its formats hashes array data. So a step
carries a `MANIFEST`, written after everything else: its first line is the SHA-256 of what follows,
which is JSON with the format, the step, the size and SHA-256 of every file, and for every array its
dtype, shape and the SHA-256 of its logical bytes. The two layers catch different things: the files'
hashes what happened on disk, the arrays' what happened between the disk and memory.

Nothing of a manifest is parsed before its own hash is checked, and nothing is ever unpickled.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np

from dsv3.errors import CheckpointError

FORMAT = 1
NAME = "MANIFEST"
_DISK_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


class DamageError(Exception):
    """What is on disk is not what was saved; the message is the reason."""


class FilePrint(NamedTuple):
    size: int
    sha256: str


class ArrayPrint(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a step: `files` by path relative to it, `arrays` by name."""

    step: int
    files: dict[str, FilePrint]
    arrays: dict[str, ArrayPrint]

    @classmethod
    def of(cls, directory: Path, step: int, arrays: dict[str, ArrayPrint]) -> "Manifest":
        """Describe `arrays` and the files in `directory` that they were written to."""
        sizes = _sizes(directory)
        with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
            hashes = pool.map(lambda name: _hash_file(directory / name), sizes)
            files = {n: FilePrint(sizes[n], sha) for n, sha in zip(sizes, hashes, strict=True)}
        return cls(step, files, arrays)

    @classmethod
    def read(cls, directory: Path, step: int) -> "Manifest":
        """The manifest of `directory`, which must be that of `step`.

        Raises DamageError, or CheckpointError where a later format was written.
        """
        with _lost_is_damaged():
            sha256, _, body = (directory / NAME).read_bytes().partition(b"\n")
        if sha256 != hashlib.sha256(body).hexdigest().encode():
            raise DamageError(f"{NAME} does not match its own hash")
        content = json.loads(body)
        if content["format"] != FORMAT:
            found = content["format"]
            raise CheckpointError(f"{directory} has format {found}; this program reads {FORMAT}")
        if content["step"] != step:
            raise DamageError(f"it holds step {content['step']}")
        files = {name: FilePrint(*entry) for name, entry in content["files"].items()}
        arrays = {
            name: ArrayPrint(dtype, tuple(shape), sha256)
            for name, (dtype, shape, sha256) in content["arrays"].items()
        }
        return cls(step, files, arrays)

    def write(self, directory: Path) -> None:
        content = {"format": FORMAT, "step": self.step, "files": self.files, "arrays": self.arrays}
        body = json.dumps(content, indent=1).encode()
        sha256 = hashlib.sha256(body).hexdigest().encode()
        (directory / NAME).write_bytes(sha256 + b"\n" + body)

    def check_files(self, directory: Path) -> None:
        """Raise DamageError unless `directory` holds exactly these files with these contents."""
        with _lost_is_damaged():
            sizes = _sizes(directory)
            if absent := sorted(self.files.keys() - sizes.keys()):
                raise DamageError(f"{absent[0]} is missing")
            if surplus := sorted(sizes.keys() - self.files.keys()):
                raise DamageError(f"{surplus[0]} does not belong to it")
            for name, size in sizes.items():
                if size != self.files[name].size:
                    raise DamageError(f"{name} has {size} bytes instead of {self.files[name].size}")
            with ThreadPoolExecutor() as pool:
                hashes = pool.map(lambda name: _hash_file(directory / name), sizes)
                for name, sha256 in zip(sizes, hashes, strict=True):
                    if sha256 != self.files[name].sha256:
                        raise DamageError(f"{name} does not match its hash")

    def check_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise DamageError unless these are, bit for bit, the arrays that were saved."""
        if arrays.keys() != self.arrays.keys():
            raise DamageError(f"its arrays are not those that {NAME} names")
        with ThreadPoolExecutor() as pool:
            for name, found in zip(arrays, pool.map(fingerprint, arrays.values()), strict=True):
                if found != self.arrays[name]:
                    raise DamageError(f"the array {name} does not match its fingerprint")

    def read_file(self, directory: Path, name: str) -> bytes:
        """The verified content of one small file."""
        with _lost_is_damaged():
            content = (directory / name).read_bytes()
        if name not in self.files or hashlib.sha256(content).hexdigest() != self.files[name].sha256:
            raise DamageError(f"{name} does not match its hash")
        return content

    def difference(self, wanted: Mapping[str, Any]) -> str:
        """Where names, dtypes and shapes differ from the leaves `wanted`; '' where they fit."""
        saved = {name: _typed(entry) for name, entry in self.arrays.items()}
        here = {name: _typed(leaf) for name, leaf in wanted.items()}
        differing = [n for n in [*saved, *(here.keys() - saved)] if saved.get(n) != here.get(n)]
        shown = [
            f"{n} is {saved.get(n, 'absent')} in it and {here.get(n, 'absent')} here"
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


def fingerprint(array: np.ndarray) -> ArrayPrint:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return ArrayPrint(array.dtype.name, array.shape, hashlib.sha256(data).hexdigest())


def _escape(key: str) -> str:
    return quote(key, safe="").replace(".", "%2E") or "%"


def _typed(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _sizes(directory: Path) -> dict[str, int]:
    """Size of everything below `directory` that is no directory, but for the manifest."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            found[path.relative_to(directory).as_posix()] = path.lstat().st_size
    found.pop(NAME, None)
    return dict(sorted(found.items()))


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
