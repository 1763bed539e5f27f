"""The making of prepared data: corpus → tokenizer, training windows, held-out documents.

The corpus is streamed three times: to survey it, to train the tokenizer, to make tokens.

**Held-out documents** are those with the smallest hashes, about `data.held_out` of all: the same
whatever their order, the seed or the other documents are. At least one document is held out and
at least one is trained on. The tokenizer learns from the training documents only.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3.config import Config
from dsv3.data.augmentation import Augmentation
from dsv3.data.corpus import Corpus, Document
from dsv3.data.index import write_index
from dsv3.data.packing import grouped, windows
from dsv3.data.shards import write_shards
from dsv3.data.tokenizer import Tokenizer, train_bpe
from dsv3.errors import DataError
from dsv3.files import write_atomically

BATCH_CHARACTERS = 1 << 22  # encoded at once
NUMBERS = 1 << 256  # Document.number is below this

Progress = Callable[[str, int, int | None], None]  # what, characters done, in all if known


class Survey(NamedTuple):
    """What the first pass finds. Documents whose number is below `threshold` are held out."""

    threshold: int
    characters: int

    def holds_out(self, document: Document) -> bool:
        return document.number < self.threshold


def build(
    folder: Path, config: Config, corpus: Corpus, definition: str | None, progress: Progress
) -> None:
    """Fill the empty `folder` with tokenizer.json, shards, held_out.jsonl and their index.

    definition: a tokenizer.json's text; None trains a BPE. Raises DataError on bad input.
    """
    window = config.training.sequence_length + 1
    survey = take_survey(corpus, progress)
    if definition is None:
        definition = train_bpe(
            _training_texts(corpus, survey, progress), config.model.vocab, survey.characters
        )
    tokenizer = Tokenizer(definition, "the trained tokenizer")
    tokenizer.save(folder / "tokenizer.json")
    facts, held_out = Counter(), []
    arrays = _token_arrays(
        _set_aside(corpus.documents(), survey, facts, held_out, progress),
        Augmentation(tokenizer, config.data),
        facts,
    )
    counts, digest = write_shards(folder, windows(arrays, window), window, tokenizer.vocab_size)
    if not counts:
        raise DataError(
            f"data.corpus = {config.data.corpus!r} has {facts['tokens']} tokens to train on, less "
            f"than one sequence of training.sequence_length + 1 = {window}"
        )
    lines = (json.dumps(document._asdict()) + "\n" for document in held_out)
    write_atomically(folder / "held_out.jsonl", "".join(lines))
    identity = hashlib.sha256(f"{window} {tokenizer.digest} {digest}".encode()).hexdigest()
    write_index(
        folder,
        dict(facts)
        | {"digest": identity, "shards": counts, "sequences": sum(counts.values())}
        | {"bytes_per_token": facts["bytes"] / facts["tokens"], "skipped": dict(corpus.skipped)},
    )


def take_survey(corpus: Corpus, progress: Progress) -> Survey:
    """Choose what is held out. Raises DataError where there are no two documents."""
    smallest, largest, characters = NUMBERS, -1, 0
    for document in corpus.documents():
        number = document.number
        smallest, largest = min(smallest, number), max(largest, number)
        characters += len(document.text)
        progress("reading the corpus", characters, None)
    if smallest >= largest:
        limit = corpus.data.max_bytes
        within = "" if limit is None else f" within data.max_bytes = {limit}"
        raise DataError(
            f"data.corpus = {corpus.data.corpus!r} has {int(largest >= 0)} document{within}; "
            "one to train on and one to hold out are needed"
        )
    threshold = min(max(int(corpus.data.held_out * NUMBERS), smallest + 1), largest)
    return Survey(threshold, characters)


def _training_texts(corpus: Corpus, survey: Survey, progress: Progress) -> Iterator[str]:
    done = 0
    for document in corpus.documents():
        if not survey.holds_out(document):
            yield document.text
        done += len(document.text)
        progress("training the tokenizer", done, survey.characters)


def _set_aside(
    documents: Iterable[Document],
    survey: Survey,
    facts: Counter,
    held_out: list[Document],
    progress: Progress,
) -> Iterator[Document]:
    """The documents to train on; the others go to `held_out`, the counts of both to `facts`."""
    done = 0
    for document in documents:
        aside = survey.holds_out(document)
        facts["held_out_documents" if aside else "documents"] += 1
        facts["held_out_bytes" if aside else "bytes"] += len(document.text.encode())
        if aside:
            held_out.append(document)
        else:
            yield document
        done += len(document.text)
        progress("making tokens", done, survey.characters)


def _token_arrays(
    documents: Iterable[Document], augmentation: Augmentation, facts: Counter
) -> Iterator[np.ndarray]:
    for batch in grouped(documents, lambda document: len(document.text), BATCH_CHARACTERS):
        for tokens in augmentation.tokens(batch):
            facts["tokens"] += tokens.size
            yield tokens
