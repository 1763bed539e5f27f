"""Pictures: drawn from what a recorder wrote, and showing what it says."""

import numpy as np
import pytest

from dsv3.config import Reporting
from dsv3.errors import DataError
from dsv3.reporting.metrics import Recorder
from dsv3.reporting.plots import (
    compare_runs,
    loads_figure,
    loss_figure,
    plot_run,
    relative_load,
    smoothed,
)

PNG = b"\x89PNG\r\n\x1a\n"


def recorded(workdir, steps, loads=(3, 8), broken=()):
    workdir.mkdir(exist_ok=True)
    recorder = Recorder(workdir, Reporting(every=1, tensorboard=False), 1)
    for step in range(1, steps + 1):
        loss = float("nan") if step in broken else 8 / step
        row = dict.fromkeys(["loss", "loss_main", "loss_mtp", "grad_norm"], loss)
        row |= {"tokens": 64 * step, "lr": 1e-3, "max_violation": 0.5}
        recorder.record({"step": step, **row, "load": np.full(loads, step)})
    recorder.flush()
    return workdir


def names(paths):
    return {path.name for path in paths}


@pytest.mark.parametrize("steps", [1, 40])
def test_a_run_gets_its_pictures(tmp_path, steps):
    paths = plot_run(recorded(tmp_path, steps, broken=(2,)))
    assert names(paths) == {"loss.png", "optimizer.png", "max_violation.png", "loads.png"}
    assert all(path.parent == tmp_path / "plots" for path in paths)
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert set((tmp_path / "plots").iterdir()) == set(paths)


def test_what_has_no_data_is_left_out(tmp_path):
    assert names(plot_run(recorded(tmp_path / "dense", 3, loads=(0, 8)))) == {
        "loss.png",
        "optimizer.png",
    }
    assert plot_run(recorded(tmp_path / "empty", 0)) == []
    assert plot_run(recorded(tmp_path / "broken", 2, broken=(1, 2)))
    with pytest.raises(DataError, match="no run's workdir"):
        plot_run(tmp_path / "nowhere")


def test_runs_are_compared(tmp_path):
    workdirs = [recorded(tmp_path / str(i), 3 + i) for i in range(12)]
    path = compare_runs(workdirs, [str(i) for i in range(12)], tmp_path / "all.png")
    assert path.read_bytes().startswith(PNG)


def test_loss_curves_show_the_rows():
    rows = [{"step": s, "loss_main": 2.0 * s, "loss_mtp": 0.0} for s in (1, 2, 3)]
    (axes,) = loss_figure(rows).axes
    for line in axes.lines:  # the measured and the smoothed one
        np.testing.assert_allclose(np.asarray(line.get_xydata()), [[1, 2], [2, 4], [3, 6]])
    assert len(axes.lines) == 2
    assert axes.get_ylabel() == "Cross-entropy (nats per token)"


def test_heat_maps_compare_first_and_last_on_one_scale():
    loads_nLE = np.ones((20, 2, 4))
    loads_nLE[:2, 1, 3] = 5  # of a layer's mean of 2
    first, last = loads_figure(loads_nLE).axes[:2]
    expected = [[1, 1, 1, 1], [0.5, 0.5, 0.5, 2.5]]
    np.testing.assert_allclose(np.asarray(first.images[0].get_array()), expected)
    np.testing.assert_allclose(np.asarray(last.images[0].get_array()), 1)
    assert first.images[0].get_clim() == last.images[0].get_clim() == (0, 2.5)


def test_relative_load_of_an_idle_layer_is_zero():
    assert relative_load(np.array([[0, 0], [1, 3]])).tolist() == [[0, 0], [0.5, 1.5]]


def test_smoothing_keeps_ends_lines_and_length():
    line = np.linspace(3, 7, 200)
    np.testing.assert_allclose(smoothed(line), line)
    noisy = np.random.default_rng(0).normal(size=200)
    assert np.abs(smoothed(noisy)[20:180]).mean() < 0.5 * np.abs(noisy).mean()
    assert smoothed(noisy)[[0, -1]].tolist() == pytest.approx(noisy[[0, -1]])
    assert smoothed(np.array([])).shape == (0,)
