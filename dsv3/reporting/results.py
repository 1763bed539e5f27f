"""What a sweep found: one row a run, as a Markdown table and as `results.jsonl`.

The rows come from the runs' own workdirs, `<folder>/<run id>`, so the table is the same whether one
process ran them all or each its own (`--index`), and a run that is missing shows as such.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.bindings import literal
from dsv3.files import write_atomically
from dsv3.reporting.lines import encoded
from dsv3.reporting.metrics import METRICS, read_metrics
from dsv3.sweeps import Run

COLUMNS = ("step", "skipped", "loss", "loss_main", "max_violation", "tokens_per_second")
COUNTERS = ("step", "tokens", "skipped")

Row = tuple[Run, Mapping[str, Any]]  # a run and what it ended with, by name


def collect(folder: str | Path, runs: Sequence[Run]) -> list[Row]:
    """What each run of a sweep ended with; an empty mapping for one that has not begun."""
    return [(run, final_metrics(Path(folder) / run.id)) for run in runs]


def final_metrics(workdir: str | Path, share: float = 0.1) -> dict[str, float]:
    """Counters of a run's last logged step, and the mean of all else over the last `share` of its
    logged steps: one step is too noisy to rank runs by. Values that are not finite are left out
    of the mean unless there are no others. Empty where there is no run."""
    rows = read_metrics(workdir) if (Path(workdir) / METRICS).is_file() else []
    tail = rows[-max(1, round(share * len(rows))) :]
    final = {}
    for name in rows[-1] if rows else ():
        values = [row[name] for row in tail if math.isfinite(row.get(name, math.nan))]
        final[name] = sum(values) / len(values) if values else math.nan
    return final | {name: rows[-1][name] for name in COUNTERS if name in final}


def results_table(rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table: the run, its bindings, then those of `columns` that any run has."""
    paths = list(dict.fromkeys(path for run, _ in rows for path in run.bindings))
    columns = [name for name in columns if any(name in found for _, found in rows)]
    table = [["run", *paths, *columns]]
    for run, found in rows:
        bound = [literal(run.bindings[path]) if path in run.bindings else "" for path in paths]
        table.append([run.id, *bound, *(_cell(found.get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
    return "".join(f"| {line} |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def write_results(folder: str | Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> str:
    """Write `results.md` and `results.jsonl` (flat: run, bindings, metrics); return the table."""
    table = results_table(rows, columns)
    objects = []
    for run, found in rows:
        bound = {path: _plain(value) for path, value in run.bindings.items()}
        objects.append(encoded({"run": run.id, **bound, **found}))
    write_atomically(Path(folder) / "results.jsonl", b"".join(objects))
    write_atomically(Path(folder) / "results.md", table)
    return table


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else literal(value)
