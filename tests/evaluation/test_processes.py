"""Several processes, whose devices are one mesh, find what one process finds on one device."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import eval as evaluate
from dsv3.data.tokenizer import ready_made
from tests.checkpoint.folders import GOLDEN, edit_config, edit_tensors
from tests.processes import free_port, outputs, running

HOLE = {"prefix": "# ", "suffix": "\n", "middle": "12", "check": "assert True", "max_tokens": 4}
GENERATE = ["generate", "--prompt", "def f(", "--max-tokens", "20"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A checkpoint, its vocabulary wide enough for the bytes."""
    folder = Path(shutil.copytree(GOLDEN / "groups", tmp_path_factory.mktemp("run") / "hf"))
    rows = np.random.default_rng(0).normal(0, 0.3, (272, 32)).astype(np.float32)
    wide = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), rows)
    edit_tensors(folder, lambda tensors: tensors.update(wide))
    edit_config(folder, vocab_size=272)
    (folder / "tokenizer.json").write_text(ready_made("bytes"))
    return folder


def commands(hf, out, *bindings):
    """eval.py's arguments, and the files in `out` that they speak of."""
    out.mkdir()
    np.save(out / "tokens.npy", np.random.default_rng(1).integers(0, 272, (3, 9)))
    (out / "hole.jsonl").write_text(json.dumps(HOLE))
    task = ["tasks", "--tasks", str(out / "hole.jsonl"), "--execute"]
    sets = [f"--set={binding}" for binding in ("training.compute_dtype=float32", *bindings)]
    return [
        [*command, "--hf", str(hf), *sets]
        for command in (
            [*GENERATE, "--stop", "never in it"],  # so the host looks at portions
            ["logits", "--tokens", str(out / "tokens.npy"), "--out", str(out / "logits.npz")],
            [*task, "--out", str(out / "results.json")],
        )
    ]


def test_two_processes_find_what_one_does(hf, tmp_path, capfd):
    cache = f"data.cache={tmp_path / 'cache'}"
    for command in commands(hf, tmp_path / "one", cache):
        evaluate.main(command)
    alone = capfd.readouterr().out.splitlines()
    asked = commands(hf, tmp_path / "two", cache, "parallel.node=2", "parallel.local=2")
    (tmp_path / "commands.json").write_text(json.dumps(asked))
    base = ["-m", "tests.evaluation.worker", free_port(), 2]
    with running(*([*base, me, tmp_path / "commands.json"] for me in range(2)), devices=2) as begun:
        first, second = outputs(begun)
    assert [process.returncode for process in begun] == [0, 0], (first, second)
    assert [line for line in first if line in alone] == alone
    assert not [line for line in second if not line.startswith("[Gloo]")]  # the runtime's own
    one, two = (np.load(tmp_path / name / "logits.npz")["logits"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    figures = json.loads((tmp_path / "two" / "results.json").read_text())["hole"]["figures"]
    assert figures["passed"]["value"] == 1


def test_processes_that_are_asked_for_other_things_say_so(hf, tmp_path):
    files = []
    for seed in (0, 1):
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps([[*GENERATE, "--hf", str(hf), "--seed", str(seed)]]))
    base = ["-m", "tests.evaluation.worker", free_port(), 2]
    with running(*([*base, me, file] for me, file in enumerate(files))) as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [2, 2]
    assert said == [["error: --seed is '0' in process 0 and '1' in process 1"]] * 2
