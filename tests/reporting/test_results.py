"""The results of a sweep: a table and a JSONL file from the runs' own workdirs."""

import json
import math

import pytest

from dsv3.config import Config, Reporting
from dsv3.reporting.lines import read_rows
from dsv3.reporting.metrics import Recorder
from dsv3.reporting.results import collect, final_metrics, results_table, write_results
from dsv3.sweeps import chain, param

RUNS = chain(
    param("training.seed", [1, 2]), param("training.clip_norm", [math.inf]), param("data.seed", [7])
).runs(Config())


def recorded(workdir, losses):
    workdir.mkdir(parents=True)
    recorder = Recorder(workdir, Reporting(every=1, tensorboard=False), 1)
    for step, loss in enumerate(losses, start=1):
        recorder.record({"step": step, "sequences": 1000 * step, "loss": loss})
    recorder.flush()


def test_final_metrics_average_the_last_tenth(tmp_path):
    recorded(tmp_path / "run", [9.0] * 18 + [1.0, 2.0])
    final = final_metrics(tmp_path / "run")
    assert final["loss"] == 1.5
    assert (final["step"], final["tokens"]) == (20, 20_000)
    assert final_metrics(tmp_path / "nowhere") == {}


def test_final_metrics_leave_out_single_broken_steps(tmp_path):
    recorded(tmp_path / "one", [9.0] * 17 + [1.0, math.nan, 2.0])
    assert final_metrics(tmp_path / "one", share=0.15)["loss"] == 1.5
    recorded(tmp_path / "all", [math.nan] * 3)
    assert math.isnan(final_metrics(tmp_path / "all")["loss"])


def test_the_table_holds_bindings_and_metrics(tmp_path):
    for run, loss in zip(RUNS[:3], [2.0, 1.25, math.nan], strict=True):
        recorded(tmp_path / run.id, [loss])
    lines = results_table(collect(tmp_path, RUNS), ("step", "loss", "bpb")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    ids = [run.id for run in RUNS]
    assert cells[0] == ["run", "training.seed", "training.clip_norm", "data.seed", "step", "loss"]
    assert cells[2:] == [
        [ids[0], "1", "", "", "1", "2"],
        [ids[1], "2", "", "", "1", "1.25"],
        [ids[2], "", "inf", "", "1", "nan"],
        [ids[3], "", "", "7", "–", "–"],
    ]
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == set("|- ")


def test_results_are_written_and_read_back(tmp_path):
    rows = [(run, {"loss": 1.5, "bpb": math.nan}) for run in RUNS]
    table = write_results(tmp_path, rows, ("loss", "bpb"))
    assert (tmp_path / "results.md").read_text() == table
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    read = read_rows(tmp_path / "results.jsonl")
    assert [row["run"] for row in read] == [run.id for run in RUNS]
    assert read[2]["training.clip_norm"] == math.inf
    assert math.isnan(read[0]["bpb"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.jsonl", "results.md"]
