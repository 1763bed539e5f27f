"""Prepared data is whole or absent, the same for the same input, and never silently damaged."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.config import Config, Data, Model, Training
from dsv3.data import prepare as preparation
from dsv3.data import shards
from dsv3.data.corpus import Corpus
from dsv3.data.index import read_index, write_index
from dsv3.data.prepare import Prepared, prepare
from dsv3.errors import DataError

ROOT = Path(__file__).parents[2]


def corpus_at(folder: Path, documents: int = 60) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(documents):
        text = f"def function_{i}(x):\n    return [x, {i}];\n\n" * (1 + i % 7)
        (folder / f"{i:03}.py").write_text(text + "<｜end▁of▁sentence｜><｜fim▁hole｜>")
    return folder


def config(base: Path, vocab: int = 300, length: int = 32, **data: Any) -> Config:
    defaults: dict[str, Any] = {
        "corpus": str(base / "corpus"),
        "cache": str(base / "cache"),
        "held_out": 0.1,
    }
    return Config(
        model=Model(vocab=vocab, mtp_depths=0),
        data=Data(**(defaults | data)),
        training=Training(sequence_length=length),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Prepared]:
    base = tmp_path_factory.mktemp("made")
    corpus_at(base / "corpus")
    return base, prepare(config(base))


def folder_of(prepared: Prepared) -> Path:
    return prepared.train_shards.paths[0].parent


def test_training_and_held_out_documents_are_the_corpus(made):
    base, prepared = made
    documents = list(Corpus(config(base).data).documents())
    held_out = set(prepared.held_out)
    assert 0 < len(held_out) < 20
    assert held_out < set(documents)
    facts, trained = prepared.facts, [d for d in documents if d not in held_out]
    assert facts["documents"] == len(trained)
    assert facts["held_out_documents"] == len(held_out)
    assert facts["bytes"] == sum(len(d.text.encode()) for d in trained)
    assert facts["held_out_bytes"] == sum(len(d.text.encode()) for d in held_out)
    assert facts["bytes_per_token"] == facts["bytes"] / facts["tokens"]
    assert facts["sequences"] == len(prepared.train_shards) == facts["tokens"] // 33
    assert f"{facts['tokens']:,} tokens" in prepared.describe()


def test_windows_are_full_numbered_and_hold_no_user_made_special(made):
    _, prepared = made
    tokenizer, eos = prepared.tokenizer, 0
    for index in range(len(prepared.train_shards)):
        tokens, segments = prepared.train_shards[index]
        assert tokens.shape == segments.shape == (33,)
        assert tokens.dtype == segments.dtype == np.int32
        assert segments[0] == 1
        assert set(np.diff(segments)) <= {0, 1}
        assert 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size == 300
        eos += (tokens == tokenizer.eos).sum()
    dropped = prepared.facts["tokens"] % 33
    assert prepared.facts["documents"] - dropped <= eos <= prepared.facts["documents"]


def test_every_segment_is_a_stretch_of_one_training_document(made):
    base, _ = made
    prepared = prepare(config(base, fim_rate=0.0, newline_split_rate=1.0))
    assert prepared.tokenizer
    trained = [d.text for d in Corpus(config(base).data).documents() if d not in prepared.held_out]
    for index in range(len(prepared.train_shards)):
        tokens, segments = prepared.train_shards[index]
        for number in range(1, segments[-1] + 1):
            piece = tokens[segments == number]
            ends = piece == prepared.tokenizer.eos
            assert not ends[:-1].any()
            text = prepared.tokenizer.decode(piece[~ends]).strip("\ufffd")  # cut inside a character
            assert any(text in document for document in trained)


def test_made_once_and_the_same_again(made, tmp_path, monkeypatch):
    base, prepared = made
    stages: list[tuple[str, int, int | None]] = []

    def record(what: str, done: int, total: int | None) -> None:
        stages.append((what, done, total))

    again = prepare(config(base), record)
    assert not stages
    assert (again.digest, again.held_out) == (prepared.digest, prepared.held_out)
    elsewhere = prepare(config(base, cache=str(tmp_path)), record)
    assert elsewhere.digest == prepared.digest
    assert {what for what, _, _ in stages} == {
        "reading the corpus",
        "training the tokenizer",
        "making tokens",
    }
    assert all(total is None or done <= total for _, done, total in stages)


def test_whatever_determines_the_content_makes_another_cache(made):
    base, prepared = made
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"fim_rate": 0.5},
        {"newline_split_rate": 0.5},
        {"held_out": 0.3},
        {"max_bytes": 4000},
        {"tokenizer": "bytes"},
        {"vocab": 310},
        {"length": 40},
    ]
    digests = [prepare(config(base, **change)).digest for change in changes]
    assert len({prepared.digest, *digests}) == len(changes) + 1


def test_held_out_documents_do_not_depend_on_the_seed_or_on_the_others(made, tmp_path):
    base, prepared = made
    assert prepare(config(base, seed=7)).held_out == prepared.held_out
    shutil.copytree(base / "corpus", tmp_path / "corpus")
    for name in ("new1", "new2"):
        (tmp_path / "corpus" / f"{name}.py").write_text(name)
    more = {document.text for document in prepare(config(tmp_path)).held_out}
    assert {document.text for document in prepared.held_out} <= more


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_at_least_one_document_on_each_side(made, tmp_path, share):
    base, _ = made
    prepared = prepare(
        config(base, held_out=share, cache=str(tmp_path), tokenizer="bytes", length=8)
    )
    assert min(prepared.facts["documents"], prepared.facts["held_out_documents"]) == 1


def test_too_few_documents_or_tokens(tmp_path):
    corpus_at(tmp_path / "corpus", documents=1)
    with pytest.raises(DataError, match="one to train on and one to hold out"):
        prepare(config(tmp_path, corpus=str(tmp_path / "corpus" / "000.py"), tokenizer="bytes"))
    corpus_at(tmp_path / "corpus", documents=2)
    with pytest.raises(DataError, match=r"has 0 documents? within data.max_bytes = 3"):
        prepare(config(tmp_path, max_bytes=3))
    with pytest.raises(DataError, match=r"training.sequence_length \+ 1 = 100001"):
        prepare(config(tmp_path, length=100_000))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"] * 3


def test_vocabulary_larger_than_the_models(made):
    base, _ = made
    with pytest.raises(
        DataError, match=r"data.tokenizer = 'bytes' has 264 ids.* model.vocab = 263"
    ):
        prepare(config(base, tokenizer="bytes", vocab=263))
    prepare(config(base, tokenizer="bytes", vocab=264))
    with pytest.raises(DataError, match=r"'bytes' has 264 ids.* model.vocab = 100"):
        prepare(config(base, tokenizer="bytes", vocab=100))  # now that it is in the cache


def test_synthetic_windows_are_made_on_demand(tmp_path):
    synthetic = config(tmp_path, corpus="synthetic", vocab=50)
    prepared, again = prepare(synthetic), prepare(synthetic)
    tokens, segments = prepared.train_shards[12]
    np.testing.assert_array_equal(tokens, again.train_shards[12][0])
    assert (tokens.shape, tokens.dtype, segments.tolist()) == ((33,), np.int32, [1] * 33)
    drawn = np.concatenate([prepared.train_shards[i][0] for i in range(100)])
    assert set(drawn) == set(range(50))
    assert (prepared.tokenizer, prepared.held_out) == (None, ())
    assert prepared.digest == again.digest
    assert prepared.digest != prepare(config(tmp_path, corpus="synthetic", seed=1)).digest
    assert not list(tmp_path.iterdir())
    assert "synthetic" in prepared.describe()


# --- damage ------------------------------------------------------------------------------------


@pytest.fixture
def copy(made, tmp_path) -> tuple[Config, Path]:
    """A cache of this test's own, to damage."""
    base, prepared = made
    shutil.copytree(base / "cache", tmp_path / "cache")
    return config(base, cache=str(tmp_path / "cache")), tmp_path / "cache" / folder_of(
        prepared
    ).name


