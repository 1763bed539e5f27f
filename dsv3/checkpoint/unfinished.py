"""A folder of large files that is made in one go or, where that is interrupted, in several.

    .NAME.part/        beside NAME, while it is made
        LEDGER         what it is made of, then size, SHA-256 and name of each finished file
        NAME/          becomes NAME when all is there and on the disk

NAME appears whole or not at all. An error leaves nothing. An interruption, a kill -9 too, leaves
the finished files: whoever then makes the same of the same things hashes them and keeps what is
sound, so one file is lost at most. Everything else begins anew.

The ledger needs no fsync: what it says is believed only of files that have that hash. Who is at
work holds a lock on it, which the system drops when the process dies.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from dsv3.checkpoint.manifest import FilePrint, hash_files
from dsv3.checkpoint.safetensors_file import bytes_of
from dsv3.errors import CheckpointError
from dsv3.files import fsync_directory, fsync_tree, locked

LEDGER = "LEDGER"
Progress = Callable[[str, int, int | None], None]  # what, done, in all


@dataclass
class Unfinished:
    """The folder `path`, of about `size` bytes, while it is made; `done` has its finished files, by
    path below it."""

    path: Path
    size: int
    progress: Progress
    ledger: IO[str]
    done: dict[str, FilePrint] = field(default_factory=dict)

    def write(self, what: str, files: Mapping[str, Iterator[np.ndarray]]) -> dict[str, FilePrint]:
        """Write `files`, given by path as their bytes in arrays of any kind; size and hash of each.

        Nothing is taken from the iterators of those that are done. While an array is hashed and
        written, the next is made. Progress is that of `what`.
        """
        there = sum(self.done[name].size for name in files if name in self.done)
        with ThreadPoolExecutor(2) as pool:
            for name in [name for name in files if name not in self.done]:
                chunks, digest, size = files[name], hashlib.sha256(), 0
                with open(self.path / name, "xb") as file:
                    coming = pool.submit(next, chunks, None)
                    while (chunk := coming.result()) is not None:
                        coming = pool.submit(next, chunks, None)
                        content = bytes_of(chunk)
                        hashing = pool.submit(digest.update, content)
                        file.write(content)
                        hashing.result()
                        size += content.nbytes
                        self.progress(what, there + size, self.size)
                self.done[name] = FilePrint(size, digest.hexdigest())
                self.ledger.write(f"{size} {digest.hexdigest()} {name}\n")
                self.ledger.flush()
                there += size
        return {name: self.done[name] for name in files}


@contextmanager
def unfinished(
    folder: Path, size: int, made_of: object = None, progress: Progress | None = None
) -> Iterator[Unfinished]:
    """The making of `folder`, which is new or empty and there when the block ends.

    `made_of`, which is JSON, is all that its files depend on; None is what cannot be named, so that
    nobody goes on with it. Raises CheckpointError for anything else that is there, where another
    process makes the same folder, where it cannot be written, and where the disk has no room for
    `size` bytes. Errors name `folder`, not the hidden one.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is no folder; wanted is the name of a new or empty one")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; wanted is a new or empty folder")
    part = folder.with_name(f".{folder.name}.part")
    if os.path.lexists(part) and not _is_ours(part):
        raise CheckpointError(f"{part} is in the way, and of no interrupted command: move it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir(exist_ok=True)
        with _held(part, folder) as ledger:
            making = Unfinished(part / folder.name, size, progress or _silent, ledger)
            with _cleared(part, lambda: made_of is not None and bool(making.done)):
                _go_on(making, made_of)
                left = size - sum(file.size for file in making.done.values())
                if shutil.disk_usage(part).free < left:
                    megabytes = -(-left // 10**6)
                    raise CheckpointError(f"{folder.parent} has no room for {megabytes:,} MB")
                yield making
                fsync_tree(making.path)
                making.path.rename(folder)
                fsync_directory(folder.parent)
    except (CheckpointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or folder}: {error.strerror or error}"
        for hidden in (f"{part.name}/{folder.name}", part.name):
            message = message.replace(hidden, folder.name)
        raise CheckpointError(message) from error


@contextmanager
def _cleared(part: Path, worth_keeping: Callable[[], bool]) -> Iterator[None]:
    """Remove `part` at the end, but for an interruption that left something `worth_keeping`."""
    keep = False
    try:
        yield
    except KeyboardInterrupt:
        if keep := worth_keeping():
            raise KeyboardInterrupt("the same command goes on") from None
        raise
    finally:
        if not keep:
            shutil.rmtree(part, ignore_errors=True)


def _is_ours(part: Path) -> bool:
    """Whether an interrupted command left it, at whatever moment."""
    return (part / LEDGER).is_file() or (part.is_dir() and not any(part.iterdir()))


@contextmanager
def _held(part: Path, folder: Path) -> Iterator[IO[str]]:
    """The ledger, locked, at its end; CheckpointError where another process has it."""
    with open(part / LEDGER, "a+", encoding="utf-8", errors="replace") as ledger:
        try:
            locked(ledger.fileno(), fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(part / LEDGER), os.fstat(ledger.fileno())):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):  # it has ended just now
            raise CheckpointError(f"another process is making {folder}") from None
        yield ledger


def _go_on(making: Unfinished, made_of: object) -> None:
    """Keep of an earlier attempt its finished files, if it was made of the same, and no other."""
    path, ledger = making.path, making.ledger
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    ledger.seek(0)
    before, *lines = ledger.read().split("\n")
    if made_of is None or before != key:
        shutil.rmtree(path, ignore_errors=True)
        ledger.truncate(0)
        ledger.write(f"{key}\n")
        lines = []
    elif lines and lines[-1]:  # torn
        ledger.write("\n")
    path.mkdir(exist_ok=True)
    recorded = dict(filter(None, map(_recorded, lines)))
    names = [name for name, file in recorded.items() if _size(path / name) == file.size]
    there, size = 0, sum(recorded[name].size for name in names)
    for name, sha256 in zip(names, hash_files(path, names), strict=True):
        there += recorded[name].size
        making.progress("checking what is there", there, size)
        if sha256 == recorded[name].sha256:
            making.done[name] = recorded[name]
    for below, _, files in os.walk(path):
        for file in (Path(below, name) for name in files):
            if file.relative_to(path).as_posix() not in making.done:
                file.unlink()


def _recorded(line: str) -> tuple[str, FilePrint] | None:
    """A line of the ledger, None for half a line."""
    match line.split(" ", maxsplit=2):
        case [size, sha256, name] if size.isdecimal() and name:
            return name, FilePrint(int(size), sha256)
    return None


def _silent(what: str, done: int, total: int | None) -> None:
    """No progress."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
