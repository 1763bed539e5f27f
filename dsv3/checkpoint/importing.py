"""A workdir from a checkpoint of the hub, as it is.

    hub/           config.json, index and weights, byte by byte, and a MANIFEST of their SHA-256
    config.gin     what config.json says, in our words; in hub/ as well
    tokenizer.json, chat_template.jinja, ...        what was beside the weights

It is a run that has not taken a step. Nothing is converted: FP8 stays E4M3 and scales, BF16 stays
BF16, so an export has what an import had, whatever made it, and the disk holds it once. Whoever
wants parameters reads them from these files, on any mesh, in FP32 (`trained`); once training has
saved a step, that counts, and `hub` says only what the weights were before.

Every chunk is read once; while it is hashed and written, the next is read and looked through. What
was interrupted goes on (`unfinished`), if the files of weights are still those.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax

from dsv3.bindings import operative
from dsv3.checkpoint import beside
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.manifest import DamageError, Manifest
from dsv3.checkpoint.unfinished import Progress, unfinished
from dsv3.checkpoint.weights import INDEX
from dsv3.config import Config
from dsv3.errors import CheckpointError
from dsv3.parallel.processes import exchange, together

HUB = "hub"
MARK = "IMPORTED"
_SMALL = 1 << 20  # bytes of a file that is looked at where the weights are not wanted


def import_checkpoint(
    folder: str | os.PathLike, workdir: str | os.PathLike, progress: Progress | None = None
) -> Config:
    """Make `workdir`, a run at step 0: `eval.py` reads it, `train.py` goes on from it.

    Raises CheckpointError where `workdir` already holds something, the disk is too small, or
    anything is wrong with `folder`. It appears whole or not at all.
    """
    folder, workdir = Path(folder), Path(workdir).absolute()
    found = Folder(folder)
    config = found.config
    if (folder / "tokenizer.json").exists():
        data = dataclasses.replace(config.data, tokenizer=str(workdir / "tokenizer.json"))
        config = dataclasses.replace(config, data=data)
    weights = found.weights
    with unfinished(workdir, weights.nbytes, weights.identity, progress) as making:
        path, hub = making.path, making.path / HUB
        hub.mkdir(exist_ok=True)
        for place in (path, hub):  # the former is the run's, which may change it
            (place / "config.gin").write_text(operative(config))
        beside.copy(folder, path)
        for name in ("config.json", *([INDEX] if weights.indexed else [])):
            shutil.copyfile(folder / name, hub / name)
        (path / MARK).write_text(f"{HUB}/ is what this run begins with, until it has a step\n")
        files = {f"{HUB}/{name}": chunks for name, chunks in weights.files().items()}
        written = making.write("importing weights", files)
        hashed = {name.removeprefix(f"{HUB}/"): file for name, file in written.items()}
        Manifest.of(hub, 0, {}, known=hashed).write(hub)
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