def test_every_flipped_bit_of_every_file_is_named(copy):
    settings, folder = copy
    draw = random.Random(0)
    for path in folder.iterdir():
        whole = path.read_bytes()
        for _ in range(12):
            flipped = bytearray(whole)
            flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=f"{path.name} is damaged.*delete the folder"):
                prepare(settings)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=f"{path.name} is damaged"):
            prepare(settings)
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is damaged: missing"):
            prepare(settings)
        path.write_bytes(whole)
    assert prepare(settings).facts


def read_all(windows: shards.Windows) -> list[list[int]]:
    return [np.concatenate(windows[index]).tolist() for index in range(len(windows))]


def test_damage_after_opening_is_never_silent(copy):
    """The shard is checked whole when opened; these flips come later, under an open reader."""
    settings, _ = copy
    prepared = prepare(settings)
    sound = read_all(prepared.train_shards)
    path = prepared.train_shards.paths[0]
    whole = path.read_bytes()
    draw = random.Random(0)
    used = np.flatnonzero(np.frombuffer(whole, np.uint8)).tolist()  # most of a small shard is not
    raised = 0
    for _ in range(40):
        windows = prepare(settings).train_shards
        flipped = bytearray(whole)
        flipped[draw.choice(used)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert read_all(windows) == sound
        except DataError as error:
            assert f"{path} is damaged" in str(error)
            raised += 1
        path.write_bytes(whole)
    assert raised > 20
    windows = prepare(settings).train_shards
    os.truncate(path, len(whole) // 2)
    with pytest.raises(DataError, match="is damaged"):
        read_all(windows)


def test_deleting_the_folder_makes_it_anew(copy):
    settings, folder = copy
    digest = prepare(settings).digest
    shutil.rmtree(folder)
    assert prepare(settings).digest == digest


def test_index_checks_itself(tmp_path):
    (tmp_path / "file").write_text("content")
    write_index(tmp_path, {"count": 10})
    assert read_index(tmp_path) == {"count": 10}
    index = json.loads((tmp_path / "index.json").read_text())
    index["facts"]["count"] = 11
    for content in (json.dumps(index), "[]", "{}", "null", "\ufffd", ""):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(DataError, match=r"index.json is damaged"):
            read_index(tmp_path)


# --- disks, crashes, neighbours ----------------------------------------------------------------


def test_cache_that_cannot_be_written(made, tmp_path):
    base, _ = made
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache cannot be used: .*file.*Not a directory"):
        prepare(config(base, cache=str(tmp_path / "file" / "cache")))
    with pytest.raises(DataError, match=r"train-00000.array_record cannot be written"):
        shards.write_shards(tmp_path / "missing", [[np.arange(9)]], 9, 10)


@pytest.mark.parametrize("limit", [20_000, 2000])
def test_disk_that_fills_up(made, tmp_path, limit):
    """A file may not grow beyond `limit` bytes: tokenizer.json fails at 2,000, a shard later."""
    base, _ = made
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(DataError, match="File too large"):
            prepare(config(base, cache=str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_prepare import config
from dsv3.data.prepare import prepare

def die(what, done, total):
    if what == "making tokens":
        os.kill(os.getpid(), signal.SIGKILL)

prepare(config(Path(sys.argv[3]), cache=sys.argv[4]), die)
"""


def test_killed_preparation_leaves_nothing_that_passes_for_data(made, tmp_path):
    base, prepared = made
    arguments = [str(ROOT), str(Path(__file__).parent), str(base), str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / folder_of(prepared).name).exists()
    assert any(path.suffix == ".building" for path in tmp_path.iterdir())
    assert prepare(config(base, cache=str(tmp_path))).digest == prepared.digest
    assert not any(path.suffix == ".building" for path in tmp_path.iterdir())


def test_concurrent_preparers_do_the_work_once(made, tmp_path, monkeypatch):
    base, prepared = made
    builds = []

    def counted(*arguments, build=preparation.build):
        builds.append(arguments)
        build(*arguments)

    monkeypatch.setattr(preparation, "build", counted)
    with ThreadPoolExecutor(3) as pool:
        both = list(pool.map(prepare, [config(base, cache=str(tmp_path))] * 3))
    assert len(builds) == 1
    assert {each.digest for each in both} == {prepared.digest}
