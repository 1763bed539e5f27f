import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.bindings import operative
from dsv3.checkpoint.store import Store
from dsv3.config import Config, Data, Mla, Model, Moe, Training
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.model.transformer import Transformer
from dsv3.training.state import from_model

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
MODEL = Model(
    vocab=300,
    width=16,
    layers=2,
    dense_width=16,
    mla=Mla(heads=1, query_latent=None, kv_latent=8, nope_dim=8, rope_dim=8, value_dim=8),
    moe=Moe(
        routed_experts=4,
        experts_per_token=2,
        groups=1,
        groups_per_token=1,
        expert_width=16,
        block=16,
    ),
    mtp_depths=1,
)
CONTEXT = 40


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a random model on a corpus of its own, with one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"document {i}\n" * (5 + i))
    config = Config(
        model=MODEL,
        data=Data(corpus=str(folder / "corpus"), cache=str(folder / "cache"), held_out=0.2),
        training=Training(sequence_length=CONTEXT),
    )
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), MODEL))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)
    Store(folder / "checkpoints", 1, print).save(7, from_model(config, model), {})
    (folder / "config.gin").write_text(operative(config))
    Tokenizer(ready_made("bytes"), "bytes").save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def run(capsys, workdir):
    """run(command, *arguments) -> (exit code, stdout, stderr); keeps its caches to itself."""
    evaluate = importlib.import_module("eval").main

    def run(*arguments):
        code = 0
        try:
            cache = ["--set", f"data.cache={workdir / 'cache'}"] if arguments else []
            evaluate([*map(str, arguments), *cache])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_bpb_beside_a_compressor(run, workdir):
    code, out, err = run("bpb", "--workdir", workdir, "--set", "evaluation.held_out_bytes=900")
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"held out: \d documents, 900 bytes, 900 tokens of data\.corpus = '.*/corpus'\n"
        r"model     \d+\.\d{4} bits per byte\nxz -9     \d+\.\d{4} bits per byte\n",
        out,
    )


def test_bpb_of_another_text(run, workdir, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "b.txt").write_text("b" * 50)
    code, out, _ = run("bpb", "--workdir", workdir, "--set", f"data.corpus={tmp_path}")
    assert code == 0 and out.startswith("held out: 1 documents, 50 bytes")


def test_generate_writes_the_new_text_only(run, workdir):
    arguments = ["generate", "--workdir", workdir, "--max-tokens", 9, "--temperature", 1]
    arguments.append("--as-text")
    code, out, err = run(*arguments, "--prompt", "<｜fim▁begin｜>")
    assert (code, err) == (0, "")
    assert out and "fim" not in out
    assert run(*arguments, "--prompt", "<｜fim▁begin｜>")[1] == out
    assert run(*arguments, "--prompt", "<｜fim▁begin｜>", "--seed", 1)[1] != out
    filled = run(*arguments, "--prompt", "ab", "--fim-suffix", "cd")
    assert filled[0] == 0 and filled[1] != out


def test_generate_drafts_stops_and_caches_in_fp8(run, workdir):
    arguments = ["generate", "--workdir", workdir, "--prompt", "abc", "--max-tokens", 9]
    code, out, err = run(*arguments)
    drafted = run(*arguments, "--speculative")
    assert (code, err) == (0, "") and drafted[:2] == (code, out)
    said = r"speculative: \d+ of \d drafts accepted \(\d+\.\d%\), [12]\.\d\d tokens a step of .*\n"
    assert re.fullmatch(said, drafted[2])
    assert run(*arguments, "--stop", "zzz", "--stop", out[2]) == (
        0,
        out[: out.index(out[2])] + "\n",
        "",
    )
    assert run(*arguments, "--cache", "fp8")[0] == 0


def test_a_mesh_computes_what_one_device_does(run, workdir, tmp_path):
    if jax.device_count() != 8:
        pytest.skip("wants 8 devices")
    np.save(tmp_path / "T.npy", [[1, 2, 3]])
    arguments = ["logits", "--workdir", workdir, "--tokens", tmp_path / "T.npy", "--out"]
    mesh = ["--set", "parallel.replica=2", "--set", "parallel.local=4"]
    assert run(*arguments, tmp_path / "O", *mesh) == run(*arguments, tmp_path / "P") == (0, "", "")
    ours, single = (np.load(tmp_path / name) for name in "OP")
    for name in ("logits", "mtp_logits"):  # FP32 sums in another order, at order 1
        np.testing.assert_allclose(ours[name], single[name], atol=1e-5)


def test_a_run_of_a_mesh_that_is_not_here_is_on_one_device(run, workdir, tmp_path):
    there = tmp_path / "run"
    shutil.copytree(workdir, there)
    with (there / "config.gin").open("a") as file:
        file.write("parallel.replica = 16\n")
    arguments = ["--prompt", "abc", "--max-tokens", 9]
    code, out, err = run("generate", "--workdir", there, *arguments)
    assert (code, out) == run("generate", "--workdir", workdir, *arguments)[:2]
    assert err.startswith("on one device: parallel.replica = 16 does not fit: ")
    assert err.count("\n") == 1


