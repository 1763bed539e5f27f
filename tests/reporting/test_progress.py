"""Progress: a bar on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from dsv3.reporting.progress import TrainingProgress, duration


def shown(steps, monkeypatch, *, terminal):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, _environ={})
    with TrainingProgress(total=120, every=50, console=console) as progress:
        for step in steps:
            progress.update({"step": step, "loss": 2.5, "tokens_per_second": 12345.6})
            now[0] += 1.0
        progress.say("saved [step 120]")
    return text.getvalue()


def test_without_a_terminal_there_are_plain_lines(monkeypatch):
    lines = shown(range(1, 121), monkeypatch, terminal=False).splitlines()
    assert lines == [
        "step   1/120 · loss 2.5000 · 12,346 tokens/s",
        "step  50/120 · loss 2.5000 · 12,346 tokens/s · 1m 10s left",
        "step 100/120 · loss 2.5000 · 12,346 tokens/s · 20s left",
        "step 120/120 · loss 2.5000 · 12,346 tokens/s · 0s left",
        "saved [step 120]",
    ]


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    text = shown([7, 8], monkeypatch, terminal=True)
    assert "━" in text
    assert "compiling the first step" in text
    assert "step   8/120 · loss 2.5000 · 12,346 tokens/s · 1m 52s left" in text
    assert "saved [step 120]" in text


def test_losses_that_are_not_finite_and_rows_without_a_rate(capsys):
    TrainingProgress(total=1, every=1).update({"step": 1, "loss": float("nan")})
    assert capsys.readouterr().out == "step 1/1 · loss nan\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (130, "2m 10s"), (11100, "3h 05m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
