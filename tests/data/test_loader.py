"""Every window once an epoch, in an order fixed by the seed, resumed exactly from one number."""

import json
from itertools import islice, repeat

import jax
import numpy as np
import pytest

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


def loader(prepared: Prepared, seed: int = 0, sharding=None) -> Loader:
    config = Config(data=Data(seed=seed), training=Training(sequence_length=WINDOW - 1))
    return Loader(prepared, config, sharding)


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


@pytest.mark.parametrize("spec", [jax.P(), jax.P("a")])
def test_a_sharded_batch_is_the_same_batch(prepared, spec):
    mesh = jax.make_mesh((1,), ("a",))
    sharding = jax.NamedSharding(mesh, spec)
    sharded, whole = loader(prepared, sharding=sharding), loader(prepared)
    for size in (5, 3):
        found, wanted = sharded.next_batch(size), whole.next_batch(size)
        assert found.tokens.sharding == found.segments.sharding == sharding
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.segments, wanted.segments)
    assert sharded.state() == whole.state()


def test_a_batch_of_nothing(prepared):
    with pytest.raises(DataError, match="a batch of 0 sequences"):
        loader(prepared).next_batch(0)


def test_state_of_other_data_is_refused(prepared):
    state = loader(prepared).state()
    other = Prepared(None, prepared.train_shards, (), "other digest")
    for stranger in (loader(other), loader(prepared, seed=1)):
        with pytest.raises(DataError, match=r"other data: .* all of data"):
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
