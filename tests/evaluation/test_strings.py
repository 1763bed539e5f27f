import importlib
import importlib.util
import json
import math
from typing import NamedTuple

import pytest

from dsv3.errors import DataError
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.harness import completed
from dsv3.evaluation.scoring import SpanError
from dsv3.evaluation.strings import completions, loglikelihoods, rolling
from dsv3.inference.generate import prompt_tokens
from dsv3.inference.sampling import Greedy
from tests.evaluation.small import log_p, reader

ADAPTER = "dsv3.evaluation.lm_eval_adapter"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval, an extra, is not installed"
)


def test_loglikelihoods_are_those_behind_the_context():
    t = reader().tokenizer
    pairs = [("a b", " c"), ("", "xy"), ("a b", " dd"), ("x" * 200, "y")]
    for (context, text), (found, _) in zip(pairs, loglikelihoods(reader(), pairs), strict=True):
        tokens = [t.eos, *t.encode(context), *t.encode(text)]
        scored = tokens[-(reader().context + 1) :]
        assert found == pytest.approx(
            sum(log_p(scored, len(scored) - len(t.encode(text)))), rel=1e-5
        )


def test_greedy_continuations_are_what_is_completed():
    prompts = [chr(97 + i) for i in range(16)]
    texts = completions(reader(), [(prompt, {"max_gen_toks": 2}) for prompt in prompts])
    # bytes that are no UTF-8 do not come back as text; at least one of 16 is ASCII, or reseed
    prompt, text = next((p, t) for p, t in zip(prompts, texts, strict=True) if t and t.isascii())
    pairs = [(prompt, text), (prompt, text + "~~"), (prompt, "~" + text)]
    assert [greedy for _, greedy in loglikelihoods(reader(), pairs)] == [True, False, False]


def test_documents_are_scored_as_bits_per_byte_are():
    texts = ["x" * 250, "def f():\n    return é\n", ""]
    found = rolling(reader(), texts)
    for text, log_likelihood in zip(texts[:2], found[:2], strict=True):
        r = reader()
        bits = bits_per_byte(r.model, r.tokenizer, [text], r.context).bits
        assert -log_likelihood / math.log(2) == pytest.approx(bits, rel=1e-5)
    assert found[2] == 0
    assert rolling(reader(), []) == []


def test_completions_obey_their_keywords():
    asked = [
        ("ab", {"max_gen_toks": 6}),
        ("ab", {"max_gen_toks": 6, "until": []}),
        ("z" * 300, {"until": None}),
        ("ab", {"max_gen_toks": 6, "do_sample": True, "temperature": 5.0}),
    ]
    first, same, long, drawn = completions(reader(), asked)
    assert first == same != drawn
    [cut] = completions(reader(), [("ab", {"max_gen_toks": 6, "until": first[2]})])
    assert cut == first[: first.index(first[2])]
    prompt = prompt_tokens(reader().tokenizer, "z" * 300)[-50:]  # half of the context of 100
    assert [long] == completed(reader(), [prompt], 50, Greedy())


def test_what_cannot_be_scored_is_said():
    with pytest.raises(DataError, match="request 1 scores an empty continuation"):
        loglikelihoods(reader(), [("a", "b"), ("a", "")])
    with pytest.raises(SpanError, match="101 scored tokens do not fit"):
        loglikelihoods(reader(), [("a", "b" * 101)])


class Request(NamedTuple):
    """What the harness hands over: only `args` is read."""

    args: tuple


@needs_lm_eval
def test_the_adapter_passes_requests_on():
    lm = importlib.import_module(ADAPTER).Dsv3LM(reader())
    pairs = [("a b", " c"), ("", "xy")]
    assert lm.loglikelihood([Request(pair) for pair in pairs]) == loglikelihoods(reader(), pairs)
    assert lm.loglikelihood_rolling([Request(("text",))]) == rolling(reader(), ["text"])
    asked = ("ab", {"until": ["\n"], "max_gen_toks": 4})
    assert lm.generate_until([Request(asked)]) == completions(reader(), [asked])


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_the_harness_runs_its_tasks_unchanged(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": "2 + 2 =", "choices": [" 4", " 5"], "gold": 0}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    kinds = {
        "choice": ("multiple_choice", "gold", "doc_to_choice: choices"),
        "write": ("generate_until", '"{{choices[0]}}"', "generation_kwargs: {until: ['!']}\n"
                  "metric_list: [{metric: exact_match}]"),
    }  # fmt: skip
    for name, (kind, target, more) in kinds.items():
        text = TASK.format(
            name=f"dsv3_{name}", data=tmp_path / "rows.json", kind=kind, target=target, more=more
        )
        (tmp_path / f"{name}.yaml").write_text(text)
    adapter = importlib.import_module(ADAPTER)
    found = adapter.run(reader(), ["dsv3_choice", "dsv3_write"], str(tmp_path))["results"]
    four, five = (p for p, _ in loglikelihoods(reader(), [("2 + 2 =", c) for c in (" 4", " 5")]))
    assert found["dsv3_choice"]["acc,none"] == (four >= five)
    assert found["dsv3_write"]["exact_match,none"] in (0, 1)
    with pytest.raises(adapter.UserError, match="no task dsv3_chioce"):
        adapter.run(reader(), ["dsv3_chioce"], str(tmp_path))
