"""Log-likelihoods of given tokens: what perplexity-scored tasks are decided by (§4.4.1).

A `Span` is a sequence of tokens of which those from `first` on are scored, each given all before
it. Sequences begin with the eos that precedes every document in training. Where a text is split
into what is given and what is scored, tokens may straddle the split, so what is made equal between
the options of one question decides how it is tokenised:

    options(context, [c1, c2, ...])    context + c jointly, as the model saw text in training;
                                       scored from where the first of them departs from the tokens
                                       of the context alone. All options are then given the very
                                       same tokens, and where one straddles, the scored text of all
                                       begins a little before the split.
    behind([k1, k2, ...], text)        text on its own, behind contexts that differ: the very same
                                       tokens are scored under each (WinoGrande).

A sequence that exceeds the length loses its beginning, eos first, never what is scored. Rows are
independent: those with equal inputs run once (one-token options cost one row together), in
batches of similar length, on few compiled shapes. Logits exist for scored positions only, on a mesh
where their rows are.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from itertools import batched, takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import on_host
from dsv3.training.losses import CHUNK, negative_log_likelihood

POSITIONS = 4096  # of one forward pass: about this many, in whole rows
SHORTEST = 64  # tokens in the shortest row
NOT_FINITE = "the model's log-likelihoods are not finite: its weights are damaged"


class SpanError(UserError):
    """Scored tokens that do not fit the length, or whose score is no number; `index` is the
    span's."""

    def __init__(self, index: int, message: str):
        super().__init__(message)
        self.index = index


class Span(NamedTuple):
    tokens: list[int]
    first: int  # >= 1; tokens[first:] are scored


class Score(NamedTuple):
    """Of a span: -log p of what is scored, how many tokens that is, whether each of them is the
    most likely one, and whether the beginning was cut off to make it fit."""

    nats: float
    tokens: int
    greedy: bool
    cut: bool


def options(tokenizer: Tokenizer, context: str, choices: Sequence[str]) -> list[Span]:
    """A span for each of `choices` behind one `context`; tokenised jointly."""
    given, *wholes = (
        ids.tolist() for ids in tokenizer.encode_batch([context, *(context + c for c in choices)])
    )
    shared = min(_common(given, whole) for whole in wholes)
    return [Span([tokenizer.eos, *whole], 1 + shared) for whole in wholes]


