"""Checkpoints that are verified, or refused: never a silently wrong weight, never half a step.

    checkpoints/
        step-200/   arrays/ (orbax), extra.json, MANIFEST
        step-400/
        damaged-300-1/      set aside by a restore, with all it held
        tmp-step-600-1b7c/  being written; swept at the next opening if its writer was killed

A step is written into a temporary directory, its manifest last; everything is fsynced, then the
directory is renamed and the rename fsynced. Only the final name makes it a step, so a kill at any
moment leaves the earlier ones as they were. A restore takes the newest step whose every file and
array hashes to what was saved; a damaged one is named, set aside and never deleted.

Saving is synchronous: 60 MB take about a second, once in hundreds of steps, and a thread would have
to copy the state first, since the step donates its buffers. Files are the business of one
process; several would each need to hand orbax their shards and let the first write the manifest.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv3.checkpoint.manifest import DamageError, Manifest, fingerprint, name_leaves
from dsv3.errors import CheckpointError
from dsv3.files import fsync_directory, fsync_tree

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_OURS = re.compile(r"step-\d+|damaged-\d+-\d+|tmp-.+")
_HEADROOM = 1 << 20  # bytes for metadata, beyond the arrays


@dataclass(frozen=True)
class Restored:
    """A sound step: `state` in the structure of what was asked for, `extra` as it was saved."""

    step: int
    state: Any
    extra: dict


class Store:
    """The checkpoints of one run in `directory`, the newest `keep` of them kept.

    `warn` receives one line for each damaged step. The directory need not exist before the first
    save. Raises CheckpointError where `directory` is a file or holds only foreign things.
    """

    def __init__(self, directory: str | os.PathLike, keep: int, warn: Callable[[str], None]):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.warn = warn
        if self.directory.exists():
            self._refuse_foreign()
            with _locked(self.directory, fcntl.LOCK_NB) as alone:
                if alone:
                    self._sweep()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return sorted(int(match[1]) for name in self._names() if (match := _STEP.fullmatch(name)))

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Commit `state` (a pytree of jax or numpy arrays) and `extra` (JSON-able) as `step`.

        Then the oldest steps beyond `keep` go. A committed step is never rewritten: saving the same
        arrays again does nothing, others are a CheckpointError, as are a full and a read-only disk.
        """
        arrays = {name: _host(name, leaf) for name, leaf in name_leaves(state).items()}
        text = json.dumps(extra)
        if step in self.steps() and self._holds(step, arrays):
            return
        with self._failing_disk_is_named(step):
            self.directory.mkdir(parents=True, exist_ok=True)
            with _locked(self.directory):
                self._sweep()
                _require_space(self.directory, sum(a.nbytes for a in arrays.values()))
                with self._temporary(step) as temporary:
                    self._write(temporary, step, arrays, text)
                    temporary.rename(self._path(step))
                fsync_directory(self.directory)
                self._retire(newest=step)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest sound step, or `step`, in the structure of `abstract_state`; None without any.

        Each leaf goes where the abstract leaf's sharding says, else to the default device; 64-bit
        leaves stay numpy arrays where jax does not have 64 bits. Raises CheckpointError where a
        sound step has other names, shapes or dtypes, where only damaged ones are left, and where
        `step` is missing or damaged.
        """
        return self._newest(lambda s: self._load(s, abstract_state), step)

    def read_extra(self, step: int | None = None) -> dict | None:
        """The verified `extra` of the newest step, or of `step`, without its arrays."""

        def read(step: int) -> dict:
            path = self._path(step)
            return json.loads(Manifest.read(path, step).read_file(path, "extra.json"))

        return self._newest(read, step)

    def _newest[T](self, read: Callable[[int], T], step: int | None) -> T | None:
        """`read` of the newest step that it does not find damaged; those are set aside."""
        refused = set()
        while left := [s for s in self.steps() if s not in refused and step in (None, s)]:
            try:
                return read(left[-1])
            except DamageError as damage:
                refused.add(left[-1])
                self._set_aside(left[-1], damage)
        if step is not None:
            sound = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory} has no sound step {step}; steps: {sound}")
        if any(name.startswith("damaged-") for name in self._names()) or refused:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; "
                "put a sound copy there, or move the directory away to begin anew"
            )
        return None

    def _load(self, step: int, abstract_state: Any) -> Restored:
        path, wanted = self._path(step), name_leaves(abstract_state)
        manifest = Manifest.read(path, step)
        manifest.check_files(path)
        if difference := manifest.difference(wanted):
            raise CheckpointError(f"{path} does not fit this configuration: {difference}")
        arrays = _read_arrays(path, manifest)
        manifest.check_arrays(arrays)
        leaves = [_place(arrays[name], like) for name, like in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(step, state, json.loads(manifest.read_file(path, "extra.json")))

    def _write(self, path: Path, step: int, arrays: dict[str, np.ndarray], extra: str) -> None:
        with ThreadPoolExecutor() as pool:
            prints = pool.map(fingerprint, arrays.values())  # while orbax waits for the disk
            _write_arrays(path / "arrays", arrays)
            (path / "extra.json").write_text(extra)
            Manifest.of(path, step, dict(zip(arrays, prints, strict=True))).write(path)
        fsync_tree(path)

    def _holds(self, step: int, arrays: dict[str, np.ndarray]) -> bool:
        """Whether `step` is there with these arrays; a damaged one is set aside first."""
        try:
            manifest = Manifest.read(self._path(step), step)
            manifest.check_files(self._path(step))
        except DamageError as damage:
            self._set_aside(step, damage)
            return False
        if manifest.arrays != {name: fingerprint(array) for name, array in arrays.items()}:
            raise CheckpointError(f"{self._path(step)} is already saved, with other arrays")
        return True

    def _set_aside(self, step: int, damage: DamageError) -> None:
        path = self._path(step)
        if not path.exists():  # a run that is saving has just retired it
            return
        aside = next(p for i in itertools.count(1) if not (p := self._path(step, i)).exists())
        try:
            path.rename(aside)
            fate = f"set aside as {aside.name}"
        except OSError as error:
            fate = f"passed over, as it cannot be renamed ({error.strerror})"
        self.warn(f"{path} is damaged: {damage}; {fate}")

    def _retire(self, newest: int) -> None:
        """Remove the oldest steps beyond `keep`, each renamed first: none is ever seen in part."""
        older = [step for step in self.steps() if step != newest]
        for step in older[: max(0, len(older) + 1 - self.keep)]:
            retired = self.directory / f"tmp-retired-{step}"
            self._path(step).rename(retired)
            shutil.rmtree(retired, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed and failed writers left; whoever holds the lock is the only one."""
        for name in self._names():
            if name.startswith("tmp-"):
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _refuse_foreign(self) -> None:
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a directory")
        names = self._names()
        if names and not any(_OURS.fullmatch(name) for name in names):
            raise CheckpointError(
                f"{self.directory} holds no checkpoints of this program, but {names[0]!r}"
            )

    @contextmanager
    def _temporary(self, step: int) -> Iterator[Path]:
        path = self.directory / f"tmp-step-{step}-{uuid.uuid4().hex[:8]}"
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)  # nothing, once it was renamed

    @contextmanager
    def _failing_disk_is_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not (reason := _disk_failure(error)):
                raise
            raise CheckpointError(f"{self._path(step)} cannot be saved: {reason}") from error

    def _path(self, step: int, damaged: int | None = None) -> Path:
        return self.directory / (f"damaged-{step}-{damaged}" if damaged else f"step-{step}")

    def _names(self) -> list[str]:
        """What lies in the directory, sorted, hidden files aside."""
        if not self.directory.exists():
            return []
        return sorted(n for n in os.listdir(self.directory) if not n.startswith("."))


