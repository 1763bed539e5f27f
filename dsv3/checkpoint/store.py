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

Several processes save one step: the first makes the temporary directory, each writes the shards it
owns there, and when all have said that theirs is on disk, the first writes the manifest and
renames. So a process that dies leaves a temporary directory and no step. They restore one step:
each reads what its devices need and hashes its share of the files, and what one finds damaged is
damaged for all. `dsv3/parallel/processes.py` makes the error of one the error of all.

Saving is synchronous: 60 MB take about a second, once in hundreds of steps, and a thread would have
to copy the state first, since the step donates its buffers.
"""

import errno
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3.checkpoint import arrays
from dsv3.checkpoint.arrays import Arrays
from dsv3.checkpoint.manifest import DamageError, Manifest, difference, name_leaves
from dsv3.checkpoint.pieces import Box, Pieces, content, cut
from dsv3.errors import CheckpointError, MisfitError
from dsv3.files import fsync_directory, fsync_tree, locked
from dsv3.parallel.processes import exchange, is_first, together

_STEP = re.compile(r"step-(0|[1-9]\d*)")
_LEFT = re.compile(r"tmp-step-\d+-[0-9a-f]{8}|tmp-retired-\d+")
_OURS = re.compile(rf"step-\d+|damaged-\d+-\d+|{_LEFT.pattern}")
_HEADROOM = 1 << 20  # bytes for metadata, beyond the arrays
_SMALL = 1 << 20  # bytes of a file that a reader hashes at once


@dataclass(frozen=True)
class Restored:
    """A sound step: `state` in the structure of what was asked for, `extra` as it was saved."""

    step: int
    state: Any
    extra: dict


class Reader:
    """A sound step, its arrays read one by one: `shapes` has (shape, dtype) by name, `identity`
    what the arrays are and their fingerprints, as JSON.

    Large files are verified by what is read of them, not before.
    """

    def __init__(self, store: "Store", step: int, manifest: Manifest, extra: dict):
        self.step, self.extra = step, extra
        self.shapes = {n: (a.shape, np.dtype(a.dtype)) for n, a in manifest.arrays.items()}
        self.identity = {name: array.content for name, array in manifest.arrays.items()}
        self._store, self._arrays = store, Arrays(store._path(step), manifest)

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """Array `name`, or what it holds at these integers on its leading axes.

        Raises CheckpointError where that is damaged; the step is set aside then, and the next
        opening takes the one before.
        """
        shape, _ = self.shapes[name]
        inner = shape[len(index) :]
        box = (*(slice(i, i + 1) for i in index), *(slice(0, n) for n in inner))
        try:
            return self._arrays.read(name, box).reshape(inner)
        except DamageError as damage:
            self._store._set_aside(self.step, damage)
            raise CheckpointError(
                f"{self._arrays.path} is damaged: {damage}; the same command takes the step before"
            ) from damage


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
            if is_first():
                with _locked(self.directory, fcntl.LOCK_NB) as held:
                    if held:
                        self._sweep()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return sorted(int(match[1]) for name in self._names() if (match := _STEP.fullmatch(name)))

    def save(self, step: int, state: Any, extra: dict) -> None:
        """Commit `state`, a pytree of arrays, and `extra` (JSON-able) as `step`.

        The leaves are numpy arrays, or jax arrays, sharded over any mesh. All processes call this.
        Then the oldest steps beyond `keep` go. A committed step is never rewritten: saving the same
        arrays again does nothing, others are a CheckpointError, as are a full and a read-only disk.
        """
        leaves = {name: cut(name, leaf) for name, leaf in name_leaves(state).items()}
        text = json.dumps(extra)
        if step in self._agreed_steps() and self._holds(step, leaves):
            return
        with self._temporary(step, sum(leaf.nbytes for leaf in leaves.values())) as temporary:
            with self._saving(step):
                self._write(temporary, step, leaves)
            with self._saving(step):
                if is_first():
                    self._commit(temporary, step, text)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored | None:
        """The newest sound step, or `step`, in the structure of `abstract_state`; None without any.

        Each leaf goes where the abstract leaf's sharding says, on whatever mesh it was saved, else
        to the default device; a process reads what its devices need. 64-bit leaves stay numpy
        arrays where jax does not have 64 bits. Raises MisfitError where a sound step has other
        names, shapes or dtypes, CheckpointError where only damaged ones are left, and where `step`
        is missing or damaged.
        """
        return self._newest(lambda s: self._load(s, abstract_state), step)

    def read_extra(self, step: int | None = None) -> dict | None:
        """The verified `extra` of the newest step, or of `step`, without its arrays."""

        def read(step: int) -> dict:
            path = self._path(step)
            return json.loads(Manifest.read(path, step).read_file(path, "extra.json"))

        return self._newest(read, step)

    def open(self, step: int | None = None) -> Reader | None:
        """The newest sound step, or `step`, to read its arrays one by one; None without any."""

        def reader(step: int) -> Reader:
            path = self._path(step)
            manifest = Manifest.read(path, step)
            manifest.check_files(path, lambda _, size: size <= _SMALL)
            return Reader(self, step, manifest, json.loads(manifest.read_file(path, "extra.json")))

        return self._newest(reader, step)

    def _newest[T](self, read: Callable[[int], T], step: int | None) -> T | None:
        """`read` of the newest step that it does not find damaged; those are set aside."""
        refused: dict[int, DamageError] = {}
        while left := [s for s in self._agreed_steps() if s not in refused and step in (None, s)]:
            try:
                with together(DamageError, CheckpointError):
                    found = read(left[-1])
                return found
            except DamageError as damage:
                refused[left[-1]] = damage
                self._set_aside(left[-1], damage)
        if step is not None:
            sound = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory} has no sound step {step}; steps: {sound}")
        aside = [name for name in self._names() if name.startswith("damaged-")]
        if refused or aside:
            newest = f"step-{(n := max(refused))}: {refused[n]}" if refused else aside[-1]
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({newest}); "
                "put a sound copy there, or move the directory away to begin anew"
            )
        return None

    def _load(self, step: int, abstract_state: Any) -> Restored:
        path = self._path(step)
        manifest = Manifest.read(path, step)
        wanted = name_leaves(abstract_state)
        manifest.check_files(path, lambda i, _: i % jax.process_count() == jax.process_index())
        extra = json.loads(manifest.read_file(path, "extra.json"))
        if misfit := difference(manifest.arrays, wanted):
            raise MisfitError(f"{path} does not fit this configuration: {misfit}", extra)
        stored = Arrays(path, manifest)
        leaves = [_place(stored, name, like) for name, like in wanted.items()]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(step, state, extra)

    def _write(self, path: Path, step: int, leaves: Mapping[str, Pieces]) -> None:
        """This process's part."""
        written = arrays.write(path / "arrays", leaves)
        Manifest.of(path, step, written, f"arrays/{arrays.own_folder()}").write(
            path, jax.process_index()
        )
        fsync_tree(path / "arrays" / arrays.own_folder())

    def _commit(self, path: Path, step: int, extra: str) -> None:
        """Make of what all processes wrote into `path` the step."""
        arrays.merge(path / "arrays")
        (path / "extra.json").write_text(extra)
        Manifest.join(path, step, jax.process_count()).write(path)
        fsync_tree(path)
        path.rename(self._path(step))
        fsync_directory(self.directory)
        self._retire(newest=step)

    def _holds(self, step: int, leaves: Mapping[str, Pieces]) -> bool:
        """Whether `step` is there with these arrays; a damaged one is set aside first."""
        try:
            with together(DamageError, CheckpointError):
                manifest = Manifest.read(self._path(step), step)
                manifest.check_files(self._path(step))
        except DamageError as damage:
            self._set_aside(step, damage)
            return False
        own = json.dumps({name: content(leaf) for name, leaf in leaves.items()})
        totals = Counter()
        for said in exchange(own):
            totals.update(json.loads(said))
        here = {
            name: (leaf.dtype.name, leaf.shape, totals[name] % (1 << 64))
            for name, leaf in leaves.items()
        }
        if {name: array.content for name, array in manifest.arrays.items()} != here:
            raise CheckpointError(f"{self._path(step)} is already saved, with other arrays")
        return True

    def _set_aside(self, step: int, damage: DamageError) -> None:
        path = self._path(step)
        if not is_first() or not path.exists():  # a run that is saving has just retired it
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
            if _LEFT.fullmatch(name):
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
    def _temporary(self, step: int, needed: int) -> Iterator[Path]:
        """Where all processes write `needed` bytes of `step`, the first holding the lock."""
        path = self.directory / f"tmp-step-{step}-{uuid.uuid4().hex[:8]}"
        with ExitStack() as stack:
            with self._saving(step):
                if is_first():
                    self.directory.mkdir(parents=True, exist_ok=True)
                    if stack.enter_context(_locked(self.directory)):
                        self._sweep()
                    _require_space(self.directory, needed)
                    stack.callback(shutil.rmtree, path, ignore_errors=True)  # nothing, once renamed
                    (path / "arrays").mkdir(parents=True)
            yield self.directory / exchange(path.name)[0]

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        with together(CheckpointError), self._failing_disk_is_named(step):
            yield

    def _agreed_steps(self) -> list[int]:
        """`steps` as the first process sees them: a shared disk may show others less."""
        return json.loads(exchange(json.dumps(self.steps()))[0])

    @contextmanager
    def _failing_disk_is_named(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, DamageError) as error:
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


