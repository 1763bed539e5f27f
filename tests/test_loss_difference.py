"""The comparison of losses, on losses made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import loss_difference
from benchmarks.loss_difference import differences, interval, main, nudged, smoothed
from dsv3.config import Fp8Dot

ARGUMENTS = ["configs/tiny.py", "--arms", "bf16,fp8", "--seeds", "2"]


@pytest.fixture
def made(monkeypatch):
    """Runs that are constant and 1 % above BF16 in FP8; the list of those that were made."""
    runs = []

    def losses(config, arm, seed):
        fp8 = isinstance(arm.rule, Fp8Dot)
        runs.append((fp8, seed))
        return [(4.0 + seed) * (1.01 if fp8 else 1.0)] * 8

    monkeypatch.setattr(loss_difference, "main_losses", losses)
    return runs


def test_runs_are_compared_made_once_and_drawn(made, tmp_path, capsys):
    out, picture = tmp_path / "runs.jsonl", tmp_path / "picture.png"
    main([*ARGUMENTS, "--out", str(out), "--plot", str(picture)])
    line = "| fp8 | 2 | +1.000% ± 0.000% | 0.000% | 1.000% |"
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert made == [(False, 0), (True, 0), (False, 1), (True, 1)]
    assert picture.stat().st_size > 1000
    main([*ARGUMENTS, "--seeds", "3", "--out", str(out)])
    assert made[4:] == [(False, 2), (True, 2)]
    assert "| fp8 | 3 |" in capsys.readouterr().out
    main([*ARGUMENTS, "--out", str(out), "--set", "training.learning_rate=0.5"])
    assert len(made) == 6 + 4  # another experiment
    assert "| fp8 | 2 |" in capsys.readouterr().out


def test_smoothing_pairs_and_confidence():
    assert smoothed([10.0, 0.0, 10.0]).tolist() == pytest.approx([10.0, 9.0, 9.1])
    losses = {"bf16": {0: np.array([2.0]), 5: np.array([4.0])}, "fp8": {5: np.array([5.0])}}
    assert differences(losses, "fp8").tolist() == [[0.25]]
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert np.isnan(interval(np.array([1.0])))


def test_a_nudge_is_small_and_no_nudge_is_none():
    params = {"w": jnp.linspace(1.0, 2.0, 64)}
    np.testing.assert_array_equal(nudged(params, 0.0, 0)["w"], params["w"])
    moved = np.asarray(nudged(params, 1e-6, 0)["w"] / params["w"] - 1)
    assert 0 < np.abs(moved).max() < 1.2e-6


def test_an_unknown_arm_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["configs/tiny.py", "--arms", "bf61", "--out", str(tmp_path / "o")])
    assert caught.value.code == 2 and "did you mean 'bf16'" in capsys.readouterr().err
