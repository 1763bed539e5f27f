"""Speculative decoding against plain decoding, and drafters that are always right or wrong."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Mla, Model, Moe
from dsv3.errors import ConfigError
from dsv3.inference import forward
from dsv3.inference.cache import empty
from dsv3.inference.decode import AS_WRITTEN
from dsv3.inference.generate import acceptance, drafts_of, generate
from dsv3.inference.replicas import routed_loads
from dsv3.inference.rerun import last_logits
from dsv3.inference.sampling import Greedy, Random
from dsv3.inference.speculative import verify
from dsv3.model.transformer import Transformer
from tests.model.conftest import SMALL, _fill

OPTIONS = {"stop": [1], "vocab": 29, "context": 64}
ENDLESS = OPTIONS | {"stop": [30]}  # an id that is never chosen


@functools.cache
def model_of(config):
    return _fill(lambda key: Transformer(key, config))


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 29, rng.integers(1, 12)).tolist() for _ in range(count)]


def tokens_of(completions):
    return [(c.tokens, c.stopped) for c in completions]


def test_greedy_is_plain_greedy_on_200_prompts():
    """Token by token. Random weights make near ties as likely as anything does."""
    model = model_of(SMALL)
    for start in range(0, 200, 20):
        some = prompts(20, seed=start)
        plain = generate(model, some, Greedy(), 40, **OPTIONS)
        drafted = generate(model, some, Greedy(), 40, drafts=2, **OPTIONS)
        assert tokens_of(drafted) == tokens_of(plain)
        kept = {c.kept for c in drafted}
        assert len(kept) > 1 or kept != {0}  # rows keep different numbers of drafts


@pytest.mark.parametrize("drafts", [0, 2])
def test_decoding_counts_what_a_pass_over_its_text_would(drafts):
    """The main model reads all tokens but the last, modules that draft the last as well."""
    model, some = model_of(SMALL), prompts(20)
    done = generate(model, some, Greedy(), 40, drafts=drafts, **OPTIONS)
    assert {c.stopped for c in done} == {True, False}
    assert not drafts or 0 < sum(c.kept for c in done) < 2 * sum(c.steps for c in done)
    rows = [
        [*prompt, *c.tokens, *([1] if c.stopped else [])]
        for prompt, c in zip(some, done, strict=True)
    ]
    read, ahead = (routed_loads(model, rows) for rows in ([row[:-1] for row in rows], rows))
    np.testing.assert_array_equal(done.counts_LE[:2], read[:2])
    np.testing.assert_array_equal(done.counts_LE[2:], (drafts > 0) * ahead[2:])


def test_one_row_alone_in_bf16():
    """One token or two go through products of four rows, which round alike."""
    model, options = model_of(SMALL), OPTIONS | {"dtype": jnp.dtype("bfloat16")}
    for prompt in ([1], *prompts(9, seed=7)):
        plain = generate(model, [prompt], Greedy(), 30, **options)
        drafted = generate(model, [prompt], Greedy(), 30, drafts=1, **options)
        assert tokens_of(drafted) == tokens_of(plain)


WIDE = Model(  # its products of 60 and 120 rows round differently, in FP32
    vocab=64, width=128, layers=2, dense_width=128, mtp_depths=1,
    mla=Mla(heads=2, query_latent=96, kv_latent=32, nope_dim=32, rope_dim=16, value_dim=32),
    moe=Moe(routed_experts=8, experts_per_token=2, groups=2, groups_per_token=1, expert_width=64),
)  # fmt: skip


def test_greedy_is_plain_greedy_for_many_rows_in_bf16():
    """Where XLA may keep more precision than BF16, some of these differ."""
    some = [[2, *p] for p in prompts(60, seed=3)]
    options = {"stop": [64], "vocab": 64, "context": 64, "dtype": jnp.dtype("bfloat16")}
    plain = generate(model_of(WIDE), some, Greedy(), 40, **options)
    drafted = generate(model_of(WIDE), some, Greedy(), 40, drafts=1, **options)
    assert tokens_of(drafted) == tokens_of(plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_the_same_bit_for_bit_beside_others(dtype):
    model, rows, dtype = model_of(WIDE), 60, jnp.dtype(dtype)
    tokens_BT = np.random.default_rng(0).integers(0, 64, (rows, 4)).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=AS_WRITTEN)
    def extended(cache, tokens_BT, position_BT):
        live_BT = jnp.ones(tokens_BT.shape, bool)
        h_BTD, cache, _ = forward.extend(model, cache, tokens_BT, position_BT, live_BT)
        return forward.logits(model, h_BTD, 64), cache

    def logits(width):
        cache, found = empty("compute", WIDE.mla, 2, rows, 8, dtype), []
        for start in range(0, 4, width):
            position_BT = np.tile(np.arange(start, start + width), (rows, 1))
            part, cache = extended(cache, tokens_BT[:, start : start + width], position_BT)
            found.append(part)
        return np.concatenate(found, axis=1)

    np.testing.assert_array_equal(logits(1), logits(2))


def bigram(sign: float):
    """A model without attention or experts, whose next token depends on the last token only; the
    MTP modules see the token ahead only, and then say the same (sign 1) or the opposite (-1)."""
    model = _fill(lambda key: Transformer(key, SMALL))
    blocks = [model.dense, model.moe, *(module.block for module in model.mtp)]
    for block in blocks:
        block.attention.o.w[...] *= 0
        routed = block.ffn if hasattr(block.ffn, "down") else block.ffn.routed
        down = routed.down.w if hasattr(routed.down, "w") else routed.down
        down[...] *= 0
        if hasattr(block.ffn, "shared"):
            block.ffn.shared.down.w[...] *= 0
    width = SMALL.width
    for module in model.mtp:
        module.project.w[...] = jnp.eye(2 * width)[:, :width]
        module.embedding_norm.gain[...] = jnp.ones(width)
        module.norm.gain[...] = sign * model.norm.gain[...]
    return model


@pytest.mark.parametrize(("sign", "share"), [(1.0, 1), (-1.0, 0)])
def test_a_perfect_drafter_is_always_right_and_an_adverse_one_never(sign, share):
    drafts, model, some = (
        2,
        bigram(sign),
        [[5, 6, 9], [7, 8]],
    )  # of one token nothing can be drafted yet
    plain = generate(model, some, Greedy(), 31, **ENDLESS)
    drafted = generate(model, some, Greedy(), 31, drafts=drafts, **ENDLESS)
    assert tokens_of(drafted) == tokens_of(plain)
    for completion in drafted:
        assert completion.kept == share * drafts * completion.steps
        assert completion.steps == -(-31 // (1 + share * drafts))
    said = acceptance(drafted, drafts)
    assert f"({share:.1%})" in said and f"{1 + share * drafts:.2f} tokens a step" in said


def test_a_stop_token_among_accepted_drafts_ends_the_row():
    model = bigram(1.0)
    some = [[5, 6], [9, 2]]
    whole = generate(model, some, Greedy(), 20, **ENDLESS)
    for place in range(1, 6):
        options = OPTIONS | {"stop": [whole[0].tokens[place]]}
        plain = generate(model, some, Greedy(), 20, **options)
        ended = generate(model, some, Greedy(), 20, drafts=2, **options)
        assert tokens_of(ended) == tokens_of(plain)
        assert ended[0].stopped and len(ended[0].tokens) <= place


def test_limits_and_the_end_of_the_buffer():
    model = model_of(SMALL)
    for most, context in ((1, 64), (2, 64), (99, 64), (99, 13)):
        options = ENDLESS | {"context": context}
        some = [[3], [4] * 12]
        plain = generate(model, some, Greedy(), most, **options)
        drafted = generate(model, some, Greedy(), most, drafts=2, **options)
        assert tokens_of(drafted) == tokens_of(plain)


# --- distributions -----------------------------------------------------------------------------


def chi_square(counts, p):
    """Pearson's statistic and its degrees of freedom; cells of fewer than 5 expected are one."""
    expected = p * counts.sum()
    rare = expected < 5
    observed = [*counts[~rare], counts[rare].sum()]
    expected = [*expected[~rare], expected[rare].sum()]
    cells = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
    return sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1


