"""Sweeps and configuration files: ids that last, everything validated before anything runs."""

import numpy as np
import pytest

from dsv3.bindings import apply, parse
from dsv3.config import AuxLoss, Config
from dsv3.errors import ConfigError
from dsv3.sweeps import (
    chain,
    describe,
    load_config,
    load_sweep,
    param,
    product,
    run_id,
    select,
    zipped,
)

WIDTHS = param("model.width", [32, 64])
SEEDS = param("training.seed", [0, 1, 2])


def test_combinators():
    assert list(product(WIDTHS, SEEDS)) == [
        {"model.width": w, "training.seed": s} for w in (32, 64) for s in (0, 1, 2)
    ]
    pairs = zipped(WIDTHS, param("model.layers", [2, 3]))
    assert [tuple(p.values()) for p in pairs] == [(32, 2), (64, 3)]
    assert list(chain(WIDTHS, SEEDS)) == [*WIDTHS, *SEEDS]
    assert len(product(WIDTHS, zipped(SEEDS, param("data.seed", [4, 5, 6])))) == 6


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: param("model.width", []), "model.width has no values"),
        (lambda: zipped(WIDTHS, SEEDS), "length: 2, 3"),
        (lambda: product(WIDTHS, WIDTHS), "binds model.width more than once"),
    ],
)
def test_sweeps_that_cannot_be(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_runs_are_the_bindings_applied():
    runs = product(WIDTHS, SEEDS).runs(Config())
    assert [run.config.training.seed for run in runs] == [0, 1, 2, 0, 1, 2]
    for run in runs:
        assert run.config == apply(Config(), run.bindings)
        assert run.id == run_id(run.bindings)


def test_ids_last():
    ids = {run.id for run in product(WIDTHS, SEEDS).runs(Config())}
    assert len(ids) == 6
    assert {run.id for run in product(SEEDS, WIDTHS).runs(Config())} == ids
    assert {run.id for run in product(WIDTHS, param("training.seed", [2])).runs(Config())} < ids
    assert run_id({"model.width": 32, "training.seed": 0}) == "e0342f61"  # across versions, too


def test_values_from_numpy_and_whole_sections():
    points = list(param("training.learning_rate", np.logspace(-3, -2, 2)))
    assert [type(p["training.learning_rate"]) for p in points] == [float, float]
    (run,) = param("model.moe.balance", [AuxLoss(alpha=0.5)]).runs(Config())
    assert run.config.model.moe.balance == AuxLoss(alpha=0.5)
    assert all(isinstance(value, float | str) for value in run.bindings.values())


def test_all_runs_are_validated_before_one_starts():
    with pytest.raises(ConfigError, match=r"\(model.moe.groups = 3\): model.moe.groups = 3 does"):
        param("model.moe.groups", [4, 2, 3]).runs(Config())
    with pytest.raises(ConfigError, match=r"unknown path model.widht.*'width'"):
        param("model.widht", [4]).runs(Config())
    with pytest.raises(ConfigError, match=r"\(model.width = 32\) occurs twice"):
        chain(WIDTHS, WIDTHS).runs(Config())


def test_select():
    runs = WIDTHS.runs(Config())
    assert select(runs, 1) is runs[1]
    for index in (2, -1):
        with pytest.raises(ConfigError, match=f"--index {index}: the sweep has runs 0 to 1"):
            select(runs, index)


def test_described_bindings_read_back():
    (point,) = param("model.moe.balance", [AuxLoss(alpha=0.5)])
    text = describe(point).replace(", ", "\n")
    assert apply(Config(), parse(text)) == apply(Config(), point)
    assert describe({}) == "base"


# --- configuration files -----------------------------------------------------------------------

GOOD = """
from dsv3.config import Config, Model
from dsv3.sweeps import param

def get_config():
    return Config(model=Model(width=32))

sweeps = {"seeds": lambda: param("training.seed", [0, 1]), "wrong": lambda: [{}]}
"""


def test_load(tmp_path):
    file = tmp_path / "good.py"
    file.write_text(GOOD)
    assert load_config(file).model.width == 32
    assert load_config(str(file)) == load_config(file)
    assert load_sweep(file, "seeds") == param("training.seed", [0, 1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "bad.py: defines no get_config"),
        ("def get_config(): return {}", "bad.py: get_config() returned a dict, not a Config"),
        ("def get_config(:", "bad.py:1: SyntaxError: "),
        ("\nimport nonsense", "bad.py:2: ModuleNotFoundError: "),
        ("from dsv3.config import *\n\ndef get_config():\n  return Model(widht=3)",
         "bad.py:4: TypeError: Model.__init__() got an unexpected keyword argument 'widht'"),
        ("from dsv3.config import *\nx = Model(width=-3)",
         "bad.py:2: model.width = -3 must be positive"),
        ("\x00", "bad.py"),
    ],
)  # fmt: skip
def test_configuration_files_that_cannot_be(tmp_path, text, told):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "bad.py")
    assert told in str(raised.value)


def test_missing_files_and_sweeps_are_told_the_nearest(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"goood\.py; did you mean 'good\.py'"):
        load_config(tmp_path / "goood.py")
    with pytest.raises(ConfigError, match=r"no sweep 'seed'; did you mean 'seeds'"):
        load_sweep(tmp_path / "good.py", "seed")
    with pytest.raises(ConfigError, match="'wrong' returned a list, not a Sweep"):
        load_sweep(tmp_path / "good.py", "wrong")
    (tmp_path / "bare.py").write_text("x = 1")
    with pytest.raises(ConfigError, match="no sweep 'seeds'; it defines none"):
        load_sweep(tmp_path / "bare.py", "seeds")
