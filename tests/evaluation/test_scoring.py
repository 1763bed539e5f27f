import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.tokenizer import Tokenizer, train_bpe
from dsv3.evaluation import scoring
from dsv3.evaluation.scoring import Span, SpanError, behind, options, score
from tests.evaluation.small import log_p, reader

LENGTH, VOCAB = 100, 264


@pytest.fixture(scope="module")
def bpe():
    """A tokenizer that merges letters and line breaks across any split of a text."""
    text = "return value\n\nimport sys\n\n    return values.index(value)\n\n" * 60
    return Tokenizer(train_bpe([text], 300, len(text)), "bpe")


def scored(spans, length=LENGTH):
    return score(reader().model, spans, length, VOCAB)


def test_scores_are_log_likelihoods_of_what_follows_first():
    rng = np.random.default_rng(0)
    lengths = [(2, 1), (5, 3), (40, 39), (70, 8), (101, 1), (101, 90), (9, 8)]
    spans = [Span(rng.integers(8, VOCAB, n).tolist(), first) for n, first in lengths]
    for span, found in zip(spans, scored(spans), strict=True):
        each = log_p(span.tokens, span.first)
        assert found.nats == pytest.approx(-sum(each), rel=1e-5)  # FP32
        assert found.tokens == len(each) and not found.cut


def test_equal_inputs_run_once_and_rows_do_not_mix(monkeypatch):
    spans = [Span([1, 20, 30, option], 3) for option in range(40, 60)]
    spans += [Span([1, 20, 30, 40, 50], first) for first in (1, 2, 4)] + [Span([1, 9], 1)]
    rows = []
    real = scoring._nats
    monkeypatch.setattr(scoring, "_nats", lambda *a: rows.append(len(a[1])) or real(*a))
    together = scored(spans)
    assert rows == [3]  # 24 spans
    assert np.logaddexp.reduce([-s.nats for s in together[:20]]) < 0  # of one distribution
    monkeypatch.setattr(scoring, "POSITIONS", 64)  # one row a batch
    alone = scored(spans[-4:])
    assert [s.nats for s in alone] == pytest.approx([s.nats for s in together[-4:]], rel=1e-5)


def test_greedy_is_said_of_what_greedy_decoding_writes():
    tokens = [1, 20]
    for _ in range(3):
        options = scored([Span([*tokens, option], len(tokens)) for option in range(VOCAB)])
        assert sum(found.greedy for found in options) == 1
        best = int(np.argmin([found.nats for found in options]))
        assert options[best].greedy
        tokens.append(best)
    right, wrong = scored([Span(tokens, 2), Span([*tokens[:3], (tokens[3] + 1) % VOCAB], 2)])
    assert right.greedy and not wrong.greedy


def test_what_does_not_fit_loses_its_beginning():
    tokens = np.random.default_rng(1).integers(8, VOCAB, 60).tolist()
    long, short = scored([Span(tokens, 55), Span(tokens[-33:], 28)], length=32)
    assert long.cut and not short.cut
    assert long.nats == short.nats and long.tokens == short.tokens == 5
    assert scored([Span(tokens, 28)], length=32)[0].tokens == 32
    for first in (27, 60):
        with pytest.raises(SpanError, match="do not fit 1 to 32") as caught:
            scored([Span(tokens, 50), Span(tokens, first)], length=32)
        assert caught.value.index == 1


def test_nothing_to_score_is_nothing():
    assert scored([]) == []


def test_options_follow_the_same_tokens_even_where_one_straddles(bpe):
    context, choices = "    return val", ["ue", "X", " = 1"]
    alone = bpe.encode(context)
    joint = [bpe.encode(context + choice) for choice in choices]
    assert joint[0][: len(alone)] != alone  # 'value' is one token: else the case is none
    spans = options(bpe, context, choices)
    [first] = {span.first for span in spans}
    assert len({tuple(span.tokens[:first]) for span in spans}) == 1
    for span, choice in zip(spans, choices, strict=True):
        assert span.tokens == [bpe.eos, *bpe.encode(context + choice)]
    assert (context + choices[0]).startswith(bpe.decode(spans[0].tokens[1:first]))
    assert len(bpe.decode(spans[0].tokens[1:first])) < len(context)


def test_a_split_between_tokens_is_the_split(bpe):
    [span] = options(bpe, "import sys\n\n", ["import value"])
    assert bpe.decode(span.tokens[span.first :]) == "import value"
    [span] = options(bpe, "", ["import"])
    assert span == Span([bpe.eos, *bpe.encode("import")], 1)


def test_a_text_behind_contexts_is_the_same_tokens(bpe):
    contexts, text = ["    return val", "import sys"], "ue\n"
    first, second = behind(bpe, contexts, text)
    assert first.tokens[first.first :] == second.tokens[second.first :] == bpe.encode(text)
    assert first.tokens[: first.first] == [bpe.eos, *bpe.encode(contexts[0])]


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_options_score_the_rest_of_the_text_and_at_least_the_choice(context, choices):
    tokenizer = reader().tokenizer
    for span, choice in zip(options(tokenizer, context, choices), choices, strict=True):
        assert tokenizer.decode(span.tokens[span.first :]).endswith(choice)
        assert tokenizer.decode(span.tokens[1:]) == context + choice
