"""Every window once an epoch, in an order fixed by the seed, resumed exactly from one number."""

import json
from itertools import islice, repeat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import Config, Data, Training
from dsv3.data.loader import Loader
from dsv3.data.prepare import Prepared
from dsv3.data.shards import ShardedWindows, write_shards
from dsv3.errors import DataError

SEQUENCES, WINDOW = 11, 7


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Windows whose every token is the window's number; two shards."""
    folder = tmp_path_factory.mktemp("shards")
    pieces = [[np.full(3, i, np.int32), np.full(4, i, np.int32)] for i in range(SEQUENCES)]
    counts, digest = write_shards(folder, pieces, WINDOW, vocab=100)
    windows = ShardedWindows([folder / name for name in counts], [*counts.values()], WINDOW, 100)
    return Prepared(None, windows, (), digest)


def loader(prepared: Prepared, index: int = 0, count: int = 1, seed: int = 0) -> Loader:
    config = Config(data=Data(seed=seed), training=Training(sequence_length=WINDOW - 1))
    return Loader(prepared, config, index, count)


def order(loader: Loader, sizes) -> list[int]:
    return [int(row[0]) for size in sizes for row in loader.next_batch(size).tokens]


def test_batches_have_the_contracts_shape(prepared):
    batch = loader(prepared).next_batch(5)
    assert batch.tokens.shape == batch.segments.shape == (5, WINDOW)
    assert batch.tokens.dtype == batch.segments.dtype == np.int32
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 2, 2]] * 5


def test_each_epoch_is_another_permutation(prepared):
    taken = np.array(order(loader(prepared), repeat(1, 4 * SEQUENCES))).reshape(4, SEQUENCES)
    assert (np.sort(taken) == np.arange(SEQUENCES)).all()
    assert len({tuple(epoch) for epoch in taken}) == 4


def test_order_follows_the_seed(prepared):
    sizes = [SEQUENCES]
    assert order(loader(prepared), sizes) == order(loader(prepared), sizes)
    assert order(loader(prepared), sizes) != order(loader(prepared, seed=1), sizes)


def test_batch_sizes_do_not_change_the_order(prepared):
    assert order(loader(prepared), [1, 2, 30, 4]) == order(loader(prepared), [37])


def test_resume_is_exact_at_every_position(prepared):
    whole = order(loader(prepared), repeat(1, 3 * SEQUENCES + 5))
    running = loader(prepared)
    for position in range(3 * SEQUENCES):
        state = json.loads(json.dumps(running.state()))
        resumed = loader(prepared)
        resumed.next_batch(3)
        resumed.restore(state)
        assert resumed.state() == running.state()
        assert order(resumed, [1, 4]) == whole[position : position + 5]
        running.next_batch(1)


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), count=st.integers(1, 4))
def test_processes_partition_each_batch(prepared, sizes, count):
    sizes = [size * count for size in sizes]
    shares = [loader(prepared, index, count) for index in range(count)]
    whole = loader(prepared)
    for size in sizes:
        parts = [share.next_batch(size).tokens for share in shares]
        assert {part.shape for part in parts} == {(size // count, WINDOW)}
        together = np.stack(parts, axis=1).reshape(size, WINDOW)
        np.testing.assert_array_equal(together, whole.next_batch(size).tokens)


def test_a_run_may_resume_on_another_number_of_processes(prepared):
    two = [loader(prepared, index, 2) for index in range(2)]
    for share in two:
        share.next_batch(6)
    alone = loader(prepared)
    alone.restore(two[0].state())
    assert order(alone, [9]) == order(loader(prepared), [15])[6:]


def test_batch_that_cannot_be_shared(prepared):
    with pytest.raises(DataError, match="5 sequences cannot be shared by 2 processes"):
        loader(prepared, 0, 2).next_batch(5)


def test_state_of_other_data_is_refused(prepared):
    state = loader(prepared).state()
    other = Prepared(None, prepared.train_shards, (), "other digest")
    for stranger in (loader(other), loader(prepared, seed=1)):
        with pytest.raises(DataError, match=r"other data: corpus, tokenizer, data.seed"):
            stranger.restore(state)
    for broken in ({}, {"position": 3}, {"dataset": 1}):
        with pytest.raises(DataError):
            loader(prepared).restore(broken)


def test_one_window_is_enough(tmp_path):
    counts, digest = write_shards(tmp_path, [[np.arange(WINDOW)]], WINDOW, vocab=100)
    windows = ShardedWindows([tmp_path / name for name in counts], [1], WINDOW, 100)
    assert order(loader(Prepared(None, windows, (), digest)), [3]) == [0, 0, 0]


def test_several_shards_and_wide_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3.data.shards.SHARD_BYTES", 3 * 4 * WINDOW)
    pieces = [[np.full(WINDOW, 128_000 + i, np.int32)] for i in range(SEQUENCES)]
    counts, digest = write_shards(tmp_path, pieces, WINDOW, vocab=129_280)
    assert list(counts.values()) == [3, 3, 3, 2]
    paths = [tmp_path / name for name in counts]
    windows = ShardedWindows(paths, list(counts.values()), WINDOW, 129_280)
    taken = order(loader(Prepared(None, windows, (), digest)), [SEQUENCES])
    assert sorted(taken) == [128_000 + i for i in range(SEQUENCES)]
    paths[2].write_bytes(paths[0].read_bytes())  # sound records, but not the ones asked for
    swapped = ShardedWindows(paths, list(counts.values()), WINDOW, 129_280)
    with pytest.raises(DataError, match=r"train-00002.array_record is damaged"):
        list(islice((swapped[index] for index in range(SEQUENCES)), SEQUENCES))