def _place(stored: Arrays, name: str, like: Any) -> Any:
    dtype = np.dtype(like.dtype)
    sharding = getattr(like, "sharding", None)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return stored.read(name)
    if sharding is None:
        return jax.device_put(stored.read(name))
    if isinstance(sharding, jax.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):  # eval_shape under a mesh names its axes, not its devices
        mesh = jax.sharding.get_mesh()
        sharding = jax.NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)

    @functools.cache  # replicas are read once
    def read(*sides: tuple[int, int]) -> np.ndarray:
        return stored.read(name, tuple(slice(*side) for side in sides))

    def shard(index: Box | None) -> np.ndarray:
        sides = zip(index or (), like.shape, strict=True)
        return read(*(side.indices(n)[:2] for side, n in sides))

    return jax.make_array_from_callback(like.shape, sharding, shard, dtype=dtype)


def _require_space(directory: Path, needed: int) -> None:
    """Orbax meets a full disk with writes still in flight, so ask before."""
    if shutil.disk_usage(directory).free < needed + _HEADROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {needed / 1e6:.0f} MB")


def _disk_failure(error: Exception) -> str:
    """Why the disk refused, also from tensorstore's ValueError; '' for other errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, DamageError):
        return str(error)
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found[1]))
    first = str(error).splitlines()[0] if str(error) else ""
    return first[:200] if first.startswith("Save failed") else ""  # files vanished underneath


@contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[bool]:
    """Hold the directory's lock while writing; yields whether it is held.

    It is not where LOCK_NB finds it taken, nor where a file system has no locks: everyone may write
    there, and nobody sweeps. The system drops it when its holder dies.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            held = locked(descriptor, flags)
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
