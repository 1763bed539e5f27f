"""The comparison of smoothed losses, on losses made by hand."""

import json

import pytest

from benchmarks.loss_difference import main, smoothed


def run(folder, losses):
    folder.mkdir()
    lines = [json.dumps({"loss_main": loss}) for loss in losses]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_losses_are_smoothed_and_compared(tmp_path, capsys):
    a = run(tmp_path / "a", [10.0, 0.0, 10.0])
    assert smoothed(a).tolist() == pytest.approx([10.0, 9.0, 9.1])
    b, c = run(tmp_path / "b", [4.0] * 6), run(tmp_path / "c", [4.04] * 6)
    main([b, c, b, b])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| c against b | +1.00% | +1.00% | 1.00% |",
        "| b against b | +0.00% | +0.00% | 0.00% |",
        "| seeds: b against b | +0.00% | +0.00% | 0.00% |",
    ]


@pytest.mark.parametrize(("count", "complaint"), [(1, "no pairs"), (2, "no run has logged")])
def test_bad_input(count, complaint, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / str(i)) for i in range(count)])
    assert caught.value.code == 2 and complaint in capsys.readouterr().err
