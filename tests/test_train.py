"""Runs from the outside: resume bit for bit, signals, kill -9, sweeps, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import train as train_module
from dsv3.bindings import apply, operative, parse, read_bindings
from dsv3.checkpoint.store import Store
from dsv3.config import Config
from dsv3.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from dsv3.reporting.metrics import read_metrics
from dsv3.sweeps import param
from dsv3.training import state as train_state
from tests.processes import free_port, outputs, running
from tests.training.small import CONFIG as SMALL

ROOT = Path(__file__).parent.parent
KEYS = {
    "step", "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm", "lr",
    "tokens_per_second", "max_violation",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache):
    return apply(SMALL, {"data.cache": str(cache)})


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory):
    """Nine steps in one go: the workdir."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train_module.train(apply(SMALL, {"data.cache": str(cache)}), workdir, steps=9)
    return workdir


def final_state(workdir, config):
    restored = Store(workdir / "checkpoints", 3, pytest.fail).restore(train_state.abstract(config))
    assert restored is not None
    return restored


def rows_of(workdir):
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_metrics(workdir)]


def assert_same_run(one, other, config):
    a, b = final_state(one, config), final_state(other, config)
    assert a.step == b.step
    chex.assert_trees_all_equal(a.state, b.state)
    assert a.extra["loader"] == b.extra["loader"]
    assert rows_of(one) == rows_of(other)


def test_a_run_leaves_what_the_interface_promises(uninterrupted, config):
    rows = read_metrics(uninterrupted)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(KEYS <= row.keys() for row in rows)
    assert [row["tokens"] for row in rows] == [8 * 16 * n for n in range(1, 10)]
    assert apply(Config(), read_bindings(uninterrupted / "config.gin")) == config
    assert Store(uninterrupted / "checkpoints", 3, pytest.fail).steps() == [4, 8, 9]


@pytest.mark.parametrize("cut", [3, 4])
def test_resumed_is_uninterrupted_bit_for_bit(cut, uninterrupted, config, tmp_path):
    train_module.train(config, tmp_path, steps=cut)
    train_module.train(config, tmp_path, steps=9)
    assert_same_run(tmp_path, uninterrupted, config)


