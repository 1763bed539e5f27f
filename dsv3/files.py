"""Files that are whole or absent: write beside the target, fsync, rename, fsync the directory.

`rename` within one directory is atomic, so a reader (or a run killed at any moment) sees the old
content or the new, never a part. Without the two fsyncs a power cut may still leave an empty file:
the rename can reach the disk before the data does.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv3.errors import UserError

NO_LOCKS = (  # what a file system without them says; the last, NFS of a folder
    errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF,
)  # fmt: skip


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Make `path` hold exactly `content` (text as UTF-8), or leave it as it was.

    The directory must exist, and `path` be absent or a regular file. Raises the OSError of a full,
    read-only or missing disk, with `path` as its filename; nothing is left behind then.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: str | os.PathLike) -> Iterator[None]:
    """Hold `folder` for this process; UserError while another holds it. A kill lets go of it.

    Where a file system has no locks, everyone passes.
    """
    with open(Path(folder) / ".lock", "w") as lock:
        try:
            locked(lock.fileno(), fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing here; wait or stop it") from None
        yield


def locked(descriptor: int, flags: int = 0) -> bool:
    """Lock an open file or folder until it is closed; False where the file system has no locks.

    With LOCK_NB, BlockingIOError where another has it; without, it waits.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def fsync_directory(path: str | os.PathLike) -> None:
    """Force the names in a directory to disk; its files' contents are fsynced on their own."""
    _fsync(path)


def fsync_tree(path: str | os.PathLike) -> None:
    """Force every file and directory below `path`, and `path` itself, to disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            _fsync(os.path.join(folder, name))
        _fsync(folder)


def _fsync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
