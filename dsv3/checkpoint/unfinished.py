"""A folder of large files that is made in one go or, where that is interrupted, in several.

    .NAME.part/        beside NAME, while it is made
        LEDGER         what it is made of, then size, SHA-256 and name of each finished file
        NAME/          becomes NAME when all is there and on the disk

NAME appears whole or not at all. Whatever ends the making before, a kill -9 or a full disk, the
finished files stay: whoever then makes the same of the same things hashes them and keeps what is
sound, so one file is lost at most. Where none is finished, nothing stays. Other things begin anew.

The ledger's lines need no fsync: they are believed only of files that have that hash. Who is at
work holds a lock on it, where the file system has locks, which the system drops when the process
dies. No link is ever followed within `.NAME.part`, and a folder of that name that this module did
not make is left alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from dsv3.checkpoint.manifest import FilePrint, hash_files
from dsv3.checkpoint.safetensors_file import bytes_of
from dsv3.errors import CheckpointError
from dsv3.files import fsync_directory, fsync_tree, locked

LEDGER = "LEDGER"
MAGIC = "dsv3-unfinished-1"  # a higher number when imports or exports write something else
FIRST_LINE = len(MAGIC) + len(" \n") + 64  # of the ledger, in bytes: the key is a SHA-256
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
                self.ledger.write(f"{size} {digest.hexdigest()} {name}\n")
                self.ledger.flush()
                self.done[name] = FilePrint(size, digest.hexdigest())
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
    `size` bytes.
    """
    _require_new(folder)
    part = folder.with_name(f".{folder.name}.part")
    kept = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(part, folder) as ledger:
            making = Unfinished(part / folder.name, size, progress or _silent, ledger)
            try:
                _keep_sound(making, _begin(making, folder, made_of))
                _require_room(making, folder)
                yield making
                fsync_tree(making.path)
                making.path.rename(folder)
                fsync_directory(folder.parent)
            finally:
                finished = os.fstat(ledger.fileno()).st_size > FIRST_LINE
                kept = made_of is not None and finished and making.path.exists()
                if not kept:
                    _remove(part, folder.name)
    except KeyboardInterrupt:
        if kept:
            raise KeyboardInterrupt("the same command goes on") from None
        raise
    except (CheckpointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            message = f"{folder}: {where}{error.strerror or error}"
        if kept:
            message += f"; the same command goes on with what {part} has"
        raise CheckpointError(message) from error


def _require_new(folder: Path) -> None:
    """Raise CheckpointError where `folder` could not take the place that it is to have."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is no folder; wanted is the name of a new or empty one")
    if not folder.exists():
        return
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; wanted is a new or empty folder")
    if folder.is_mount():
        raise CheckpointError(f"{folder} is a mount point, which stays; name a new folder in it")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder} is the current folder, which would be replaced: leave it")


@contextmanager
def _held(part: Path, folder: Path) -> Iterator[IO[str]]:
    """The ledger, locked, at its end. CheckpointError where another process has it, or where `part`
    is not of this module."""
    if os.path.lexists(part):
        _require_ours(part, folder.name)
    part.mkdir(exist_ok=True)
    descriptor = os.open(
        part / LEDGER, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, mode=0o666
    )
    with open(descriptor, "a+", encoding="utf-8", errors="replace") as ledger:
        try:
            locked(ledger.fileno(), fcntl.LOCK_NB)
            if not os.path.samestat(os.stat(part / LEDGER), os.fstat(ledger.fileno())):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):  # it has ended just now
            raise CheckpointError(f"another process is making {folder}") from None
        yield ledger


def _require_ours(part: Path, name: str) -> None:
    """Raise CheckpointError unless `part` is what an interruption at any moment may leave."""
    kinds = {}
    if is_folder := stat.S_ISDIR(os.lstat(part).st_mode):
        kinds = {entry: os.lstat(part / entry).st_mode for entry in os.listdir(part)}
    ours = is_folder and kinds.keys() <= {LEDGER, name}
    if ours and LEDGER in kinds:
        ours = stat.S_ISREG(kinds[LEDGER])
        said = (part / LEDGER).read_bytes()[: len(MAGIC)] if ours else b""
        ours = ours and (said == MAGIC.encode() or (said == b"" and name not in kinds))
    if ours and name in kinds:
        ours = LEDGER in kinds and stat.S_ISDIR(kinds[name])
    if not ours:
        raise CheckpointError(f"{part} is in the way, and not what this program left: move it")


def _begin(making: Unfinished, folder: Path, made_of: object) -> dict[str, FilePrint]:
    """What the ledger says is finished of an earlier attempt at the same; else begin anew."""
    ledger = making.ledger
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    ledger.seek(0)
    before, *lines = ledger.read().split("\n")
    if made_of is None or before != f"{MAGIC} {key}":
        if making.path.exists():
            shutil.rmtree(making.path)
        ledger.truncate(0)
        ledger.write(f"{MAGIC} {key}\n")
        ledger.flush()
        os.fsync(ledger.fileno())
        lines = []
    elif lines and lines[-1]:  # torn
        ledger.write("\n")
    if not making.path.exists():
        making.path.mkdir()
        if folder.exists():
            _like(making.path, folder)
    return dict(filter(None, map(_recorded, lines)))


def _recorded(line: str) -> tuple[str, FilePrint] | None:
    """A line of the ledger, None for half a line."""
    match line.split(" ", maxsplit=2):
        case [size, sha256, name] if size.isdecimal() and name:
            return name, FilePrint(int(size), sha256)
    return None


def _keep_sound(making: Unfinished, recorded: Mapping[str, FilePrint]) -> None:
    """Have in `done`, and in the folder, those finished files that are what they were."""
    path = making.path
    _clean(path, recorded)
    names = [name for name, file in recorded.items() if _size(path / name) == file.size]
    there, size = 0, sum(recorded[name].size for name in names)
    if names:
        making.progress("checking what is there", there, size)
    for name, sha256 in zip(names, hash_files(path, names), strict=True):
        there += recorded[name].size
        making.progress("checking what is there", there, size)
        if sha256 == recorded[name].sha256:
            making.done[name] = recorded[name]
    _clean(path, making.done)


def _clean(path: Path, keep: Collection[str]) -> None:
    """Remove what is below `path` but for the regular files `keep` and the folders they are in."""
    needed = {parent.as_posix() for name in keep for parent in PurePosixPath(name).parents}
    for below, folders, files in os.walk(path):
        for name in [*folders, *files]:
            entry = Path(below, name)
            kind, place = os.lstat(entry).st_mode, entry.relative_to(path).as_posix()
            if not stat.S_ISDIR(kind):
                if not stat.S_ISREG(kind) or place not in keep:
                    entry.unlink()
            elif place not in needed:
                shutil.rmtree(entry)


def _size(path: Path) -> int:
    """Of a file that `_clean` left; -1 where there is none."""
    return path.stat().st_size if path.exists() else -1


def _like(path: Path, folder: Path) -> None:
    """Give `path` the group, where that is allowed, and the mode of the `folder` it replaces."""
    model = folder.stat()
    with suppress(PermissionError):
        os.chown(path, -1, model.st_gid)
    path.chmod(stat.S_IMODE(model.st_mode))


def _require_room(making: Unfinished, folder: Path) -> None:
    left = making.size - sum(file.size for file in making.done.values())
    if shutil.disk_usage(making.path).free < left:
        raise CheckpointError(f"{folder.parent} has no room for {-(-left // 10**6):,} MB")


def _remove(part: Path, name: str) -> None:
    """What is left of `part` is still known for what it is, should something refuse to go."""
    shutil.rmtree(part / name, ignore_errors=True)
    if not os.path.lexists(part / name):
        shutil.rmtree(part, ignore_errors=True)


def _silent(what: str, done: int, total: int | None) -> None:
    """No progress."""
