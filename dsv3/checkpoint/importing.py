"""A workdir from a checkpoint of the hub, as it is.

    hub/           config.json, index and weights, byte by byte, and a MANIFEST of their SHA-256
    config.gin     what config.json says, in our words; in hub/ as well
    tokenizer.json, chat_template.jinja, ...        what was beside the weights

It is a run that has not taken a step. Nothing is converted: FP8 stays E4M3 and scales, BF16 stays
BF16, so an export has what an import had, whatever made it, and the disk holds it once. Whoever
wants parameters reads them from these files, on any mesh, in FP32 (`trained`); once training has
saved a step, that counts, and `hub` says only what the weights were before.

Every chunk is read once; while it is hashed and written, the next is read and looked through.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax

from dsv3.bindings import operative
from dsv3.checkpoint import beside
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.manifest import DamageError, FilePrint, Manifest
from dsv3.checkpoint.weights import INDEX
from dsv3.config import Config
from dsv3.errors import CheckpointError
from dsv3.files import appearing
from dsv3.parallel.processes import exchange, together

HUB = "hub"
MARK = "IMPORTED"
_SMALL = 1 << 20  # bytes of a file that is looked at where the weights are not wanted
Progress = Callable[[str, int, int | None], None]  # what, done, in all


def import_checkpoint(
    folder: str | os.PathLike, workdir: str | os.PathLike, progress: Progress | None = None
) -> Config:
    """Make `workdir`, a run at step 0: `eval.py` reads it, `train.py` goes on from it.

    Raises CheckpointError where `workdir` already holds something, the disk is too small, or
    anything is wrong with `folder`. It appears whole or not at all, and an import that was
    interrupted begins anew.
    """
    folder, workdir = Path(folder), Path(workdir).absolute()
    found = Folder(folder)
    config = found.config
    if (folder / "tokenizer.json").exists():
        data = dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer.json"))
        config = dataclasses.replace(config, data=data)
    with new_folder(workdir, found.weights.nbytes) as making:
        (making / HUB).mkdir()
        for place in (making, making / HUB):  # the former is the run's, which may change it
            (place / "config.gin").write_text(operative(config))
        beside.copy(folder, making)
        for name in ("config.json", INDEX):
            if (folder / name).exists():
                shutil.copyfile(folder / name, making / HUB / name)
        (making / MARK).write_text(f"{HUB}/ is what this run begins with, until it has a step\n")
        hashed = _copy_weights(found, making / HUB, progress)
        Manifest.of(making / HUB, 0, {}, known=hashed).write(making / HUB)
    return config


def imported(workdir: Path, *, weights: bool = True) -> Folder | None:
    """What was imported into `workdir`, None for a run that began otherwise.

    Every process hashes its share of the files, or without `weights`, once a run goes on from
    others, the small ones only. Raises CheckpointError in all of them where one is not what it was.
    """
    hub = workdir / HUB
    remedy = (
        "import it into a new workdir" if weights else "restore it, or do without it: delete it"
    )

    def share(number: int, size: int) -> bool:
        mine = number % jax.process_count() == jax.process_index()
        return mine if weights else size <= _SMALL

    there = json.loads(exchange(json.dumps(hub.exists()))[0])  # a shared disk may show others less
    with together(CheckpointError):
        if not there:
            if weights and (workdir / MARK).exists():
                raise CheckpointError(f"{hub} is gone, with which this run begins; {remedy}")
            return None
        try:
            Manifest.read(hub, 0).check_files(hub, share)
        except DamageError as damage:
            raise CheckpointError(f"{hub} is damaged: {damage}; {remedy}") from damage
        return Folder(hub, copied=True)


def _copy_weights(found: Folder, out: Path, progress: Progress | None) -> dict[str, FilePrint]:
    """Copy the files of weights; size and hash of each as it was read."""
    prints, total, done = {}, found.weights.nbytes, 0
    with ThreadPoolExecutor(2) as pool:
        for name, chunks in found.weights.files().items():
            digest, before = hashlib.sha256(), done
            with open(out / name, "xb") as copy:
                coming = pool.submit(next, chunks, None)
                while (chunk := coming.result()) is not None:
                    coming = pool.submit(next, chunks, None)
                    hashing = pool.submit(digest.update, chunk)
                    copy.write(chunk.data)
                    hashing.result()
                    done += chunk.nbytes
                    if progress is not None:
                        progress("importing weights", done, total)
            prints[name] = FilePrint(done - before, digest.hexdigest())
    return prints


@contextmanager
def new_folder(folder: Path, size: int) -> Iterator[Path]:
    """`appearing`, for a folder that is new or empty; errors name it, not what is being made.

    Raises CheckpointError for anything else that is there, where it cannot be written, and where
    the disk has no room for `size` bytes.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is no folder; wanted is the name of a new or empty one")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; wanted is a new or empty folder")
    hidden = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.tmp")
    try:
        with appearing(folder) as making:
            if shutil.disk_usage(making).free < size:
                raise CheckpointError(f"{folder.parent} has no room for {-(-size // 10**6):,} MB")
            yield making
    except (CheckpointError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            message = f"{error.filename or folder}: {error.strerror or error}"
        raise CheckpointError(hidden.sub(lambda _: folder.name, message)) from error
