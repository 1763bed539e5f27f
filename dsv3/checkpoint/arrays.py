"""The arrays of one checkpoint step on disk: written through orbax, read through tensorstore.

`write` hands orbax every leaf as `Pieces`, by a type handler of ours, since orbax's own take a leaf
as a whole and into host memory, and do not say what they wrote. The handler keeps a few chunks in
flight and takes the fingerprint of each on its way. The folder that results is an ordinary orbax
checkpoint (zarr in OCDBT, uncompressed: random mantissas do not compress), which orbax alone
restores. Each process writes a database of its own, `ocdbt.process_<i>`; `merge`, by one process
when all are done, makes them one. No barrier of orbax's is used: where a process fails in one,
the others wait for twenty minutes.

Reading goes past orbax because it verifies: a fingerprint is of a chunk, and orbax reads shards.
"""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsv3.checkpoint.manifest import ArrayPrint, DamageError, Manifest
from dsv3.checkpoint.pieces import Box, Pieces, fingerprint
from dsv3.errors import CheckpointError

BATCH = 1 << 25  # bytes written at once
_HANDLERS = ocp.type_handlers


def write(path: Path, leaves: Mapping[str, Pieces]) -> dict[str, ArrayPrint]:
    """Write this process's parts of `leaves` into the folder `path`; what was written of each.

    Empty arrays, which orbax refuses, are in the result alone.
    """
    writer = _Writer()
    if filled := {name: leaf for name, leaf in leaves.items() if leaf.nbytes}:
        with _silent_orbax():
            _handler(writer).save(path, args=ocp.args.PyTreeSave(filled))
    return {
        name: ArrayPrint(leaf.dtype.name, leaf.shape, leaf.grid.chunk, writer.sums.get(name, {}))
        for name, leaf in leaves.items()
    }


def merge(path: Path) -> None:
    """Make the databases that all processes wrote into the folder `path` one."""
    with _silent_orbax():  # nothing, where there are none
        _handler(_Writer()).finalize(path)


def own_folder() -> str:
    """The folder within `path` that holds what this process wrote."""
    return f"ocdbt.process_{jax.process_index()}"


class Arrays:
    """The arrays of the step in `path`, saved as `manifest` says: verified as they are read."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._stores: dict[str, ts.TensorStore] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._threads = ThreadPoolExecutor()

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """What array `name` holds within `box`, all of it without one.

        Reads the chunks that the box touches. Raises DamageError where one of them is not what was
        saved, and CheckpointError where tensorstore cannot read it.
        """
        array = self.manifest.arrays[name]
        grid, box = array.grid, tuple(slice(0, n) for n in array.shape) if box is None else box
        chunks = {number: grid.box(number) for number in grid.within(box)}
        if list(chunks.values()) == [box]:
            return self._chunk(name, next(iter(chunks)), box)
        out = np.empty([b.stop - b.start for b in box], array.dtype)

        def paste(item: tuple[int, Box]) -> None:
            there = item[1]
            both = [
                slice(max(a.start, b.start), min(a.stop, b.stop))
                for a, b in zip(there, box, strict=True)
            ]
            inside = _relative(both, there)
            out[_relative(both, box)] = self._chunk(name, *item)[inside]

        list(self._threads.map(paste, chunks.items()))
        return out

    def _chunk(self, name: str, number: int, box: Box) -> np.ndarray:
        array, found = self.manifest.arrays[name], self._stored(name, box)
        origin = tuple(b.start for b in box)
        fits = found.dtype.name == array.dtype
        if not fits or fingerprint(found, origin, array.shape) != array.sums[number]:
            raise DamageError(f"the array {name} does not match its fingerprint")
        return found

    def _stored(self, name: str, box: Box) -> np.ndarray:
        try:
            return np.asarray(self._store(name)[box].read().result())
        except Exception as error:
            self.manifest.check_files(self.path)  # never hashed, or changed since
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{self.path} is sound, but tensorstore cannot read it: {reason}"
            ) from error

    def _store(self, name: str) -> ts.TensorStore:
        if name not in self._stores:
            base = {"driver": "file", "path": f"{self.path}/arrays/"}
            spec = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            opened = ts.open({"driver": "zarr", "kvstore": spec}, context=self._context)
            self._stores[name] = opened.result()
        return self._stores[name]


class _Writer(_HANDLERS.NumpyHandler):
    """Orbax's handler of `Pieces`. On disk they are what it makes of numpy arrays."""

    def __init__(self):
        super().__init__()
        self.sums: dict[str, dict[int, int]] = {}

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list:
        """A transaction for each `BATCH` bytes; one is written while the next is gathered."""
        batch, size, committed = ts.Transaction(), 0, None
        for leaf, info in zip(values, infos, strict=True):
            sums, within = self.sums.setdefault(info.name, {}), None
            store: Any = None
            for number, chunk in leaf.chunks():
                if size > BATCH:
                    if committed:
                        await committed
                    committed, batch, size = batch.commit_async(), ts.Transaction(), 0
                if within is not batch:  # metadata are written once, in the first batch
                    spec = _spec(leaf, info) | {"create": not store, "assume_metadata": bool(store)}
                    store = await ts.open(spec, context=info.ts_context, transaction=batch)
                    within = batch
                box = leaf.grid.box(number)
                await store[box].write(chunk, can_reference_source_data_indefinitely=True).copy
                size += chunk.nbytes
                sums[number] = fingerprint(chunk, tuple(b.start for b in box), leaf.shape)
        if committed:
            await committed
        await batch.commit_async()
        return []


def _spec(leaf: Pieces, info: Any) -> dict:
    """What orbax gives tensorstore for an array, but for the chunks and no compression."""
    database = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{info.parent_dir}/{own_folder()}/"},
        "path": info.name,
        "config": {
            "max_inline_value_bytes": 1024,
            "max_decoded_node_bytes": 100_000_000,
            "manifest_kind": "single",
        },
        "assume_config": True,
    }
    return {
        "driver": "zarr",
        "kvstore": database,
        "dtype": leaf.dtype.name,
        "metadata": {"shape": leaf.shape, "chunks": leaf.grid.chunk, "compressor": None},
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "open": True,
    }


def _handler(writer: _Writer) -> Any:  # whose methods take any path, though they ask for epath's
    registry = _HANDLERS.create_type_handler_registry((Pieces, writer))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _relative(box: list[slice], to: Box) -> Box:
    return tuple(slice(b.start - t.start, b.stop - t.start) for b, t in zip(box, to, strict=True))


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
