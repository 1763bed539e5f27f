"""Windows are full, no token is lost or used twice, and few documents are cut."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import packing
from dsv3.data.packing import Piece, grouped, pack, windows


@given(lengths=st.lists(st.integers(1, 40), max_size=60), window=st.integers(2, 17))
def test_every_token_once_in_full_windows(lengths, window):
    full, rest = pack(lengths, window)
    assert all(sum(piece.length for piece in pieces) == window for pieces in full)
    assert sum(piece.length for piece in rest) < window
    uses = [np.zeros(length, int) for length in lengths]
    for document, start, length in [piece for pieces in full for piece in pieces] + rest:
        assert length > 0
        uses[document][start : start + length] += 1
    assert all((use == 1).all() for use in uses)


@given(lengths=st.lists(st.integers(1, 40), max_size=60), window=st.integers(2, 17))
def test_cuts_are_few(lengths, window):
    """No more than the lengths force, plus one for each window that best fit left unfilled."""
    full, rest = pack(lengths, window)
    pieces = sum(map(len, full)) + len(rest)
    forced = sum(-(-length // window) for length in lengths)
    assert forced <= pieces <= forced + len(full)


def test_best_fit_by_hand():
    full, rest = pack([6, 9, 4, 1, 25], 10)
    assert full == [
        [Piece(4, 0, 10)],
        [Piece(4, 10, 10)],
        [Piece(0, 0, 6), Piece(2, 0, 4)],
        [Piece(1, 0, 9), Piece(3, 0, 1)],
    ]
    assert rest == [Piece(4, 20, 5)]


def test_unfilled_windows_take_from_the_emptiest():
    full, rest = pack([7, 6, 6], 10)
    assert full == [[Piece(0, 0, 7), Piece(2, 0, 3)]]
    assert rest == [Piece(1, 0, 6), Piece(2, 3, 3)]


def test_groups_of_a_stream_hand_on_their_rest(monkeypatch):
    monkeypatch.setattr(packing, "GROUP_TOKENS", 50)
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    ends = np.cumsum(lengths)
    stream = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    packed = [np.concatenate(pieces) for pieces in windows(iter(stream), 16)]
    assert all(window.size == 16 for window in packed)
    seen = np.concatenate(packed)
    assert np.unique(seen).size == seen.size > ends[-1] - 16


def test_no_documents_no_windows():
    assert list(windows([], 8)) == []
    assert list(windows([np.arange(7)], 8)) == []


def test_grouped_ends_a_list_when_it_is_large_enough():
    assert list(grouped([3, 3, 1, 9, 2], int, 5)) == [[3, 3], [1, 9], [2]]


def test_packing_a_large_corpus_is_fast():
    lengths = np.random.default_rng(0).geometric(1 / 600, 50_000).tolist()
    start = time.process_time()
    pack(lengths, 513)
    assert time.process_time() - start < 5  # about 0.3 s
