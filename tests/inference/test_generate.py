import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Config, Mla, Model, Moe, Training, Yarn
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.errors import CheckpointError, ConfigError
from dsv3.inference import generate as module
from dsv3.inference.generate import (
    Completion,
    PromptError,
    at_text,
    completion_text,
    context_length,
    fim_tokens,
    generate,
    prompt_tokens,
)
from dsv3.inference.sampling import Greedy, Random
from dsv3.model.transformer import Transformer

TINY = Model(
    vocab=40,
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
PROMPTS = [[1], [2, 30, 4], [9, 8, 7, 6, 5, 4, 3, 2, 10], [5] * 20]
HOT = Random(100.0)  # all ids are about equally likely
OPTIONS = {"stop": [1], "vocab": 37, "context": 50}


def random_model(config, seed=0):
    """A model with normal(0, 0.3) in every parameter: nothing to compile, and far from uniform."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)


@pytest.fixture(scope="module")
def model():
    return random_model(TINY)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ready_made("bytes"), "bytes")


@pytest.fixture(scope="module")
def written(model):
    return generate(model, PROMPTS, Greedy(), 12, **OPTIONS)


def test_greedy_continues_with_the_most_likely_token(model, written):
    whole = jax.jit(lambda tokens: model(tokens).logits_BTV)
    for prompt, completion in zip(PROMPTS, written, strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            padded = np.zeros((1, 48), np.int32)
            padded[0, : len(tokens)] = tokens
            assert token == int(jnp.argmax(whole(padded)[0, len(tokens) - 1, :37]))
            tokens.append(token)


def test_each_ends_at_its_stop_or_after_max_tokens(written):
    assert {c.stopped for c in written} == {True, False}  # else choose another seed
    assert all(1 not in c.tokens for c in written)
    assert all(len(c.tokens) == 12 for c in written if not c.stopped)


def test_a_batch_of_unequal_lengths_equals_one_by_one(model, written):
    alone = [generate(model, [prompt], Greedy(), 12, **OPTIONS)[0] for prompt in PROMPTS]
    assert written == alone


def test_random_rows_do_not_depend_on_each_other(model):
    together = generate(model, PROMPTS, HOT, 12, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        prompts = [[3, 4]] * 4
        prompts[row] = prompt
        assert generate(model, prompts, HOT, 12, **OPTIONS)[row] == together[row]


def test_seeds_repeat_and_differ(model):
    draw = [generate(model, [[2, 3]] * 4, HOT, 20, seed=seed, **OPTIONS) for seed in (7, 7, 8)]
    assert draw[0] == draw[1]
    tokens = {tuple(c.tokens) for completions in draw[1:] for c in completions}
    assert len(tokens) == 8  # other rows and other seeds are other numbers


def test_a_damaged_weight_is_named(model):
    damaged = jax.tree.map(lambda x: x, model)
    damaged.head.w[...] = model.head.w[...].at[3, 5].set(jnp.nan)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        generate(damaged, PROMPTS, Greedy(), 12, **OPTIONS)
    beyond = jax.tree.map(lambda x: x, model)
    beyond.head.w[...] = model.head.w[...].at[:, 38].set(jnp.nan)  # an id that is never chosen
    assert generate(beyond, PROMPTS, Greedy(), 12, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "x"}, "cache = 'x' is no form"),
        ({"vocab": 41}, "vocab = 41, but the model has 40"),
        ({"vocab": 0}, "vocab = 0"),
    ],
)
def test_what_cannot_be_is_named(model, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, PROMPTS, Greedy(), 12, **(OPTIONS | options))


def test_more_tokens_than_32_bits_count_fill_the_context(model, written):
    most, cut = 3_000_000_000, slice(0, 12)
    found = generate(model, PROMPTS, Greedy(), most, **OPTIONS)
    assert [c.tokens[cut] for c in found] == [c.tokens for c in written]


def test_embedding_rows_beyond_the_tokenizer_are_never_chosen(model):
    completions = generate(model, PROMPTS, HOT, 30, stop=[38], vocab=37, context=50)
    tokens = [token for c in completions for token in c.tokens]
    # the chance that 120 draws from 40 equally likely ids miss the last three is 1e-4
    assert max(tokens) == 36 and len(tokens) == 120


def test_the_context_ends_a_completion(model):
    completions = generate(model, PROMPTS, Greedy(), 100, stop=[38], vocab=37, context=24)
    assert [len(c.tokens) for c in completions] == [23, 21, 15, 4]
    assert not any(c.stopped for c in completions)


def test_few_buffer_sizes_and_one_program_for_each(model):
    assert [module._size(n) for n in (1, 64, 65, 128, 1000)] == [64, 64, 128, 128, 1024]
    generate(model, [[1]], Greedy(), 5, **OPTIONS)
    programs = module.decode.advance._cache_size()
    for prompt, tokens, seed in (([1, 2, 3], 9, 1), ([4] * 30, 20, 2)):
        generate(model, [prompt], Greedy(), tokens, **(OPTIONS | {"seed": seed, "context": 64}))
    assert module.decode.advance._cache_size() == programs


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "message"),
    [
        ([], {}, PromptError, "no prompt"),
        ([[3], []], {}, PromptError, "no tokens"),
        ([[3] * 50], {}, PromptError, "50 tokens leaves no room in the context of 50"),
        ([[3], [4, 2**33]], {}, PromptError, "prompt 1 holds 8589934592, no id from 0 to"),
        ([[-1]], {}, PromptError, "prompt 0 holds -1, no id"),
        ([[2.5]], {}, PromptError, "prompt 0 holds 2.5, no id"),
        ([[3]], {"max_tokens": 0}, ConfigError, "max_tokens = 0"),
        ([[3]], {"seed": -1}, ConfigError, "seed = -1"),
        ([[3]], {"seed": 2**31}, ConfigError, "seed = 2147483648"),
    ],
)
def test_impossible_requests_are_named(model, prompts, changes, error, message):
    arguments = {"max_tokens": 5} | OPTIONS | changes
    with pytest.raises(error, match=message):
        generate(model, prompts, Greedy(), **arguments)


def test_prompts_follow_the_eos_before_a_document(tokenizer):
    t = tokenizer
    assert prompt_tokens(t, "") == [t.eos]
    assert prompt_tokens(t, "ab") == [t.eos, *t.encode("ab")]
    fim = [t.eos, t.fim_begin, *t.encode("a"), t.fim_hole, *t.encode("b"), t.fim_end]
    assert fim_tokens(t, "a", "b") == fim


def test_special_strings_in_a_prompt_are_text(tokenizer):
    special = {tokenizer.eos, tokenizer.fim_hole}
    tokens = fim_tokens(tokenizer, "<｜fim▁hole｜>", "<｜end▁of▁sentence｜>")
    assert [t for t in tokens if t in special] == [tokenizer.eos, tokenizer.fim_hole]


@pytest.mark.parametrize(
    ("content", "stopped", "text"),
    [
        (b"a\xc3\xa9", False, "aé"),
        (b"a\xc3", False, "a"),
        (b"a\xf0\x9f\x99", False, "a"),
        (b"a\xc3", True, "a\ufffd"),
        (b"\xa9b", False, "\ufffdb"),
        (b"", False, ""),
    ],
)
def test_a_character_cut_at_the_end_is_left_out(tokenizer, content, stopped, text):
    first_byte = tokenizer.vocab_size - 256
    completion = Completion([first_byte + byte for byte in content], stopped)
    assert completion_text(tokenizer, completion) == text


BYTES = "naïve 🙂\n\n"  # of which each token of the tokenizer 'bytes' holds one


@pytest.mark.parametrize(
    ("strings", "tokens", "text"),
    [
        (["ve"], 6, "naï"),  # over two tokens
        (["ï"], 4, "na"),  # one character of two tokens, whole with its second
        (["🙂"], 11, "naïve "),
        (["\n\n", "\n"], 12, "naïve 🙂"),  # the first to be there
        (["zz", "ïv"], 5, "na"),
        (["ive"], None, BYTES),
        ([], None, BYTES),
    ],
)
def test_a_stop_string_is_found_in_text(tokenizer, strings, tokens, text):
    ids = tokenizer.encode(BYTES)
    assert at_text(tokenizer, strings)(ids) == tokens
    completion = Completion(ids[:tokens], tokens is not None)
    assert completion_text(tokenizer, completion, strings) == text


def test_a_row_ends_where_its_text_does_and_its_neighbours_go_on(model):
    """Searched for between portions of 16 tokens: ends before, at and behind their borders."""
    whole = [c.tokens for c in generate(model, PROMPTS, HOT, 40, stop=[38], vocab=37, context=64)]
    wanted = [3, 16, 17, None]

    def ends(tokens):
        row = next(i for i, w in enumerate(whole) if w[: len(tokens)] == tokens)
        count = wanted[row]
        return count if count is not None and len(tokens) >= count else None

    ended = generate(model, PROMPTS, HOT, 40, stop=[38], vocab=37, context=64, ends=ends)
    assert [c.tokens for c in ended] == [w[:n] for w, n in zip(whole, wanted, strict=True)]
    assert [c.stopped for c in ended] == [True, True, True, False]


def test_the_context_is_the_trained_length_or_yarns():
    config = Config(training=Training(sequence_length=256))
    assert context_length(config) == 256
    stretched = Model(mla=Mla(yarn=Yarn(factor=4.0, original_length=512)))
    assert context_length(dataclasses.replace(config, model=stretched)) == 2048