def _host(name: str, leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"{name} is {leaf!r}; a checkpoint holds arrays")
    return np.asarray(leaf)


def _place(array: np.ndarray, like: Any) -> Any:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    sharding = getattr(like, "sharding", None)
    if isinstance(sharding, jax.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):  # eval_shape under a mesh names its axes, not its devices
        mesh = jax.sharding.get_mesh()
        sharding = jax.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return jax.device_put(array, sharding)


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write through orbax, which refuses empty arrays; the manifest alone restores those."""
    filled = {name: array for name, array in arrays.items() if array.size}
    if filled:
        with _silent_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(filled))


def _read_arrays(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The arrays of a step whose files were found sound, not yet verified themselves."""
    arrays = {n: np.zeros(p.shape, p.dtype) for n, p in manifest.arrays.items() if 0 in p.shape}
    if len(arrays) == len(manifest.arrays):
        return arrays
    try:
        with _silent_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return arrays | checkpointer.restore(path / "arrays")
    except Exception as error:
        manifest.check_files(path)  # changed since it was hashed?
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is sound, but orbax {ocp.__version__} cannot read it: {reason}"
        ) from error


@contextmanager
def _silent_orbax() -> Iterator[None]:
    """Orbax logs the traceback of what it raises; the caller says it in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require_space(directory: Path, needed: int) -> None:
    """Orbax meets a full disk with writes still in flight, so ask before."""
    if shutil.disk_usage(directory).free < needed + _HEADROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {needed / 1e6:.0f} MB")


def _disk_failure(error: Exception) -> str:
    """Why the disk refused, also from tensorstore's ValueError; '' for other errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found[1]))
    first = str(error).splitlines()[0] if str(error) else ""
    return first[:200] if first.startswith("Save failed") else ""  # files vanished underneath


@contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[bool]:
    """Hold the directory's lock while writing; yields False where LOCK_NB finds it taken.

    The system drops it when its holder dies. Where a file system has no locks, everyone passes.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _lock(descriptor, flags)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, flags: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True
