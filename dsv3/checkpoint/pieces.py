"""Arrays in pieces: how a leaf is cut for the disk, and a fingerprint that no cut changes.

On disk an array is a regular grid of chunks. A chunk lies within one shard of one device and holds
`CHUNK_BYTES` or a little more, so that writing and reading need memory for a few chunks, and what
is read for a mesh other than the one it was saved on is little more than what that mesh needs.

The fingerprint of a set of elements is the sum, modulo 2**64, of

    mix(bits of the element + position * GOLDEN)

where `position` counts elements of the whole array in row-major order and `mix` is a bijection of
64-bit words (Murmur3's kind). Sums over chunks add up to the sum over the array, however it was
cut, and over however many processes. A changed element always changes the sum, as `mix` is one to
one; two and more changes (a zeroed range, exchanged rows or chunks, another array) cancel by chance
only, once in 2**64. It finds faults, not forgers: SHA-256 of the files is for those.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

CHUNK_BYTES = 1 << 24
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_HALF = np.uint64(32)
_BLOCK = 1 << 13  # elements mixed at once: their words stay in the first-level caches

Index = tuple[int, ...]
Box = tuple[slice, ...]


@dataclass(frozen=True)
class Grid:
    """An array of `shape` in chunks of `chunk`, numbered row-major; the last may be less."""

    shape: Index
    chunk: Index

    @property
    def counts(self) -> Index:
        """The number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def size(self) -> int:
        """The number of chunks."""
        return math.prod(self.counts)

    def number(self, origin: Index) -> int:
        """The chunk whose first element is at `origin`."""
        at = [o // c for o, c in zip(origin, self.chunk, strict=True)]
        return sum(a * s for a, s in zip(at, _strides(self.counts), strict=True))

    def box(self, number: int) -> Box:
        """Where chunk `number` lies."""
        at = [number // s % n for n, s in zip(self.counts, _strides(self.counts), strict=True)]
        sides = zip(at, self.chunk, self.shape, strict=True)
        return tuple(slice(a * c, min((a + 1) * c, n)) for a, c, n in sides)

    def within(self, box: Box) -> Iterator[int]:
        """The chunks that share elements with `box`."""
        along = [
            [i * stride for i in range(b.start // c, -(-b.stop // c)) if b.start < b.stop]
            for b, c, stride in zip(box, self.chunk, _strides(self.counts), strict=True)
        ]
        return map(sum, itertools.product(*along))


@dataclass(frozen=True, eq=False)
class Pieces:
    """A leaf to be saved: its grid, and `parts()`, what this process has to write of it.

    `parts` yields (first index, numpy array); parts are whole chunks, and the parts of all
    processes tile the array.
    """

    dtype: np.dtype
    grid: Grid
    parts: Callable[[], Iterator[tuple[Index, np.ndarray]]]

    @property
    def shape(self) -> Index:
        return self.grid.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number, content) of the chunks that this process writes."""
        for origin, part in self.parts():
            part = part if part.flags.c_contiguous else part.copy()  # keeps a 0-dimensional shape
            inner = Grid(part.shape, self.grid.chunk)
            for box in map(inner.box, range(inner.size)):
                start = tuple(o + b.start for o, b in zip(origin, box, strict=True))
                yield self.grid.number(start), part[box]


def cut(name: str, leaf: Any) -> Pieces:
    """The pieces of a jax array or a numpy array.

    A jax array may be sharded in any way over any processes: each writes its own shards, of a
    replicated one the first replica. Numpy arrays are the first process's to write.
    """
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"{name} is {leaf!r}; a checkpoint holds arrays")
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if isinstance(leaf, jax.Array):
        part = leaf.sharding.shard_shape(shape)
        return Pieces(dtype, _grid(shape, part, dtype), lambda: _shards(leaf))
    return Pieces(dtype, _grid(shape, shape, dtype), lambda: _whole(np.asarray(leaf)))


def content(leaf: Pieces) -> int:
    """The fingerprint of what this process has of `leaf`; those of all add up to the array's."""
    return sum(
        fingerprint(chunk, tuple(side.start for side in leaf.grid.box(number)), leaf.shape)
        for number, chunk in leaf.chunks()
    )


def fingerprint(part: np.ndarray, origin: Index, shape: Index) -> int:
    """The fingerprint of `part`, which starts at `origin` in an array of `shape`."""
    words, origin, shape = _words(part, origin, shape)
    first = max(0, _first_whole(words.shape, shape) - 1)  # from here on elements are consecutive
    starts = np.zeros(1, np.uint64)
    for length, at, stride in list(zip(words.shape, origin, _strides(shape), strict=True))[:first]:
        steps = np.arange(at, at + length, dtype=np.uint64) * np.uint64(stride)
        starts = (starts[:, None] + steps).reshape(-1)
    offset = sum(o * s for o, s in zip(origin[first:], _strides(shape)[first:], strict=True))
    rows = words.reshape(len(starts), -1)
    places = np.arange(offset, offset + rows.shape[1], dtype=np.uint64) * GOLDEN
    starts *= GOLDEN
    height = max(1, _BLOCK // max(1, rows.shape[1]))
    total = 0
    for r in range(0, len(rows), height):
        for c in range(0, rows.shape[1], _BLOCK):
            mixed = rows[r : r + height, c : c + _BLOCK].astype(np.uint64)
            mixed += places[c : c + _BLOCK]
            mixed += starts[r : r + height, None]
            for factor in MIX:
                mixed *= factor
                mixed ^= mixed >> _HALF
            total += int(mixed.sum(dtype=np.uint64))
    return total % (1 << 64)


def _words(part: np.ndarray, origin: Index, shape: Index) -> tuple[np.ndarray, Index, Index]:
    """Elements as unsigned words; those wider than 64 bits as two along one more axis."""
    part = np.ascontiguousarray(part).reshape(part.shape or 1)
    origin, shape = origin or (0,), shape or (1,)
    size = part.dtype.itemsize
    if size <= 8:
        return part.view(f"u{size}"), origin, shape
    words = part[..., None].view(np.uint64)
    return words, (*origin, 0), (*shape, size // 8)


def _first_whole(part: Index, shape: Index) -> int:
    """The first of the trailing axes along which `part` is all of the array."""
    axis = len(shape)
    while axis and part[axis - 1] == shape[axis - 1]:
        axis -= 1
    return axis


def _strides(shape: Index) -> Index:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _whole(array: np.ndarray) -> Iterator[tuple[Index, np.ndarray]]:
    if jax.process_index() == 0:
        yield (0,) * array.ndim, array


def _shards(array: jax.Array) -> Iterator[tuple[Index, np.ndarray]]:
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            data = shard.data
            if shard.device.platform != "cpu":  # a copy that goes, where asarray's stays cached
                data = jax.device_put(data, jax.memory.Space.Host)
            yield tuple(part.start or 0 for part in shard.index), np.asarray(data)


def _grid(shape: Index, part: Index, dtype: np.dtype) -> Grid:
    """Chunks for parts of shape `part`: that, its leading axes divided until it is small."""
    chunk = list(part)
    for axis, length in enumerate(part):
        share = -(-math.prod(chunk) * dtype.itemsize // CHUNK_BYTES)
        if share <= 1:
            break
        if length == shape[axis]:
            chunk[axis] = max(1, length // share)
        else:  # chunks must end where parts do
            divisors = (d for d in range(max(1, length // share), 0, -1) if length % d == 0)
            chunk[axis] = next(divisors)
    return Grid(shape, tuple(max(1, c) for c in chunk))
