"""Batches for training: a deterministic, infinite, exactly resumable walk over the windows.

`grain` shuffles the windows anew each epoch, by a permutation computed from (seed, epoch, index),
so the n-th sequence of a run is found at once for any n. The position, one number, is therefore
the whole state: batches of any size, changing between calls, resume to the exact sequence.

A batch is defined over all processes, each of which takes every `process_count`-th row of it. What
a step trains on does not depend on the number of processes, and a run may resume on another.
"""

import hashlib
from typing import Any, NamedTuple

import grain
import numpy as np

from dsv3.config import Config
from dsv3.data.prepare import Prepared
from dsv3.errors import DataError


class Batch(NamedTuple):
    """Tokens and, from 1 on, the number of the document each belongs to within its sequence.

    Position t predicts t + 1, so T+1 tokens make T predictions. Segment 0 would be padding, of
    which pre-training has none.
    """

    tokens: np.ndarray  # int32 [B, T+1]
    segments: np.ndarray  # int32 [B, T+1]


class Loader:
    """The batches of process `process_index` of `process_count`, in the order of `data.seed`."""

    def __init__(
        self, prepared: Prepared, config: Config, process_index: int = 0, process_count: int = 1
    ):
        source = grain.MapDataset.source(prepared.train_shards)
        self._windows = source.seed(config.data.seed).shuffle().repeat()
        self._process_index = process_index
        self._process_count = process_count
        order = f"{prepared.digest} {config.data.seed}"
        self._dataset = hashlib.sha256(order.encode()).hexdigest()
        self._position = 0  # sequences taken by all processes together

    def next_batch(self, sequences: int) -> Batch:
        """This process' share of the next `sequences` sequences: [sequences / processes, T+1]."""
        if sequences <= 0 or sequences % self._process_count:
            raise DataError(
                f"a batch of {sequences} sequences cannot be shared by {self._process_count} "
                "processes"
            )
        end = self._position + sequences
        rows = range(self._position + self._process_index, end, self._process_count)
        tokens, segments = zip(*(self._windows[row] for row in rows), strict=True)
        self._position = end
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
                "the checkpoint was trained on other data: corpus, tokenizer, data.seed and "
                "training.sequence_length must be as they were"
            )
        self._position = int(state["position"])