def behind(tokenizer: Tokenizer, contexts: Sequence[str], text: str) -> list[Span]:
    """A span for `text` behind each of `contexts`; tokenised on its own."""
    scored, *given = (ids.tolist() for ids in tokenizer.encode_batch([text, *contexts]))
    return [Span([tokenizer.eos, *ids, *scored], 1 + len(ids)) for ids in given]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def score(
    model: Transformer,
    spans: Sequence[Span],
    length: int,
    vocab: int,
    dtype: jnp.dtype | None = None,
) -> list[Score]:
    """A score for each span, in order. At most `length` tokens precede a token, `dtype` is that of
    the blocks; only ids below `vocab` count as most likely.

    Raises SpanError for a span that scores more than `length` tokens, or none, and where the model
    gives no finite score.
    """
    fitted = kept(spans, length)
    rows: dict[tuple[int, ...], list[int]] = {}  # inputs → the spans that have them
    for index, span in enumerate(fitted):
        rows.setdefault(tuple(span.tokens[:-1]), []).append(index)
    scores: list[Score | None] = [None] * len(spans)
    for size, inputs in _by_size(rows, length):
        for group in batched(inputs, model.shard.even(max(1, POSITIONS // size))):
            here = [(row, index) for row, tokens in enumerate(group) for index in rows[tokens]]
            found = _nats(model, group, size, [(row, fitted[i]) for row, i in here], vocab, dtype)
            for (_, index), (nats, greedy) in zip(here, found, strict=True):
                if not math.isfinite(nats):
                    raise SpanError(index, NOT_FINITE)
                span = fitted[index]
                cut = len(span.tokens) < len(spans[index].tokens)
                scores[index] = Score(nats, len(span.tokens) - span.first, greedy, cut)
    return [found for found in scores if found is not None]


def kept(spans: Sequence[Span], length: int) -> list[Span]:
    """The spans without the beginnings that do not fit. Raises SpanError as `score` does."""
    return [_kept(index, span, length) for index, span in enumerate(spans)]


def _kept(index: int, span: Span, length: int) -> Span:
    scored = len(span.tokens) - span.first
    if not 0 < scored <= length:
        raise SpanError(index, f"{scored} scored tokens do not fit 1 to {length}")
    cut = max(0, len(span.tokens) - length - 1)
    return Span(span.tokens[cut:], span.first - cut)


def _by_size(rows: Iterable[tuple[int, ...]], length: int):
    """(row length, inputs of at most that length), the longest first."""
    sizes: dict[int, list[tuple[int, ...]]] = {}
    for tokens in sorted(rows, key=len, reverse=True):
        sizes.setdefault(min(_power_of_two(len(tokens)), length), []).append(tokens)
    return sizes.items()


def _power_of_two(n: int) -> int:
    return max(SHORTEST, 1 << max(n - 1, 0).bit_length())


def _nats(model, group, size: int, queries: list[tuple[int, Span]], vocab: int, dtype):
    """(-log p, greedy) of the spans in the rows `group`, each given with its row."""
    tokens_BT = np.zeros((model.shard.even(max(1, POSITIONS // size)), size), np.int32)
    for row, tokens in zip(tokens_BT, group, strict=False):
        row[: len(tokens)] = tokens
    ranks = model.shard.data_ranks  # each scores the spans in its rows
    filled, places, rows = [0] * ranks, [], len(tokens_BT) // ranks
    for row, span in queries:
        rank, n = row // rows, len(span.tokens) - span.first
        places.append((rank, slice(filled[rank], filled[rank] + n)))
        filled[rank] += n
    row_nY, position_nY, target_nY = np.zeros((3, ranks, _power_of_two(max(filled))), np.int32)
    for (row, span), here in zip(queries, places, strict=True):
        row_nY[here] = row % rows
        position_nY[here] = np.arange(span.first - 1, len(span.tokens) - 1)
        target_nY[here] = span.tokens[span.first :]
    asked = (x_nY.reshape(-1) for x_nY in (row_nY, position_nY, target_nY))
    found = on_host(_scored(model, tokens_BT, *asked, vocab, dtype))
    nats_nY, greedy_nY = (x.reshape(ranks, -1) for x in found)
    return [
        (float(nats_nY[here].sum(dtype=np.float64)), bool(greedy_nY[here].all())) for here in places
    ]


@functools.partial(jax.jit, static_argnames=("vocab", "dtype"))
def _scored(
    model, tokens_BT: Array, row_Y: Array, position_Y: Array, target_Y: Array, vocab, dtype
):
    """-log p of target_y behind position_y of row_y, and whether it is the most likely: [Y]."""

    def here(
        model: Transformer, tokens_BT: Array, row_Y: Array, position_Y: Array, target_Y: Array
    ):
        h_YD = model.hidden(tokens_BT, dtype=dtype).main_BTD[row_Y, position_Y]

        def chunk(operands):
            h_cD, target_c = operands
            nats_c, log_p_cV = negative_log_likelihood(h_cD, model.head.w[...], target_c)
            return nats_c, jnp.argmax(log_p_cV[:, :vocab], axis=-1) == target_c

        size = min(CHUNK, target_Y.size)
        found = lax.map(chunk, (h_YD.reshape(-1, size, h_YD.shape[-1]), target_Y.reshape(-1, size)))
        return jax.tree.map(lambda x: x.reshape(-1), found)

    rows = tokens_BT, row_Y, position_Y, target_Y
    return model.shard.evaluate(here, model, rows, model.shard.rows)
