"""Bits per byte of held-out text: what language modelling is measured in (§4.4.1, Pile-test).

    BPB = sum over documents and tokens of -log2 p(token | what precedes it)  /  UTF-8 bytes

The tokenizer's freedom cancels: few dear tokens cost what many cheap ones do. What is counted:

- Each document stands alone, behind the eos that precedes every document in training; no token
  sees another document.
- Each token of the text is scored exactly once. The first window of `length` tokens, the length
  trained on, is scored whole; each further one reaches on by three quarters of that and is scored
  there only, so that at least a quarter of a window precedes its tokens. The last window ends with
  the document. The price is 4/3 positions of a forward pass for a token.
- The eos behind a document is not scored, as in lm-evaluation-harness; the compressor to compare
  with (`xz -9`, over all documents at once) does not store where documents end either.
- Bytes are those of the original text, which the tokenizer reproduces exactly.

Logits are held for one chunk of positions at a time, FP32, by the head of the training loss.
"""

import functools
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import batched
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3.config import Data
from dsv3.data.build import take_survey
from dsv3.data.corpus import Corpus, Document
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, DataError
from dsv3.evaluation.scoring import NOT_FINITE
from dsv3.model.transformer import Transformer
from dsv3.training.losses import head_loss

POSITIONS = 4096  # of one forward pass: about this many, in whole windows


class BitsPerByte(NamedTuple):
    """What was spent on what; `value` is the ratio."""

    bits: float
    bytes: int
    tokens: int

    @property
    def value(self) -> float:
        return self.bits / self.bytes


def held_out(data: Data) -> list[Document]:
    """The documents that a run with this `data` never trains on, read from the corpus again.

    Raises DataError where the corpus is missing or cannot be read, or is synthetic.
    """
    if data.corpus == "synthetic":
        raise DataError("data.corpus = 'synthetic' holds no text; bind data.corpus to some")
    corpus = Corpus(data)
    survey = take_survey(corpus, lambda what, done, total: None)
    return [document for document in corpus.documents() if survey.holds_out(document)]


def held_out_texts(documents: Iterable[Document], limit: int) -> list[str]:
    """`limit` bytes of text, or all: documents in the order of their hashes, the last one cut."""
    texts, left = [], limit
    for document in sorted(documents, key=lambda document: document.number):
        content = document.text.encode()[:left]
        texts.append(content.decode(errors="ignore"))
        left -= len(content)
    return [text for text in texts if text]


class Window(NamedTuple):
    """A stretch of one document behind eos: scores the tokens at `first` <= i < `end`."""

    tokens_S: np.ndarray  # int32 [length + 1], zeros behind `end`
    first: int
    end: int


def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    length: int,
    dtype: jnp.dtype | None = None,
) -> BitsPerByte:
    """BPB of `texts` in windows of `length` tokens, blocks computed in `dtype`.

    Raises DataError where the texts hold no byte, CheckpointError where a model gives no number.
    """
    size = sum(len(text.encode()) for text in texts)
    if size == 0:
        raise DataError("there is no held-out text to score")
    documents = tokenizer.encode_batch(texts)
    rows = model.shard.even(max(1, POSITIONS // length))
    every_window = (w for ids in documents for w in windows(ids, tokenizer.eos, length))
    batches = (_stacked(group, rows, length) for group in batched(every_window, rows))
    nats = [_nats(model, tokens_BS, scored_BT, dtype) for tokens_BS, scored_BT in batches]
    if not np.isfinite(nats).all():
        raise CheckpointError(NOT_FINITE)
    bits = math.fsum(map(float, nats)) / math.log(2)
    return BitsPerByte(bits, size, sum(map(len, documents)))


def windows(ids: np.ndarray, eos: int, length: int) -> Iterator[Window]:
    """The windows of a document of tokens `ids`; together they score each of them once."""
    text_S = np.concatenate([[eos], ids]).astype(np.int32)
    scored = 0  # of ids
    while scored < len(ids):
        reach = max(length * 3 // 4, 1) if scored else length
        end = min(scored + reach, len(ids))
        start = max(0, end - length)
        tokens_S = np.zeros(length + 1, np.int32)
        tokens_S[: end + 1 - start] = text_S[start : end + 1]
        yield Window(tokens_S, scored + 1 - start, end + 1 - start)
        scored = end


def _stacked(group: Sequence[Window], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [rows, length + 1] and which targets to score, float32 [rows, length]."""
    tokens_BS = np.zeros((rows, length + 1), np.int32)
    scored_BT = np.zeros((rows, length), np.float32)
    for row, window in enumerate(group):
        tokens_BS[row] = window.tokens_S
        scored_BT[row, window.first - 1 : window.end - 1] = 1
    return tokens_BS, scored_BT


@functools.partial(jax.jit, static_argnames="dtype")
def _nats(model: Transformer, tokens_BS: Array, scored_BT: Array, dtype) -> Array:
    """Sum of -log p of the scored targets, float32."""

    def here(model: Transformer, tokens_BS: Array, scored_BT: Array) -> Array:
        h_BTD = model.hidden(tokens_BS[:, :-1], dtype=dtype).main_BTD
        h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
        target_X, scored_X = tokens_BS[:, 1:].reshape(-1), scored_BT.reshape(-1)
        return model.shard.sum(head_loss(h_XD, model.head.w[...], target_X, scored_X))

    return model.shard.evaluate(here, model, (tokens_BS, scored_BT), jax.P())


def compressor_bits_per_byte(texts: Sequence[str]) -> float:
    """What `xz -9` reaches on the texts, concatenated: a bar that a language model should clear."""
    content = "".join(texts).encode()
    if not content:
        raise DataError("there is no held-out text to compress")
    return 8 * len(lzma.compress(content, preset=9)) / len(content)