def test_text_goes_to_a_terminal_without_utf8(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    importlib.import_module("eval").show("né 字")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"n? ?\n"


def test_an_empty_prompt_begins_a_document_and_the_context_ends_it(run, workdir):
    code, out, err = run("generate", "--workdir", workdir, "--max-tokens", 99)
    assert code == 0 and out
    assert err == f"ended after {CONTEXT - 1} tokens: the context of {CONTEXT} is full\n"


def test_logits_of_a_hugging_face_checkpoint(run, tmp_path):
    golden = np.load(GOLDEN / "mtp_sharded.npz")
    tokens, out = tmp_path / "T.npy", tmp_path / "O.npz"
    np.save(tokens, golden["tokens"].astype(np.int64))
    done = run("logits", "--hf", GOLDEN / "mtp_sharded", "--tokens", tokens, "--out", out)
    assert done == (0, "", "")
    found = np.load(out)
    assert set(found) == {"logits", "mtp_logits"}
    assert all(array.dtype == np.float32 for array in found.values())
    assert found["mtp_logits"].shape == found["logits"].shape == golden["logits"].shape
    # two FP32 orders of summation of logits up to 10
    np.testing.assert_allclose(found["logits"], golden["logits"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found["mtp_logits"][:, :-1], golden["mtp_logits"], atol=1e-4, rtol=0)


def test_logits_of_a_run(run, workdir, tmp_path):
    np.save(tmp_path / "T.npy", [[1, 2, 3]])
    arguments = ["logits", "--workdir", workdir, "--tokens", tmp_path / "T.npy"]
    assert run(*arguments, "--out", tmp_path / "O") == (0, "", "")
    assert np.load(tmp_path / "O")["logits"].shape == (1, 3, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["O", "T.npy"]


ERRORS = {
    "no source": ("bpb", "--workdir --hf is required"),
    "two sources": ("bpb --workdir {run} --hf {run}", "not allowed with argument --workdir"),
    "no command": ("", "required: bpb | generate | logits | tasks | lm-eval"),
    "unknown command": ("bpd --workdir {run}", "invalid choice: 'bpd'"),
    "empty prompt": ("generate --workdir {run} --prompt=", "--prompt is empty; without it"),
    "token's name": (
        "generate --workdir {run} --prompt a<｜User｜>",
        "holds '<｜User｜>': no text",
    ),
    "its name behind": (
        "generate --workdir {run} --prompt a --fim-suffix <｜fim▁end｜>",
        "holds '<｜fim▁end｜>'",
    ),
    "no number": ("generate --workdir {run} --prompt a --seed x", "--seed: invalid int value"),
    "no workdir": ("bpb --workdir {run}x", "no workdir {run}x; did you mean '{name}'"),
    "a file": ("bpb --workdir {run}/config.gin", "no workdir {run}/config.gin"),
    "no run": ("bpb --workdir {run}/corpus", "{run}/corpus is no run"),
    "no folder": ("bpb --hf {run}/x", "no Hugging Face folder {run}/x"),
    "no checkpoint": ("bpb --hf {run}/corpus", "{run}/corpus has no config.json"),
    "no tokenizer": ("bpb --hf {golden}", "{golden} has no tokenizer.json"),
    "no average": ("bpb --hf {golden} --ema", "--ema belongs to --workdir"),
    "a run's dtype": ("bpb --workdir {run} --dtype bfloat16", "--dtype belongs to --hf"),
    "model": ("bpb --workdir {run} --set model.width=8", "a trained model stays as it is"),
    "mesh": ("bpb --workdir {run} --set parallel.replica=16", "parallel.replica = 16 does not"),
    "experts": ("bpb --workdir {run} --set parallel.local=3", "parallel.local = 3 makes 3 shares"),
    "field": ("bpb --workdir {run} --set data.corpsu=x", "did you mean 'corpus'"),
    "corpus": ("bpb --workdir {run} --set data.corpus={run}/x", "{run}/x' does not exist"),
    "nothing held out": (
        "bpb --workdir {run} --set evaluation.held_out_bytes=0",
        "there is no held-out text",
    ),
    "speculative": (
        "generate --hf {golden} --prompt a --speculative",
        "no MTP module to draft with: model.mtp_depths = 0",
    ),
    "empty stop": ("generate --workdir {run} --prompt a --stop=", "--stop '' is in every text"),
    "cache": ("generate --workdir {run} --prompt a --cache int8", "invalid choice: 'int8'"),
    "temperature": ("generate --workdir {run} --prompt a --temperature -1", "temperature = -1.0"),
    "greedy cut": ("generate --workdir {run} --prompt a --top-p 0.9", "top_p = 0.9 cuts nothing"),
    "max tokens": ("generate --workdir {run} --prompt a --max-tokens 0", "max_tokens = 0"),
    "seed": ("generate --workdir {run} --prompt a --seed -1", "seed = -1"),
    "long prompt": (
        "generate --workdir {run} --prompt " + "a" * CONTEXT,
        f"{CONTEXT + 1} tokens leaves no room in the context of {CONTEXT} tokens",
    ),
    "no tokens file": ("logits --hf {golden} --tokens {run}/T --out {run}/O", "{run}/T cannot be"),
    "out is a folder": ("logits --hf {golden} --tokens {run}/T --out {run}", "--out {run} is a"),
    "no task": ("tasks --workdir {run} --tasks {run}/x.jsonl", "task {run}/x.jsonl cannot be read"),
    "no item": (
        "tasks --workdir {run} --tasks {run}/corpus/0.txt",
        "{run}/corpus/0.txt:1: is no JSON: ",
    ),
    "limit": ("tasks --workdir {run} --tasks x --limit 0", "--limit 0 must be at least 1"),
    "shots": ("lm-eval --workdir {run} --tasks x --shots -1", "--shots -1 must be at least 0"),
    "tasks out": ("lm-eval --workdir {run} --tasks x --out {run}/x/O", "--out {run}/x/O is a"),
    "megabytes": ("tasks --workdir {run} --tasks x --megabytes 0", "megabytes = 0 must lie in"),
    "seconds": ("tasks --workdir {run} --tasks x --seconds 99999999", "seconds = 99999999 must"),
    "no out folder": ("logits --hf {golden} --tokens {run}/T --out {run}/x/O", "--out {run}/x/O"),
}


@pytest.mark.parametrize(("command", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input_ends_in_one_line(run, workdir, command, message):
    places = {"run": workdir, "golden": GOLDEN / "plain", "name": workdir.name}
    code, out, err = run(*command.format(**places).split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.format(**places) in err


def test_tasks_print_a_line_and_write_json(run, workdir, tmp_path):
    choice, fill, out = tmp_path / "choice.jsonl", tmp_path / "fill.jsonl", tmp_path / "R.json"
    item = {"context": "a" * 99, "choices": ["b", "c"], "gold": 0}
    choice.write_text("\n".join(map(json.dumps, [item | {"shot": True}, item, item])))
    row = {"prefix": "x = '", "suffix": "'", "middle": "y", "max_tokens": 4, "check": "x = 1"}
    fill.write_text(json.dumps(row) + "\n")
    arguments = ["tasks", "--workdir", workdir, "--out", out, "--tasks", choice]
    code, printed, err = run(*arguments, fill, "--limit", 1, "--execute")
    assert code == 0 and re.fullmatch("programs run as you, with limits; network .+\n", err)
    first, second = printed.splitlines()
    assert re.match(r"choice: 1 items · 1 shots · accuracy [01]\.0000 · .*cut", first)
    assert re.match(r"fill: 1 items · exact_match .* · passed [01]\.0000 · bits_per_byte", second)
    found = json.loads(out.read_text())
    assert found["choice"]["items"] == 1 and found["choice"]["cut"] == 1
    assert "passed" in found["fill"]["figures"]
    assert "passed" not in run("tasks", "--workdir", workdir, "--tasks", fill)[1]
    assert "names two files 'choice'" in run(*arguments, choice)[2]


def test_everything_fits_before_anything_is_scored(run, workdir, tmp_path):
    good, bad, out = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "R.json"
    good.write_text(json.dumps({"context": "a", "answer": "b"}))
    arguments = ["tasks", "--workdir", workdir, "--out", out, "--tasks", good]
    for row, message in (
        ({"context": "a", "answer": "b" * (CONTEXT + 1)}, "scored tokens do not fit"),
        ({"prompt": "a", "answers": ["b"], "max_tokens": CONTEXT}, "leaves no room"),
    ):
        bad.write_text(json.dumps(row))
        code, printed, err = run(*arguments, bad)
        assert (code, printed) == (2, "") and f"{bad}:1: " in err and message in err
    assert not out.exists()
    code, printed, err = run(*arguments, "--shots", 2)
    assert (code, err) == (0, "good: --shots 2, but it holds 0 demonstrations\n")


def test_lm_eval_is_an_extra(run, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "dsv3.evaluation.lm_eval_adapter", raising=False)
    code, _, err = run("lm-eval", "--workdir", workdir, "--tasks", "arc_easy")
    assert code == 2 and err.endswith("install it with: pip install 'dsv3[lm-eval]'\n")


def test_tokens_beyond_the_vocabulary_are_named_and_nothing_is_written(run, tmp_path):
    np.save(tmp_path / "T.npy", [[1, 64]])
    tokens, out = tmp_path / "T.npy", tmp_path / "O.npz"
    code, _, err = run("logits", "--hf", GOLDEN / "plain", "--tokens", tokens, "--out", out)
    assert code == 2 and f"{tokens}[0, 1] = 64 is no id of the vocabulary, 0 to 63" in err
    assert not out.exists()


def test_as_a_program():
    command = [sys.executable, "eval.py", "bpb", "--workdir", "absent"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: no workdir absent")
