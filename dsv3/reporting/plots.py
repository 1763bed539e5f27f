"""Pictures of a run from what its recorder wrote: losses, expert loads, balance, the optimizer.

The heat maps are those of Fig. 9: an expert's relative load is what it was given over what it
would be given in perfect balance. MaxVio is the largest of them less one, averaged over layers.
Figures are built without pyplot, so nothing here touches matplotlib's global state or a display.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from dsv3.files import write_atomically
from dsv3.reporting.fp8_plots import fp8_figures
from dsv3.reporting.lines import is_finite
from dsv3.reporting.metrics import read_loads, read_metrics

Rows = Sequence[Mapping[str, Any]]


def plot_run(workdir: str | Path) -> list[Path]:
    """Write the pictures of a run into `<workdir>/plots`, leaving out what it has no data for.

    Raises DataError where there is no run.
    """
    rows, (_, loads_nLE) = read_metrics(workdir), read_loads(workdir)
    figures = {}
    if rows:
        figures |= {"loss.png": loss_figure(rows), "optimizer.png": optimizer_figure(rows)}
    if loads_nLE.size:
        figures |= {"max_violation.png": balance_figure(rows), "loads.png": loads_figure(loads_nLE)}
    figures |= fp8_figures(rows)
    folder = Path(workdir) / "plots"
    folder.mkdir(exist_ok=True)
    return [_write(figure, folder / name) for name, figure in figures.items()]


def compare_runs(workdirs: Sequence[str | Path], labels: Sequence[str], path: str | Path) -> Path:
    """Overlay the main losses of several runs, by tokens consumed."""
    figure, axes = _figure(width=7 + 0.07 * max(map(len, labels)))
    for workdir, label, colour in zip(workdirs, labels, _colours(len(labels)), strict=True):
        rows = read_metrics(workdir)
        _curve(axes, series(rows, "tokens"), series(rows, "loss_main"), colour, label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _label(axes, "Tokens consumed", "Main cross-entropy (nats per token)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return _write(figure, Path(path))


# --- figures -----------------------------------------------------------------------------------


def loss_figure(rows: Rows) -> Figure:
    """Main and MTP cross-entropy by step."""
    figure, axes = _figure()
    steps, main, mtp = (series(rows, name) for name in ("step", "loss_main", "loss_mtp"))
    _curve(axes, steps, main, "tab:blue", "main: the next token")
    if np.nanmax(mtp, initial=0) > 0:
        _curve(axes, steps, mtp, "tab:orange", "MTP: the tokens after it")
    _mark_non_finite(axes, rows)
    _label(axes, "Optimizer step", "Cross-entropy (nats per token)")
    axes.legend(frameon=False)
    return figure


def optimizer_figure(rows: Rows) -> Figure:
    """Learning rate, and below it the gradient norm before clipping."""
    figure, (above, below) = _figure(panels=2, height=6)
    steps = series(rows, "step")
    above.plot(steps, series(rows, "lr"), color="tab:blue", linewidth=1.8)
    above.set_ylim(bottom=0)
    above.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _label(above, "", "Learning rate")
    _curve(below, steps, series(rows, "grad_norm"), "tab:orange")
    below.set_yscale("log")
    below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.yaxis.set_major_formatter("{x:g}")
    below.yaxis.set_minor_formatter(NullFormatter())
    _mark_non_finite(below, rows)
    _label(below, "Optimizer step", "Gradient norm")
    return figure


def balance_figure(rows: Rows) -> Figure:
    """MaxVio by step; 0 is perfect balance."""
    figure, axes = _figure()
    _curve(axes, series(rows, "step"), series(rows, "max_violation"), "tab:blue")
    axes.set_ylim(bottom=0)
    _label(
        axes, "Optimizer step", "MaxVio: excess load of the heaviest\nexpert, mean over MoE layers"
    )
    return figure


def loads_figure(loads_nLE: np.ndarray) -> Figure:
    """Relative load per layer and expert, over the first and the last tenth of the logged steps."""
    share = max(1, len(loads_nLE) // 10)
    panels = {"First": loads_nLE[:share], "Last": loads_nLE[-share:]}
    relative = {name: relative_load(loads.sum(axis=0)) for name, loads in panels.items()}
    top = max(load_LE.max() for load_LE in relative.values())
    height = min(2.6 + 0.3 * loads_nLE.shape[1], 9)
    figure, both = _figure(panels=2, height=height)
    for axes, (name, load_LE) in zip(both, relative.items(), strict=True):
        look = {"cmap": "viridis", "aspect": "auto", "interpolation": "nearest"}
        axes.imshow(load_LE, vmin=0, vmax=top, **look)
        title = (
            f"{name} {share} of {len(loads_nLE)} logged steps; heaviest expert {load_LE.max():.2f}×"
        )
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylabel("MoE layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    both[-1].set_xlabel("Routed expert")
    figure.colorbar(
        both[0].images[0], ax=list(both), label="Relative load (1 is balanced)", aspect=6 * height
    )
    return figure


# --- series ------------------------------------------------------------------------------------


def series(rows: Rows, name: str) -> np.ndarray:
    """float64 [n]: one metric over the logged steps, NaN where it is missing."""
    return np.array([row.get(name, np.nan) for row in rows], np.float64)


def smoothed(values_n: np.ndarray, share: float = 0.05) -> np.ndarray:
    """float64 [n]: centred mean over `share` of all points, over fewer towards both ends, so that
    the ends stay where they are."""
    n = len(values_n)
    position = np.arange(n)
    reach = np.minimum(round(n * share / 2), np.minimum(position, n - 1 - position))
    sums = np.concatenate([[0.0], np.cumsum(values_n)])
    return (sums[position + reach + 1] - sums[position - reach]) / (2 * reach + 1)


def relative_load(load_LE: np.ndarray) -> np.ndarray:
    """float64 [L, E]: each expert's load over its layer's mean."""
    return load_LE / np.maximum(load_LE.mean(axis=-1, keepdims=True), 1e-9)


# --- drawing -----------------------------------------------------------------------------------


def _figure(panels: int = 1, width: float = 7.5, height: float = 4.2) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    return figure, figure.subplots(panels, sharex=True)


def _curve(axes: Axes, x_n: np.ndarray, y_n: np.ndarray, colour: Any, label: str = "") -> None:
    """What was measured, faint, under its smoothed curve."""
    x_n, y_n = x_n[np.isfinite(y_n)], y_n[np.isfinite(y_n)]
    axes.plot(x_n, y_n, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(x_n, smoothed(y_n), color=colour, linewidth=1.8, label=label)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_non_finite(axes: Axes, rows: Rows) -> None:
    steps = [row["step"] for row in rows if not all(map(is_finite, row.values()))]
    for step in steps:
        label = f"not finite ({len(steps)} steps)" if step == steps[0] else None
        axes.axvline(step, color="tab:red", alpha=0.4, linewidth=0.8, label=label)


def _colours(count: int) -> list:
    if count <= 10:
        return [colormaps["tab10"](i) for i in range(count)]
    return [colormaps["viridis"](x) for x in np.linspace(0, 0.95, count)]


def _write(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())
    return path
