import json
import math

import jax
import jax.numpy as jnp
import pytest

from dsv3.errors import CheckpointError, DataError
from dsv3.evaluation import harness
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.harness import before_stop, evaluate, figure
from dsv3.evaluation.tasks import Completed, Ratio, read_task
from tests.evaluation.small import log_p, reader

CHOICES = {"context": "2 + 2 =", "choices": [" 3", " four", " é"], "gold": 1}
CONTEXTS = {"contexts": ["The ball", "The long box"], "continuation": " is round.", "gold": 1}
ANSWER = {"context": "Q: 2?\nA:", "answer": " zwei é"}
ANSWERS = {"prompt": "Q: 2?\nA:", "answers": ["zwei"], "stop": ["\n"], "max_tokens": 5}
MIDDLE = {"prefix": "def f(", "suffix": "):\n    return x", "middle": "x", "max_tokens": 5}


@pytest.fixture
def task(tmp_path):
    """task(rows, ...) of a file that holds them."""

    def make(*rows, **options):
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return read_task(path, **options)

    return make


def text_log_p(context, text):
    t = reader().tokenizer
    given = [t.eos, *t.encode(context)]
    return sum(log_p([*given, *t.encode(text)], len(given)))


def test_choices_are_decided_by_likelihood_per_unit(task):
    found = evaluate(reader(), task(CHOICES, CHOICES | {"gold": 0})).figures
    nats = [-text_log_p(CHOICES["context"], choice) for choice in CHOICES["choices"]]
    lengths = {"": [1, 1, 1], "_token": [2, 5, 3], "_byte": [2, 5, 3], "_char": [2, 5, 2]}
    for unit, per in lengths.items():
        costs = [n / p for n, p in zip(nats, per, strict=True)]
        best = costs.index(min(costs))
        assert found[f"accuracy{unit}"].value == ((best == 1) + (best == 0)) / 2
    bits = (nats[0] + nats[1]) / math.log(2)
    assert found["bits_per_byte"].value == pytest.approx(bits / 7, rel=1e-5)


def test_ties_go_to_the_first_option(task):
    same = {"context": "a", "choices": [" b", " b"], "gold": 0}
    found = evaluate(reader(), task(same, same | {"gold": 1}, same | {"gold": 0})).figures
    assert found["accuracy"].value == pytest.approx(2 / 3)


def test_contexts_are_decided_by_the_likelihood_of_one_text(task):
    log_ps = [text_log_p(context, CONTEXTS["continuation"]) for context in CONTEXTS["contexts"]]
    found = evaluate(reader(), task(CONTEXTS)).figures
    assert found["accuracy"].value == (log_ps[1] > log_ps[0])
    assert found["bits_per_byte"].value == pytest.approx(-log_ps[1] / math.log(2) / 10, rel=1e-5)
    assert math.isnan(found["accuracy"].error)


def test_bits_per_byte_of_answers_are_summed_before_divided(task):
    other = {"context": "", "answer": "abc"}
    found = evaluate(reader(), task(ANSWER, other)).figures["bits_per_byte"]
    bits = -(text_log_p(ANSWER["context"], ANSWER["answer"]) + text_log_p("", "abc")) / math.log(2)
    assert found.value == pytest.approx(bits / (8 + 3), rel=1e-5) and found.items == 2


def test_completions_match_exactly_up_to_a_stop(task):
    def written(row):
        item = task(row).items[0]
        prompt, _ = item.question(reader().tokenizer, 50)
        return harness.completed(reader(), [prompt], item.max_tokens)[0]

    text = written(ANSWERS)
    assert text
    right = ANSWERS | {"answers": ["no", f"  {text} "], "stop": []}
    rows = [right, ANSWERS, right | {"prompt": "something else"}]
    figures = evaluate(reader(), task(*rows)).figures
    assert figures["exact_match"].value == pytest.approx(1 / 3)
    cut = right | {"stop": [text[1:]], "answers": [text[:1]]}
    assert evaluate(reader(), task(cut)).figures["exact_match"].value == 1
    filled = MIDDLE | {"middle": written(MIDDLE)}
    found = evaluate(reader(), task(filled, MIDDLE)).figures
    assert found["exact_match"].value == 0.5 and "passed" not in found


