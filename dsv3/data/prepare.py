"""From configuration to training data: made once, kept in `data.cache`, checked when opened.

A folder of the cache is named by a hash of all that determines its content, so any change of
corpus, tokenizer, rates, seed or sequence length makes another one. It is built under another
name, fsynced and renamed: it is whole or absent, whoever is killed. A lock keeps concurrent runs
from doing the work twice. Opening it checks the SHA-256 of every file (about 1 s for 2 GB), and
reading checks every record again (`shards`).
"""

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.config import Config
from dsv3.data.build import Progress, build
from dsv3.data.corpus import Corpus, Document
from dsv3.data.index import read_index
from dsv3.data.shards import ShardedWindows, SyntheticWindows, Windows
from dsv3.data.tokenizer import Tokenizer, load, ready_made
from dsv3.errors import DataError
from dsv3.files import fsync_directory, fsync_tree, locked
from dsv3.parallel.processes import exchange, is_first, together

FORMAT = 1  # raise it with any change of code that changes what is made


@dataclass(frozen=True)
class Prepared:
    """What a run needs to know of its data.

    tokenizer: None for synthetic data. train_shards: the training windows by index. held_out:
    documents never trained on, none for synthetic data. digest: a SHA-256 that identifies training
    windows and tokenizer; a checkpoint keeps it. facts: counts, empty for synthetic data.
    """

    tokenizer: Tokenizer | None
    train_shards: Windows
    held_out: tuple[Document, ...]
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """One line for the log: documents, tokens, bytes per token, what was left out."""
        if self.tokenizer is None:
            return "synthetic: uniform random tokens"
        facts = self.facts
        skipped = ", ".join(f"{count} {why}" for why, count in facts["skipped"].items())
        return (
            f"{facts['documents']:,} documents, {facts['tokens']:,} tokens of "
            f"{facts['bytes_per_token']:.2f} bytes in {facts['sequences']:,} sequences; "
            f"held out {facts['held_out_documents']:,} documents, "
            f"{facts['held_out_bytes']:,} bytes; left out: {skipped or 'nothing'}"
        )


def prepare(config: Config, progress: Progress | None = None) -> Prepared:
    """The data of a run, made now or taken from `data.cache`.

    Of several processes the first makes it, and the others find it, or make it on their own disks.
    Raises DataError on a corpus or tokenizer that cannot be used, a damaged cache or a full disk.
    """
    prepared = None
    with together(DataError):
        if is_first():
            prepared = _prepared(config, progress or _silent)
    with together(DataError):
        prepared = prepared or _prepared(config, _silent)
    if len(set(exchange(prepared.digest))) > 1:
        raise DataError(f"data.corpus = {config.data.corpus!r} is not the same on all hosts")
    return prepared


def _prepared(config: Config, progress: Progress) -> Prepared:
    if config.data.corpus == "synthetic":
        return _synthetic(config)
    corpus = Corpus(config.data)
    trained = config.data.tokenizer == "bpe"
    definition = None if trained else ready_made(config.data.tokenizer)
    cache = Path(config.data.cache).expanduser()
    folder = cache / _cache_name(config, corpus, definition)
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f".{folder.name}.lock"):
                if not folder.exists():
                    _make(folder, config, corpus, definition, progress)
        return _open(folder, config)
    except OSError as error:
        where = error.filename or cache
        raise DataError(f"data.cache cannot be used: {where}: {error.strerror}") from error


def _silent(what: str, done: int, total: int | None) -> None:
    pass


def _synthetic(config: Config) -> Prepared:
    window, vocab, seed = config.training.sequence_length + 1, config.model.vocab, config.data.seed
    digest = hashlib.sha256(f"synthetic {window} {vocab} {seed}".encode()).hexdigest()
    return Prepared(None, SyntheticWindows(window, vocab, seed), (), digest)


def _require_fit(tokenizer: Tokenizer, config: Config) -> None:
    if tokenizer.vocab_size > config.model.vocab:
        raise DataError(
            f"data.tokenizer = {config.data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab = {config.model.vocab}"
        )


def _cache_name(config: Config, corpus: Corpus, definition: str | None) -> str:
    """The corpus' name and a hash of everything that determines the prepared data."""
    content = {
        "format": FORMAT,
        "library": importlib.metadata.version("tokenizers"),
        "corpus": corpus.digest(),
        "tokenizer": definition or f"bpe {config.model.vocab}",
        "sequence_length": config.training.sequence_length,
    }
    fields = ("text_field", "max_bytes", "held_out", "seed", "fim_rate", "newline_split_rate")
    content |= {name: getattr(config.data, name) for name in fields}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    label = re.sub(r"[^A-Za-z0-9]+", "_", Path(config.data.corpus).name).strip("_") or "corpus"
    return f"{label[:32]}-{key[:16]}"


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as file:
        locked(file.fileno())
        yield


def _make(
    folder: Path, config: Config, corpus: Corpus, definition: str | None, progress: Progress
) -> None:
    """Make `folder` by way of a temporary one beside it, of which nothing stays."""
    if definition is not None:
        _require_fit(Tokenizer(definition, f"data.tokenizer = {config.data.tokenizer!r}"), config)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    building.mkdir()
    try:
        build(building, config, corpus, definition, progress)
        fsync_tree(building)
        building.rename(folder)
        fsync_directory(folder.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _open(folder: Path, config: Config) -> Prepared:
    facts = read_index(folder)
    tokenizer = load(folder / "tokenizer.json")
    _require_fit(tokenizer, config)
    shards = ShardedWindows(
        [folder / name for name in facts["shards"]],
        list(facts["shards"].values()),
        config.training.sequence_length + 1,
        tokenizer.vocab_size,
    )
    lines = (folder / "held_out.jsonl").read_text().splitlines()
    held_out = tuple(Document(**json.loads(line)) for line in lines)
    return Prepared(tokenizer, shards, held_out, facts["digest"], facts)
