"""Pieces: a fingerprint that no cut changes, arrays written and read without ever being whole."""

import math

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.checkpoint import arrays, pieces
from dsv3.checkpoint.manifest import DamageError, Manifest
from dsv3.checkpoint.pieces import GOLDEN, MIX, Grid, cut, fingerprint
from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError
from tests.checkpoint.states import assert_same_bits

DTYPES = ("bool", "int8", "bfloat16", "float8_e4m3fn", "float32", "int64", "complex128")


def bits(shape, dtype, seed):
    dtype = np.dtype(getattr(jnp, dtype).dtype if "float8" in dtype or "bf" in dtype else dtype)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * dtype.itemsize)
    if dtype.kind == "b":
        return np.frombuffer(raw, np.uint8).reshape(shape) > 127
    return np.frombuffer(raw, dtype).reshape(shape)


@st.composite
def grids(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    return Grid(shape, tuple(draw(st.integers(1, max(1, n))) for n in shape))


def parts(array, grid):
    for number in range(grid.size):
        box = grid.box(number)
        yield array[box], tuple(side.start for side in box)


class TestFingerprint:
    @given(grids(), st.sampled_from(DTYPES), st.integers(0, 99))
    def test_is_the_same_however_cut(self, grid, dtype, seed):
        array = bits(grid.shape, dtype, seed)
        whole = fingerprint(array, (0,) * array.ndim, array.shape)
        assert whole == sum(fingerprint(*part, array.shape) for part in parts(array, grid)) % 2**64

    def test_is_what_the_formula_says(self, monkeypatch):
        monkeypatch.setattr(pieces, "_BLOCK", 7)
        array, total = bits((5, 9), "uint16", 0), 0
        for position, element in enumerate(array.reshape(-1).tolist()):
            word = element + position * int(GOLDEN)
            for factor in MIX:
                word = word * int(factor) % 2**64
                word ^= word >> 32
            total += word
        assert fingerprint(array, (0, 0), (5, 9)) == total % 2**64

    @given(st.binary(min_size=8, max_size=64), st.data())
    def test_every_flip_of_a_bit_changes_it(self, raw, data):
        array = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint8).copy()
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        known = fingerprint(array.view(f"u{width}"), (0,), (len(array) // width,))
        array[data.draw(st.integers(0, len(array) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert fingerprint(array.view(f"u{width}"), (0,), (len(array) // width,)) != known

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64"])
    def test_exchanges_and_lost_ranges_change_it(self, dtype):
        array = bits((8, 16), dtype, 1)
        sign = np.array(1 << (8 * array.itemsize - 1), f"u{array.itemsize}")

        def of(changed):
            return fingerprint(changed, (0, 0), array.shape)

        def flipped(*places):
            words = array.view(sign.dtype).copy()
            for place in places:
                words[place] ^= sign
            return words

        seen = {of(array), of(array[::-1]), of(array[:, ::-1]), of(np.roll(array, 1, 0))}
        seen |= {of(np.roll(array, 1, 1)), of(array.reshape(16, 8).T.copy()), of(-array)}
        seen |= {of(np.where(np.arange(8)[:, None] < n, 0, array)) for n in range(1, 9)}
        seen |= {of(flipped((0, i), (7, j))) for i in range(16) for j in range(16)}
        seen |= {of(bits((8, 16), dtype, 2)), fingerprint(array, (8, 0), (16, 16))}
        assert len(seen) == 7 + 8 + 256 + 2


@given(grids(), st.data())
def test_the_chunks_within_a_box_are_those_that_it_touches(grid, data):
    box = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2)))) for n in grid.shape)
    touched = np.zeros(grid.shape, int)
    for number in range(grid.size):
        assert grid.number(tuple(side.start for side in grid.box(number))) == number
        touched[grid.box(number)] = number
    assert sorted(grid.within(box)) == (np.unique(touched[box]).tolist() if touched.size else [])


@pytest.mark.parametrize(
    ("part", "chunk"),
    [
        ((8, 6, 4), (1, 3, 4)),
        ((4, 3, 4), (1, 3, 4)),
        ((7, 1, 4), (2, 1, 4)),
        ((1, 1, 3), (1, 1, 3)),
    ],
)
def test_chunks_are_small_and_end_where_parts_do(monkeypatch, part, chunk):
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 48)
    shape = tuple(n if i == 2 else 2 * n for i, n in enumerate(part))
    assert pieces._grid(part, part, np.dtype(np.float32)).chunk == chunk
    grid = pieces._grid(shape, part, np.dtype(np.float32))
    assert all(n % c == 0 for n, c, s in zip(part, grid.chunk, shape, strict=True) if n != s)


def test_arrays_are_read_by_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 400)
    monkeypatch.setattr(arrays, "BATCH", 2000)
    w, v = bits((6, 5, 10, 9), "float32", 0), bits((7,), "bfloat16", 1)
    store = Store(tmp_path, 3, pytest.fail)
    store.save(1, {"w": w, "v": v}, {"from": "elsewhere"})
    reader = store.open()
    assert (reader.step, reader.extra) == (1, {"from": "elsewhere"})
    assert reader.shapes["w"] == (w.shape, w.dtype) and reader.shapes["v"] == (v.shape, v.dtype)
    for index in [(), (5,), (0, 4), (3, 2, 9), (1, 1, 1, 1)]:
        assert_same_bits(reader.read("w", index), w[index])
    assert_same_bits(store.restore({"w": w, "v": v}).state["w"], jnp.asarray(w))


def test_arrays_are_an_orbax_checkpoint(tmp_path):
    w = bits((6, 5), "bfloat16", 0)
    Store(tmp_path, 3, pytest.fail).save(1, {"w": w, "n": np.int32(3)}, {})
    found = ocp.PyTreeCheckpointHandler().restore(tmp_path / "step-1" / "arrays")
    assert_same_bits(found, {"w": w, "n": np.int32(3)})


def test_a_reader_finds_damage_when_it_gets_there(tmp_path):
    warned = []
    store = Store(tmp_path, 3, warned.append)
    for step in (1, 2):
        store.save(step, {"w": np.full((4, 1 << 19), step, np.float32)}, {})
    data = max((tmp_path / "step-2").rglob("d/*"), key=lambda path: path.stat().st_size)
    reader = store.open()
    with open(data, "r+b") as file:
        file.seek(data.stat().st_size // 2)
        file.write(b"\1")
    reader = store.open()
    assert reader.step == 2 and not warned
    with pytest.raises(CheckpointError, match=r"step-2 is damaged: .*; the same command takes"):
        for row in range(4):
            reader.read("w", (row,))
    assert len(warned) == 1 and store.open().step == 1
    assert store.open().read("w", (3,)).max() == 1


def test_processes_without_a_common_disk_are_told(tmp_path):
    Manifest.of(tmp_path, 1, {}).write(tmp_path, part=0)
    with pytest.raises(DamageError, match="process 1 wrote nothing here: all need the same disk"):
        Manifest.join(tmp_path, 1, processes=2)


def test_cut_wants_arrays():
    with pytest.raises(TypeError, match=r"lr is 0\.1; a checkpoint holds arrays"):
        cut("lr", 0.1)
