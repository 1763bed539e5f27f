"""Training windows on disk: `array_record` shards with random access, every record checked.

A record is   crc32 | tokens [T+1] | lengths of the segments   in little-endian integers, 16 bits
wide where the vocabulary and the window allow it. array_record hashes its chunks, but a reader
that has a file open returns an empty record, without a word, where the file has since been cut
short. So each record carries its own checksum, seeded with its index: a record that is torn,
flipped or not the one asked for raises. A whole file is checked when `prepare` opens the cache.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, batched
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from dsv3.data.index import damage
from dsv3.errors import DataError

SHARD_BYTES = 1 << 26
CHECKSUM_BYTES = 4

Window = tuple[np.ndarray, np.ndarray]  # tokens and segments, int32 [T+1] each


class ShardedWindows:
    """The windows of some shards by index: `self[i]` is (tokens, segments), int32 [T+1] each.

    counts: windows in each shard. Segments number the documents of a window from 1.
    Raises DataError naming the shard where one is damaged.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int], window: int, vocab: int):
        self.paths = tuple(paths)
        self._ends = list(accumulate(counts))
        self._window = window
        self._dtype = record_dtype(window, vocab)
        try:
            self._records = grain.sources.ArrayRecordDataSource(list(map(str, paths)))
        except (RuntimeError, OSError) as error:
            raise damage(self.paths[0], str(error)) from error

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Window:
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise damage(self._path(index), str(error)) from error
        checksum, body = record[:CHECKSUM_BYTES], record[CHECKSUM_BYTES:]
        if checksum != _checksum(body, index):
            raise damage(self._path(index), f"record {index} is not what was written")
        numbers = np.frombuffer(body, self._dtype).astype(np.int32)
        tokens, lengths = numbers[: self._window], numbers[self._window :]
        return tokens, np.repeat(np.arange(1, lengths.size + 1, dtype=np.int32), lengths)

    def _path(self, index: int) -> Path:
        return self.paths[bisect_right(self._ends, index)]


class SyntheticWindows:
    """Windows of uniform random ids in [0, vocab), made on demand from `seed` and their index."""

    LENGTH = 1 << 20  # an epoch
    paths: tuple[Path, ...] = ()

    def __init__(self, window: int, vocab: int, seed: int):
        self._window = window
        self._vocab = vocab
        self._seed = seed

    def __len__(self) -> int:
        return self.LENGTH

    def __getitem__(self, index: int) -> Window:
        draw = np.random.default_rng([self._seed, index])
        tokens = draw.integers(self._vocab, size=self._window, dtype=np.int32)
        return tokens, np.ones(self._window, np.int32)


Windows = ShardedWindows | SyntheticWindows


def write_shards(
    folder: Path, windows: Iterable[Sequence[np.ndarray]], window: int, vocab: int
) -> tuple[dict[str, int], str]:
    """Write windows, each given as the pieces of documents that fill it.

    Returns the number of windows by shard name and the SHA-256 of their content in order.
    Raises DataError where the disk is full.
    """
    dtype = record_dtype(window, vocab)
    numbered = enumerate(_body(pieces, dtype) for pieces in windows)
    content, counts = hashlib.sha256(), {}
    for shard in batched(numbered, max(1, SHARD_BYTES // (window * dtype.itemsize))):
        path = folder / f"train-{len(counts):05d}.array_record"
        try:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for index, body in shard:
                content.update(body)
                writer.write(_checksum(body, index) + body)
            writer.close()
        except RuntimeError as error:
            raise DataError(f"{path} cannot be written: {error}") from error
        counts[path.name] = len(shard)
    return counts, content.hexdigest()


def record_dtype(window: int, vocab: int) -> np.dtype:
    """The narrowest of two integer types that holds every id and every length."""
    return np.dtype("<u2" if max(window, vocab - 1) < 1 << 16 else "<u4")


def _body(pieces: Sequence[np.ndarray], dtype: np.dtype) -> bytes:
    lengths = [piece.size for piece in pieces]
    return np.concatenate([*pieces, lengths]).astype(dtype).tobytes()


def _checksum(body: bytes, index: int) -> bytes:
    return zlib.crc32(body, index & 0xFFFFFFFF).to_bytes(CHECKSUM_BYTES, "little")
