"""What a training document undergoes on its way to tokens (§4.1): fill-in-the-middle, and the
splitting of tokens that join punctuation with a line break.

**FIM**, prefix-suffix-middle, of whole documents before packing, at rate `data.fim_rate`:

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>          (else: text <eos>)

The report is silent on the cut points; here they are two uniform draws from the positions between
characters, so a part may be empty and a character is never torn.

**Newline splitting.** A vocabulary with tokens like ".\\n" biases a prompt that ends in "." without
its line break, so at rate `data.newline_split_rate` (the report gives none) such a token is
replaced by the tokens of its two halves. The text stays the same.

Both draw from a generator seeded with `data.seed` and the document's own hash: the same document
comes out the same, whatever stands around it.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

from dsv3.config import Data
from dsv3.data.corpus import Document
from dsv3.data.tokenizer import Tokenizer


class Augmentation:
    """Turns documents into training tokens."""

    def __init__(self, tokenizer: Tokenizer, data: Data):
        self.tokenizer = tokenizer
        self.data = data
        self._halves = joined_tokens(tokenizer)
        self._is_joined = np.zeros(tokenizer.vocab_size, bool)
        self._is_joined[list(self._halves)] = True

    def tokens(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The tokens of each document, `eos` last, int32 [tokens]. Encodes on all cores."""
        draws = [np.random.default_rng([self.data.seed, doc.number]) for doc in documents]
        parts = [
            fim_parts(doc.text, draw) if draw.random() < self.data.fim_rate else (doc.text,)
            for doc, draw in zip(documents, draws, strict=True)
        ]
        encoded = iter(self.tokenizer.encode_batch([part for parts_ in parts for part in parts_]))
        return [
            self._split_joined(self._assemble([next(encoded) for _ in of_document]), draw)
            for of_document, draw in zip(parts, draws, strict=True)
        ]

    def _assemble(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        special = self.tokenizer
        if len(parts) == 1:
            return np.append(parts[0], np.int32(special.eos))
        prefix, suffix, middle = parts
        begin, hole, end, eos = (
            np.array([id], np.int32)
            for id in (special.fim_begin, special.fim_hole, special.fim_end, special.eos)
        )
        return np.concatenate([begin, prefix, hole, suffix, end, middle, eos])

    def _split_joined(self, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        at = np.flatnonzero(self._is_joined[ids])
        at = at[draw.random(at.size) < self.data.newline_split_rate]
        if not at.size:
            return ids
        stretches = np.split(ids, at)  # each but the first begins with a token to split
        halves = [self._halves[int(ids[i])] for i in at]
        pairs = zip(halves, (stretch[1:] for stretch in stretches[1:]), strict=True)
        return np.concatenate([stretches[0], *(array for pair in pairs for array in pair)])


def fim_parts(text: str, draw: np.random.Generator) -> tuple[str, str, str]:
    """`text` cut at two uniform points: its prefix, suffix and middle."""
    start, end = sorted(draw.integers(0, len(text), size=2, endpoint=True))
    return text[:start], text[end:], text[start:end]


def joined_tokens(tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """The tokens that are punctuation or symbols and then line breaks → the ids of the halves."""
    texts = {id: tokenizer.decode([id]) for id in range(tokenizer.vocab_size)}
    joined = {id: text for id, text in texts.items() if _is_joined(text)}
    bodies = [text.rstrip("\r\n") for text in joined.values()]
    breaks = [text[len(body) :] for text, body in zip(joined.values(), bodies, strict=True)]
    halves = zip(tokenizer.encode_batch(bodies), tokenizer.encode_batch(breaks), strict=True)
    return {id: np.concatenate(half) for id, half in zip(joined, halves, strict=True)}


def _is_joined(text: str) -> bool:
    body = text.rstrip("\r\n")
    marks = body.removeprefix(" ")
    is_mark = all(unicodedata.category(character)[0] in "PS" for character in marks)
    return body != text and marks != "" and is_mark
