"""FIM and newline splitting hold their rates, change no text, depend on the document only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import Data
from dsv3.data.augmentation import Augmentation, fim_parts, joined_tokens
from dsv3.data.corpus import Document
from dsv3.data.tokenizer import Tokenizer, ready_made, train_bpe

CODE = "def f(x, y):\n    return {x: (y),\n            1: [2]}\n\n\nprint(f(1, 2));\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([CODE] * 20, 330, 1), "test")


def documents(count: int) -> list[Document]:
    return [Document(f"{i}.py", f"x = {i}\n" + CODE * (i % 3 + 1)) for i in range(count)]


def augment(tokenizer: Tokenizer, docs: list[Document], **fields) -> list[np.ndarray]:
    return Augmentation(tokenizer, Data(**fields)).tokens(docs)


def text_of(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """The document's text, FIM undone."""
    *body, eos = ids.tolist()
    assert eos == tokenizer.eos
    if body[0] != tokenizer.fim_begin:
        return tokenizer.decode(body)
    hole, end = body.index(tokenizer.fim_hole), body.index(tokenizer.fim_end)
    prefix, suffix, middle = body[1:hole], body[hole + 1 : end], body[end + 1 :]
    return "".join(map(tokenizer.decode, (prefix, middle, suffix)))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_text_survives_and_rates_hold(tokenizer, rate):
    docs = documents(300)
    tokens = augment(tokenizer, docs, fim_rate=rate, newline_split_rate=rate)
    assert [text_of(tokenizer, ids) for ids in tokens] == [document.text for document in docs]
    share = np.mean([ids[0] == tokenizer.fim_begin for ids in tokens])
    assert abs(share - rate) <= 0.1  # 3.8 standard deviations of 300 draws at 0.3
    joined = list(joined_tokens(tokenizer))
    kept = sum(np.isin(ids, joined).sum() for ids in tokens)
    plain = augment(tokenizer, docs, fim_rate=rate, newline_split_rate=0.0)
    assert abs(kept / sum(np.isin(ids, joined).sum() for ids in plain) - (1 - rate)) <= 0.05


def test_plain_document_is_its_text_and_eos(tokenizer):
    [ids] = augment(tokenizer, [Document("a", CODE)], fim_rate=0, newline_split_rate=0)
    assert ids.tolist() == [*tokenizer.encode(CODE), tokenizer.eos]
    assert ids.dtype == np.int32


def test_joined_tokens_split_into_punctuation_and_line_breaks(tokenizer):
    joined = joined_tokens(tokenizer)
    texts = {tokenizer.decode([id]) for id in joined}
    assert {"):\n", "\n"} & texts == {"):\n"}
    for id, halves in joined.items():
        assert tokenizer.decode(halves) == tokenizer.decode([id])
        assert tokenizer.decode(halves[-1:]).strip("\r\n") == ""
        assert not set(joined) & set(halves.tolist())


def test_deepseeks_joined_tokens():
    joined = joined_tokens(Tokenizer(ready_made("deepseek"), "test"))
    assert len(joined) == 801
    assert joined[603].tolist() == [16, 201]  # '.\n' -> '.', '\n'
    assert {339, 989, 1137, 875} <= set(joined)
    assert not {201, 271} & set(joined)


def test_a_document_comes_out_the_same_in_any_company(tokenizer):
    docs = documents(20)
    both = augment(tokenizer, docs, fim_rate=0.5)
    alone = [augment(tokenizer, [document], fim_rate=0.5)[0] for document in reversed(docs)]
    for one, other in zip(both, reversed(alone), strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed = augment(tokenizer, docs, fim_rate=0.5, seed=1)
    assert any(a.tolist() != b.tolist() for a, b in zip(both, other_seed, strict=True))


def test_special_tokens_in_the_text_change_nothing(tokenizer):
    spelled = "a<｜fim▁hole｜>b<｜end▁of▁sentence｜>" * 5
    [ids] = augment(tokenizer, [Document("a", spelled)], fim_rate=1.0)
    assert text_of(tokenizer, ids) == spelled
    assert [(ids == special).sum() for special in (tokenizer.fim_hole, tokenizer.eos)] == [1, 1]


@given(text=st.text(max_size=20), seed=st.integers(0, 2**31 - 1))
def test_fim_parts_make_up_the_text(text, seed):
    prefix, suffix, middle = fim_parts(text, np.random.default_rng(seed))
    assert prefix + middle + suffix == text


def test_cut_points_are_uniform():
    draws = [fim_parts("abc", np.random.default_rng(seed)) for seed in range(2000)]
    points = [len(prefix) for prefix, _, _ in draws] + [len(p) + len(m) for p, _, m in draws]
    counts = np.bincount(points, minlength=4)
    assert np.all(abs(counts - 1000) < 110)  # 4 standard deviations of 4,000 draws at 1/4