def assert_distributed(counts, p):
    assert counts[p == 0].sum() == 0
    statistic, freedom = chi_square(counts, p)
    # six standard deviations of chi-square above its mean; a seed decides, once and for all
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5, (statistic, freedom)


P = np.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
Q = {
    "another": np.array([[0.1, 0.6, 0.1, 0.2], [0.25] * 4]),
    "the same": P[:2],
    "certain of one token": np.array([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]),
}


@pytest.mark.parametrize("q", Q.values(), ids=Q)
def test_what_is_kept_or_drawn_is_distributed_as_the_main_model_says(q):
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), (rows, 7))
    draw = jax.vmap(lambda key, q_V: jax.random.categorical(key, jnp.log(q_V)), (0, None))
    draft_BJ = jnp.stack([draw(keys[:, j], jnp.asarray(q[j])) for j in (0, 1)], axis=1)
    p_BTV, q_BJV = (jnp.broadcast_to(jnp.float32(x)[None], (rows, *x.shape)) for x in (P, q))
    kept_B, token_B = jax.jit(functools.partial(verify, Random()))(
        keys[:, 2:4], keys[:, 4:], p_BTV, q_BJV, draft_BJ
    )
    chances = np.minimum(P[:2], q).sum(axis=1)  # of the first draft, and of the second
    assert_distributed(
        np.bincount(kept_B, minlength=3),
        np.array([1 - chances[0], chances[0] * (1 - chances[1]), chances.prod()]),
    )
    first_B = np.where(kept_B > 0, draft_BJ[:, 0], token_B)
    second_B = np.where(kept_B > 1, draft_BJ[:, 1], token_B)
    both = np.bincount(first_B[kept_B > 0] * 4 + second_B[kept_B > 0], minlength=16)
    assert_distributed(np.bincount(first_B, minlength=4), P[0])
    given = np.minimum(P[0], q[0]) / chances[0]
    assert_distributed(both, np.outer(given, P[1]).ravel())