def test_a_damaged_checkpoint_costs_the_interval_and_nothing_else(
    uninterrupted, config, tmp_path, capsys
):
    train_module.train(config, tmp_path, steps=8)
    victim = max((tmp_path / "checkpoints" / "step-8").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train_module.train(config, tmp_path, steps=9)
    said = capsys.readouterr().out
    assert "step-8" in said and "resuming after step 4" in said
    assert_same_run(tmp_path, uninterrupted, config)


def test_other_data_is_refused(config, tmp_path):
    train_module.train(config, tmp_path, steps=2)
    with pytest.raises(DataError, match="other data"):
        train_module.train(apply(config, {"data.seed": 5}), tmp_path, steps=3)


def test_changed_fields_are_named(config, tmp_path, capsys):
    train_module.train(config, tmp_path, steps=2)
    train_module.train(apply(config, {"training.learning_rate": 0.5}), tmp_path, steps=3)
    assert "changed since step 2: training.learning_rate = 0.5" in capsys.readouterr().out


def command(config, workdir, *arguments):
    """The command line of a run of `config`, which is written where it can be loaded."""
    file = Path(workdir) / "asked.gin"
    Path(workdir).mkdir(exist_ok=True)
    file.write_text(operative(config))
    base = [sys.executable, "train.py", "configs/bench_cpu.py", "--workdir", str(workdir)]
    return [*base, "--bindings", str(file), *arguments]


def launched(config, workdir, *arguments):
    return subprocess.Popen(
        command(config, workdir, *arguments), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def wait_for_step(workdir, step, process):
    metrics = Path(workdir) / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def test_stopped_and_killed_runs_resume_bit_for_bit(config, tmp_path):
    """SIGTERM saves the step it meets; SIGKILL costs at most the interval; the end is the same."""
    config = apply(config, {"training.tokens": 16 * 8 * 4000, "checkpoint.every": 50})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()

    process = launched(config, broken)
    wait_for_step(broken, 20, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "SIGTERM: saved step" in said
    (stopped,) = Store(broken / "checkpoints", 3, pytest.fail).steps()
    assert stopped == read_metrics(broken)[-1]["step"] >= 20

    process = launched(config, broken)
    wait_for_step(broken, stopped + 60, process)
    process.kill()
    process.communicate()
    survived = Store(broken / "checkpoints", 3, pytest.fail).steps()[-1]
    assert survived >= stopped + 50

    last = survived + 10
    train_module.train(config, broken, steps=last)
    train_module.train(config, whole, steps=last)
    assert_same_run(broken, whole, config)


def test_a_run_goes_on_over_other_processes_and_devices(uninterrupted, config, tmp_path, capsys):
    """Two processes of two devices, then eight devices of one, or one: the same data and losses.

    Sums over devices are made in another order, and AdamW divides by small numbers: after 9 steps
    gradients differed by 1e-4 of themselves, losses by less than 1e-5.
    """
    together = apply(config, {"parallel.replica": None, "parallel.local": 2})
    eight = apply(config, {"parallel.replica": 2, "parallel.node": 2, "parallel.local": 2})
    workdir, port = tmp_path / "run", free_port()
    where = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    asked = [command(together, workdir, "--steps", "4", *where, process)[1:] for process in "01"]
    with running(*asked, devices=2) as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [0, 0], said
    assert any("4 x cpu: replica 2 · local 2" in line for line in said[0])
    assert not [line for line in said[1] if "step" in line]  # the first speaks
    alone = shutil.copytree(workdir, tmp_path / "alone")
    train_module.train(eight, workdir, steps=9)
    assert "resuming after step 4" in capsys.readouterr().out
    train_module.train(config, alone, steps=9)
    wanted = rows_of(uninterrupted)
    for found in (rows_of(workdir), rows_of(alone)):
        assert [row["step"] for row in found] == [row["step"] for row in wanted]
        for name in ("tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            rtol = 1e-3 if name == "grad_norm" else 1e-5
            values = [[row[name] for row in rows] for rows in (found, wanted)]
            np.testing.assert_allclose(*values, rtol=rtol, err_msg=name)
    assert Store(workdir / "checkpoints", 3, pytest.fail).steps() == [4, 8, 9]


@pytest.mark.parametrize(
    ("asked", "unlike"),
    [
        (
            ("--steps 6", "--steps 7 --set training.learning_rate=1e-1"),
            "--steps is 6 in process 0 and 7 in process 1; "
            "training.learning_rate is 0.002 in process 0 and 0.1 in process 1",
        ),
        (("--sweep mtp --index 1", "--sweep mtp"), "--index is 1 in process 0 and None in"),
    ],
)
def test_processes_that_are_asked_for_unlike_things_say_which(asked, unlike, tmp_path):
    base = ["train.py", "configs/tiny.py", "--workdir", tmp_path / "run"]
    base += ["--set", "parallel.replica=None", "--processes", "2"]
    base += ["--coordinator", f"127.0.0.1:{free_port()}", "--process"]
    own = [[process, "--set", f"data.cache={tmp_path / process}"] for process in "01"]
    with running(*([*base, *own[i], *asked[i].split()] for i in range(2))) as begun:
        said = outputs(begun)
    assert [process.returncode for process in begun] == [2, 2], said
    assert said[0] == said[1] and len(said[0]) == 1
    assert said[0][0].startswith(f"error: {unlike}")
    assert not (tmp_path / "run").exists()


def test_a_sweep_runs_from_python_and_ends_in_a_table(config, tmp_path):
    over = param("training.learning_rate", [1e-3, 1e-2])
    table = train_module.sweep(config, over, tmp_path, steps=2)
    runs = over.runs(config)
    assert all(run.id in table for run in runs)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["training.learning_rate"] for row in rows] == [1e-3, 1e-2]
    assert all(row["step"] == 2 for row in rows)
    alone = train_module.sweep(config, over, tmp_path / "alone", index=1, steps=2)
    assert runs[1].id in alone and not (tmp_path / "alone" / runs[0].id).exists()


def test_a_run_that_diverges_does_not_end_its_sweep(config, tmp_path, capsys):
    over = param("training.learning_rate", [1e30, 1e-3])
    impatient = apply(config, {"training.max_bad_steps": 2})
    diverged, sound = over.runs(impatient)
    train_module.sweep(impatient, over, tmp_path, steps=5)
    assert f"run {diverged.id} ended: 2 steps in a row" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = {row["run"]: row for row in found}
    assert rows[sound.id]["step"] == 5 and rows[diverged.id]["skipped"] == 2
    with pytest.raises(TrainingError):
        train_module.sweep(impatient, over, tmp_path, index=0, steps=5)


@pytest.mark.parametrize("name", ["config.gin", "tokenizer.json", "metrics.jsonl"])
def test_what_is_no_run_is_not_written_over(name, config, tmp_path):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(UserError, match=f"is no run's, but holds {name}"):
        train_module.train(config, tmp_path, steps=1)
    assert [path.read_text() for path in tmp_path.iterdir() if path.name != ".lock"] == [
        "somebody's"
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["configs/tinny.py"], "did you mean 'tiny.py'?"),
        (["configs/tiny.py", "--set", "model.moe.expert_per_token=4"], "'experts_per_token'"),
        (["configs/tiny.py", "--set", " # "], "--set ' # ' binds nothing"),
        (["configs/tiny.py", "--set", "model.layers=1.5"], "model.layers wants int, got 1.5"),
        (
            ["configs/tiny.py", "--set", "model.moe.groups=3"],
            "model.moe.groups = 3 does not divide",
        ),
        (["configs/tiny.py", "--set", "data.corpus=/nowhere"], "/nowhere"),
        (["configs/tiny.py", "--sweep", "balanse"], "did you mean 'balance'?"),
        (["configs/tiny.py", "--index", "0"], "--index wants --sweep"),
        (["configs/tiny.py", "--steps", "0"], "--steps 0"),
        (["configs/tiny.py", "--bindings", "none.gin"], "none.gin"),
        (["configs/tiny.py", "--set", "data.tokenizer=deepseek"], "model.vocab = 2048"),
        ([], "config"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as exit:
        train_module.main([*arguments, "--workdir", str(tmp_path / "run")])
    assert exit.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in line and "error" in line


def test_a_checkpoint_of_another_model_is_refused_by_name(uninterrupted, config):
    other = apply(config, {"model.moe.expert_width": 24})
    before = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    fields = r"is of another configuration: model.moe.expert_width is 16 in it and 24 here$"
    with pytest.raises(CheckpointError, match=fields):
        train_module.train(other, uninterrupted, steps=10)
    innocent = {"model.moe.gate_scale": 2.0, "training.optimizer.moment_dtype": "float32"}
    with pytest.raises(CheckpointError, match=r"configuration: training.optimizer.moment_dtype is"):
        train_module.train(apply(config, innocent), uninterrupted, steps=10)
    with pytest.raises(ConfigError, match=r"training.seed = 5 is not what"):
        train_module.train(apply(config, {"training.seed": 5}), uninterrupted, steps=10)
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == before


def test_a_run_that_only_diverges_ends_with_its_last_good_checkpoint(config, tmp_path):
    """A learning rate of 1e30 makes every loss non-finite after a step or two."""
    train_module.train(config, tmp_path, steps=4)
    wild = apply(config, {"training.learning_rate": 1e30, "training.max_bad_steps": 3})
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train_module.train(wild, tmp_path, steps=9)
    kept = final_state(tmp_path, config)
    assert kept.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.state.params))
    assert read_metrics(tmp_path)[-1]["skipped"] == 3


def test_bindings_reproduce_the_operative_configuration(config):
    assert apply(Config(), parse(operative(config))) == config
