"""Batches for training: a deterministic, infinite, exactly resumable walk over the windows.

`grain` shuffles the windows anew each epoch, by a permutation computed from (seed, epoch, index),
so the n-th sequence of a run is found at once for any n. The position, one number, is therefore
the whole state: batches of any size, changing between calls, resume to the exact sequence.

A batch is defined over all processes. Each reads the rows that its own devices hold under the
sharding that the mesh gives a batch, and together they are one global array. What a step trains on
does not depend on the number of processes or on the mesh, and a run may resume on another.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from dsv3.config import Config
from dsv3.data.prepare import Prepared
from dsv3.errors import DataError


class Batch(NamedTuple):
    """Tokens and, from 1 on, the number of the document each belongs to within its sequence.

    Position t predicts t + 1, so T+1 tokens make T predictions. Segment 0 would be padding, of
    which pre-training has none.
    """

    tokens: np.ndarray | jax.Array  # int32 [B, T+1]
    segments: np.ndarray | jax.Array  # int32 [B, T+1]


class Loader:
    """Batches in the order of `data.seed`: on the host, or lying as `sharding` of [B, T+1] says."""

    def __init__(
        self, prepared: Prepared, config: Config, sharding: jax.sharding.Sharding | None = None
    ):
        source = grain.MapDataset.source(prepared.train_shards)
        self._windows = source.seed(config.data.seed).shuffle().repeat()
        self._length = config.training.sequence_length + 1
        self._sharding = sharding
        order = f"{prepared.digest} {config.data.seed}"
        self._dataset = hashlib.sha256(order.encode()).hexdigest()
        self._position = 0  # sequences taken by all processes together

    def next_batch(self, sequences: int) -> Batch:
        """The next `sequences` sequences: [sequences, T+1].

        Of a sharded batch this process reads what its devices hold. Raises DataError where it
        cannot be cut as the sharding says.
        """
        first, sharding = self._position, self._sharding
        if sequences <= 0:
            raise DataError(f"a batch of {sequences} sequences")
        if sharding is None:
            self._position += sequences
            return self._read(range(first, first + sequences))
        shape = (sequences, self._length)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            devices = len(sharding.device_set)
            raise DataError(
                f"a batch of {sequences} sequences cannot be cut evenly over {devices} devices"
            ) from error
        rows = {
            device: range(sequences)[index[0]]  # pyrefly: ignore[unsupported-operation]
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        }
        held = {r: self._read([first + row for row in r]) for r in dict.fromkeys(rows.values())}
        self._position += sequences
        return Batch(*(
            jax.make_array_from_single_device_arrays(
                shape, sharding, [jax.device_put(held[r][part], d) for d, r in rows.items()]
            )
            for part in range(len(Batch._fields))
        ))  # fmt: skip

    def _read(self, numbers: Sequence[int]) -> Batch:
        tokens, segments = zip(*(self._windows[number] for number in numbers), strict=True)
        return Batch(np.stack(tokens), np.stack(segments))

    def state(self) -> dict[str, Any]:
        """What `restore` wants, as JSON: the position and which data in which order it is in."""
        return {"position": self._position, "dataset": self._dataset}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken after.

        Raises DataError where the state is of other data, another seed or sequence length.
        """
        if state.get("dataset") != self._dataset:
            raise DataError(
                "the checkpoint was trained on other data: the files of the corpus, all of data.* "
                "and training.sequence_length must be as they were"
            )
        self._position = int(state["position"])