def test_sampled_completions_follow_the_exact_distribution():
    """Three tokens of a vocabulary of five, all 125 outcomes, against the main model's product of
    conditionals; the drafter thinks otherwise, and is believed where that does no harm."""
    model, vocab, rows = model_of(SMALL), 5, 3000
    sampler = Random(1.3, top_k=4, top_p=0.95)
    options = {"stop": [], "vocab": vocab, "context": 64}
    written = generate(model, [[9]] * rows, sampler, 3, drafts=2, seed=1, **options)
    outcomes = np.array([c.tokens for c in written])
    counts = np.bincount(outcomes @ [25, 5, 1], minlength=125)

    prefixes = [p for n in range(3) for p in itertools.product(range(vocab), repeat=n)]
    buffer_BS = np.array([[9, *p, *[0] * (2 - len(p))] for p in prefixes], np.int32)
    lengths_B = np.array([1 + len(p) for p in prefixes], np.int32)
    p_BV = sampler.probabilities(last_logits(model, buffer_BS, lengths_B, vocab, None))
    after = dict(zip(prefixes, np.asarray(p_BV, np.float64), strict=True))
    exact = [
        after[()][a] * after[(a,)][b] * after[(a, b)][c]
        for a, b, c in itertools.product(range(vocab), repeat=3)
    ]
    assert_distributed(counts, np.array(exact))
    drafted, kept = 2 * sum(c.steps for c in written), sum(c.kept for c in written)
    assert 0.2 < kept / drafted < 0.9  # else the test says little


def test_seeds_and_neighbours():
    model, some = model_of(SMALL), prompts(4)
    draw = functools.partial(generate, sampler=Random(2.0), max_tokens=16, drafts=2, **OPTIONS)
    together = draw(model, some, seed=5)
    assert draw(model, some, seed=5) == together != draw(model, some, seed=6)
    for row in range(4):
        others = [[3, 4]] * 4
        others[row] = some[row]
        assert draw(model, others, seed=5)[row] == together[row]


def test_a_model_without_mtp_cannot_draft():
    model = model_of(dataclasses.replace(SMALL, mtp_depths=0))
    with pytest.raises(ConfigError, match="no MTP module"):
        drafts_of(model)
    with pytest.raises(ConfigError, match="drafts = 1, but the model has 0"):
        generate(model, [[3]], Greedy(), 4, drafts=1, **OPTIONS)
