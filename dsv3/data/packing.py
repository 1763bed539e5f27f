"""Packing documents into windows of equal length with few cuts (Ding et al., arXiv 2404.10830).

Best-fit packing, made to leave no padding, since pre-training has none:

1. A document longer than a window gives whole windows from its start; its rest is a *piece*, as is
   a document that fits.
2. Pieces go, longest first, each into the window with the least room that still holds it, or into
   a new one. No piece is cut here.
3. Windows that are still not full are filled, fullest first, with pieces taken from the emptiest,
   cutting at most the last piece each takes. So at most one more cut for each of these windows.
4. What is left in the end is less than a window. It goes back to the caller, who packs it with the
   documents that come next or drops it.

Step 2 is one operation on an integer for each piece, whose bit r says that some window has room
for r tokens more: the best fit is its lowest set bit at or above the piece's length.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

GROUP_TOKENS = 1 << 24  # packed together: 64 MiB, far more than any window


class Piece(NamedTuple):
    """`length` tokens of document `document` (a number) from token `start` on."""

    document: int
    start: int
    length: int


Window = list[Piece]


def windows(documents: Iterable[np.ndarray], window: int) -> Iterator[list[np.ndarray]]:
    """Pack a stream of documents, int32 [tokens] each, group by group.

    Yields for each window the pieces that fill it: `window` tokens in all. Drops the last few
    tokens that fill none.
    """
    group: list[np.ndarray] = []
    for more in grouped(documents, len, GROUP_TOKENS):
        group += more
        full, rest = pack([document.size for document in group], window)
        for pieces in full:
            yield [group[document][start : start + n] for document, start, n in pieces]
        group = [group[document][start : start + n] for document, start, n in rest]


def grouped[T](items: Iterable[T], size: Callable[[T], int], enough: int) -> Iterator[list[T]]:
    """Lists of consecutive items, each ended by the item that brings its size to `enough`."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= enough:
            yield group
            group, total = [], 0
    if group:
        yield group


def pack(lengths: Sequence[int], window: int) -> tuple[list[Window], list[Piece]]:
    """Windows whose pieces sum to exactly `window` tokens, and the pieces left over.

    lengths: tokens of each document. Every token is in one window or in the rest, once; the rest
    is shorter than a window. The order of equal pieces follows the documents' order.
    """
    whole, pieces = [], []
    for document, length in enumerate(lengths):
        end = length - length % window
        whole += [[Piece(document, start, window)] for start in range(0, end, window)]
        if end < length:
            pieces.append(Piece(document, end, length - end))
    pieces.sort(key=lambda piece: -piece.length)
    filled, rest = _fill(_best_fit(pieces, window), window)
    return whole + filled, rest


def _best_fit(pieces: Sequence[Piece], window: int) -> list[Window]:
    """Windows holding the pieces uncut, the fullest first."""
    windows_by_room: defaultdict[int, list[Window]] = defaultdict(list)
    rooms = 0
    for piece in pieces:
        fitting = rooms >> piece.length << piece.length
        room = (fitting & -fitting).bit_length() - 1 if fitting else window
        best = windows_by_room[room].pop() if fitting else []
        if not windows_by_room[room]:
            rooms &= ~(1 << room)
        best.append(piece)
        room -= piece.length
        windows_by_room[room].append(best)
        rooms |= 1 << room
    return [best for room in sorted(windows_by_room) for best in windows_by_room[room]]


def _fill(windows: Sequence[Window], window: int) -> tuple[list[Window], list[Piece]]:
    """Fill each window from the emptiest ones; the last, where nothing is left, is the rest."""
    filled, waiting = [], deque(windows)
    while waiting:
        current = waiting.popleft()
        room = window - sum(piece.length for piece in current)
        while room and waiting:
            donor = waiting[-1]
            piece = donor.pop()
            taken = min(room, piece.length)
            current.append(piece._replace(length=taken))
            room -= taken
            if taken < piece.length:
                donor.append(Piece(piece.document, piece.start + taken, piece.length - taken))
            if not donor:
                waiting.pop()
        if room:
            return filled, current
        filled.append(current)
    return filled, []