def test_a_middle_is_scored_where_it_stands(task):
    t = reader().tokenizer
    given = [t.eos, t.fim_begin, *t.encode("def f("), t.fim_hole, *t.encode(MIDDLE["suffix"])]
    bits = -sum(log_p([*given, t.fim_end, *t.encode("x")], len(given) + 1)) / math.log(2)
    found = evaluate(reader(), task(MIDDLE)).figures
    assert found["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)


def test_programs_are_built_around_the_completion_and_run_only_if_asked(task):
    [item] = task(MIDDLE | {"check": "f(1)", "stop": ["("]}).items
    [score] = harness.score(reader().model, item.spans(reader().tokenizer, 100), 100, 264)
    ran = []
    done = Completed("y", lambda program: ran.append(program) or True)
    assert item.figures([score], done)["passed"] == Ratio(True)
    assert ran == ["def f(y):\n    return x\nf(1)\n"]
    assert "passed" not in item.figures([score], Completed("y", None))


def test_shots_stand_solved_in_front_and_are_not_scored(task):
    shots = [CHOICES | {"shot": True}, CHOICES | {"context": "1 + 1 =", "shot": True}]
    found = task(shots[0], CHOICES, shots[1])
    assert (len(found.items), found.shots) == (1, 2)
    assert found.items[0].context == "2 + 2 = four\n\n1 + 1 = four\n\n2 + 2 ="
    assert task(*shots, CHOICES, shots=1).items[0].context == "2 + 2 = four\n\n2 + 2 ="
    assert task(*shots, CHOICES, shots=0).items[0].context == "2 + 2 ="
    both = task(CONTEXTS | {"shot": True}, CONTEXTS).items[0]
    assert both.contexts[0] == "The long box is round.\n\nThe ball"
    written = task(ANSWERS | {"shot": True}, ANSWERS).items[0]
    assert written.prompt == "Q: 2?\nA:zwei\n\nQ: 2?\nA:"


def test_what_does_not_fit_is_cut_and_counted(task):
    long = ANSWER | {"context": "x" * 300}
    found = evaluate(reader(), task(ANSWER, long))
    assert (found.items, found.cut) == (2, 1) and "1 cut to the context" in found.line()
    tail = evaluate(reader(), task(ANSWER | {"context": "x" * 92})).figures  # without the eos
    alone = evaluate(reader(), task(long)).figures
    assert alone["bits_per_byte"].value == pytest.approx(tail["bits_per_byte"].value, rel=0.05)
    assert evaluate(reader(), task(ANSWERS | {"prompt": "x" * 300})).cut == 1


def test_a_hole_keeps_what_is_near_it(task):
    t = reader().tokenizer
    long = {"prefix": "1" * 90 + "2" * 30, "suffix": "3" * 30 + "4" * 90, "max_tokens": 20}
    [item] = task(MIDDLE | long).items
    tokens, cut = item.question(t, 64)
    assert cut and len(tokens) == 64
    assert [t.decode(tokens).count(digit) for digit in "1234"] == [0, 30, 30, 0]
    short, cut = item.question(t, 400)
    assert not cut and len(short) == 244
    assert evaluate(reader(), task(MIDDLE | long)).cut == 1
    [lopsided] = task(MIDDLE | long | {"suffix": "44"}).items
    assert t.decode(lopsided.question(t, 64)[0]).count("1") == 28


def test_errors_of_ratios_are_those_of_means():
    mean = figure([Ratio(x) for x in (1, 0, 0, 1, 1)])
    assert mean.value == 0.6 and mean.error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    assert figure([Ratio(2, 1), Ratio(4, 2)]) == (2, 0, 2)


def test_results_are_json(task):
    found = evaluate(reader(), task(CONTEXTS)).as_json()
    assert json.loads(json.dumps(found, allow_nan=False))["figures"]["accuracy"]["items"] == 1


def test_the_first_stop_ends_a_text():
    assert before_stop("a b c", ["c", " b"]) == "a"
    assert before_stop("abc", []) == before_stop("abc", ["x"]) == "abc"


BAD = {
    "no JSON": ("{", r":1: is no JSON"),
    "no object": ("[1]", r":1: is no JSON object"),
    "not UTF-8": (b"\xff", r":1: is no JSON"),
    "too deep": ("[" * 100_000, r":1: is no JSON"),
    "twice": ('{"context": "a", "context": "b", "answer": "c"}', r":1: .* 'context' twice"),
    "no list": (json.dumps(ANSWERS | {"stop": "x"}), r":1: stop wants a list, got 'x'"),
    "no kind": ('{"context": "a"}', r":1: names no kind: .* choices, contexts, answer, answers"),
    "missing": (json.dumps(ANSWER) + '\n\n{"answer": "a"}', r":3: lacks the field 'context'"),
    "unknown": (json.dumps(ANSWERS | {"stopp": []}), r"unknown field 'stopp'; did you mean 'stop'"),
    "type": (json.dumps(CHOICES | {"gold": "1"}), r":1: gold wants int, got '1'"),
    "types": (json.dumps(CHOICES | {"choices": [1, 2]}), r"choices\[0\] wants str, got 1"),
    "no choices": (json.dumps(CHOICES | {"choices": []}), r":1: choices wants two or more"),
    "empty choice": (json.dumps(CHOICES | {"choices": ["", "a"]}), r":1: choices wants two"),
    "gold": (json.dumps(CHOICES | {"gold": 3}), r":1: gold = 3 is none of 0 to 2"),
    "one context": (json.dumps(CONTEXTS | {"contexts": ["a"]}), r":1: contexts wants two"),
    "empty text": (json.dumps(CONTEXTS | {"continuation": ""}), r":1: continuation is empty"),
    "empty answer": (json.dumps(ANSWER | {"answer": ""}), r":1: answer is empty"),
    "no answers": (json.dumps(ANSWERS | {"answers": []}), r":1: answers is empty"),
    "stop": (json.dumps(ANSWERS | {"stop": [""]}), r":1: stop holds an empty text"),
    "tokens": (json.dumps(MIDDLE | {"max_tokens": 0}), r":1: max_tokens = 0 must be positive"),
    "shots": (json.dumps(MIDDLE | {"shot": True}), r":1: shot: .* takes no demonstrations"),
    "kinds": (f"{json.dumps(ANSWER)}\n{json.dumps(CHOICES)}", r":2: is of another kind"),
    "nothing": (json.dumps(ANSWER | {"shot": True}), r"has no item to score"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_task(path)
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        read_task(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        read_task(tmp_path / "gone.jsonl")


def test_a_damaged_model_has_no_figures(task):
    damaged = jax.tree.map(lambda x: x, reader().model)
    damaged.head.w[...] = damaged.head.w[...].at[0, 0].set(jnp.nan)
    broken = reader()._replace(model=damaged)
    for row in (CHOICES, CONTEXTS, ANSWER):
        with pytest.raises(DataError, match=r"mine\.jsonl:1: .* not finite: its weights"):
            evaluate(broken, task(row))
    with pytest.raises(CheckpointError, match="weights are damaged"):
        bits_per_byte(broken.model, broken.tokenizer, ["text"], 100)


def test_what_cannot_fit_is_named_by_its_line(task):
    with pytest.raises(DataError, match=r"mine\.jsonl:2: 101 scored tokens do not fit 1 to 100"):
        evaluate(reader(), task(ANSWER, ANSWER | {"answer": "a" * 101}))
    with pytest.raises(DataError, match=r"mine\.jsonl:1: max_tokens = 100 leaves no room"):
        evaluate(reader(), task(ANSWERS | {"max_tokens": 100}))
