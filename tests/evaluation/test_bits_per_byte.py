import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import Config, Data, Mla, Model, Moe, Training
from dsv3.data.corpus import Document
from dsv3.data.prepare import prepare
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.errors import DataError
from dsv3.evaluation import bits_per_byte as module
from dsv3.evaluation.bits_per_byte import (
    bits_per_byte,
    compressor_bits_per_byte,
    held_out,
    held_out_texts,
    windows,
)
from dsv3.model.transformer import Transformer

TINY = Model(
    vocab=300,
    width=32,
    layers=2,
    dense_width=64,
    mla=Mla(heads=2, query_latent=16, kv_latent=8, nope_dim=8, rope_dim=8, value_dim=8),
    moe=Moe(
        routed_experts=4,
        experts_per_token=2,
        groups=2,
        groups_per_token=2,
        group_score_experts=1,
        expert_width=16,
        block=16,
    ),
)
LENGTH = 32
TEXTS = ["naïve — 字 " * 9, "x", "", "def f():\n    return 1\n" * 7, "y" * LENGTH]


@pytest.fixture(scope="module")
def model():
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), TINY))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ready_made("bytes"), "bytes")


@pytest.fixture(autouse=True)
def several_small_batches(monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", 4 * LENGTH)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_a_token(model, tokenizer):
    uniform = jax.tree.map(lambda x: x, model)
    uniform.head.w[...] = jnp.zeros_like(uniform.head.w[...])
    found = bits_per_byte(uniform, tokenizer, TEXTS, LENGTH)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.tokens, found.bytes) == (tokens, size)
    # FP32 sums of a batch
    assert found.value == pytest.approx(math.log2(TINY.vocab) * tokens / size, rel=1e-6)


def test_it_is_the_log_likelihood_of_each_document_behind_eos(model, tokenizer):
    texts = [text for text in TEXTS if 0 < len(text.encode()) <= LENGTH]
    whole = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens).logits_BTV))
    nats = 0.0
    for text in texts:
        tokens = np.zeros((1, LENGTH + 1), np.int32)
        ids = tokenizer.encode(text)
        tokens[0, : len(ids) + 1] = [tokenizer.eos, *ids]
        log_p = whole(tokens[:, :-1])[0]
        nats -= sum(float(log_p[i, token]) for i, token in enumerate(ids))
    found = bits_per_byte(model, tokenizer, texts, LENGTH)
    assert len(texts) == 2
    assert found.bits == pytest.approx(nats / math.log(2), rel=1e-5)  # FP32


def test_documents_do_not_see_each_other(model, tokenizer):
    together = bits_per_byte(model, tokenizer, TEXTS, LENGTH).bits
    alone = [bits_per_byte(model, tokenizer, [text], LENGTH).bits for text in TEXTS if text]
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_no_text_is_an_error(model, tokenizer):
    with pytest.raises(DataError, match="no held-out text"):
        bits_per_byte(model, tokenizer, [""], LENGTH)
    with pytest.raises(DataError, match="no held-out text"):
        compressor_bits_per_byte([])


@given(st.integers(0, 200), st.integers(2, 40))
def test_every_token_is_scored_once_with_what_precedes_it(tokens, length):
    eos, ids = 7, np.arange(100, 100 + tokens, dtype=np.int32)
    text, scored = [eos, *ids.tolist()], []
    for window in windows(ids, eos, length):
        assert window.tokens_S.shape == (length + 1,) and window.tokens_S.dtype == np.int32
        assert 1 <= window.first < window.end <= length + 1
        for i in range(window.first, window.end):
            position = text.index(window.tokens_S[i])
            context = window.tokens_S[:i].tolist()
            assert context == text[position - i : position]
            assert len(context) == position or len(context) >= length // 4
            scored.append(position)
    assert scored == list(range(1, tokens + 1))


def test_a_compressor_sees_all_documents_at_once():
    noise = np.random.default_rng(0).integers(32, 127, 20_000).astype(np.uint8).tobytes().decode()
    once, twice = compressor_bits_per_byte([noise]), compressor_bits_per_byte([noise, noise])
    assert 6.5 < once < 6.8  # log2 of 95 characters is 6.57
    assert twice < 0.51 * once


def corpus(tmp_path, documents=60):
    for i in range(documents):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * (i + 5))
    return Data(corpus=str(tmp_path), tokenizer="bytes", held_out=0.2)


def test_held_out_documents_are_those_of_training(tmp_path):
    (tmp_path / "corpus").mkdir()
    data = corpus(tmp_path / "corpus")
    config = Config(
        model=Model(vocab=300, mtp_depths=0),
        data=Data(**(vars(data) | {"cache": str(tmp_path / "cache")})),
        training=Training(sequence_length=32),
    )
    found = held_out(config.data)
    assert 2 < len(found) < 30
    assert found == list(prepare(config).held_out)


def test_synthetic_data_holds_no_text():
    with pytest.raises(DataError, match=r"data\.corpus = 'synthetic'"):
        held_out(Data(corpus="synthetic"))


def test_the_text_scored_is_limited_and_does_not_depend_on_the_order():
    documents = [Document(str(i), f"é{i} " * 30) for i in range(10)]
    everything = held_out_texts(documents, 10**6)
    assert sorted(everything) == sorted(document.text for document in documents)
    some = held_out_texts(documents, 301)
    assert some == held_out_texts(documents[::-1], 301)
    assert some[:-1] == everything[: len(some) - 1]
    assert everything[len(some) - 1].startswith(some[-1])
    assert sum(len(text.encode()) for text in some) in (300, 301)  # a character is not cut
    assert held_out_texts(documents, 0) == []
