"""Pictures of what `reporting.fp8` measured: where FP8 loses, and how that changes over a run.

Heat maps have a row for each linear map and a column for each layer, dense ones first (d0), then
MoE (m0), then MTP (p0); grey is what a layer does not have. Columns of panels are the operands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dsv3.numerics.watch import OPERANDS

Found = Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]]
PANELS = {
    "underflow": "stored as zero",
    "saturation": "at the largest number",
    "error": "relative error",
    "range": "range of scales (octaves)",
}


def fp8_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """File name → figure; none where no row has `fp8`."""
    measured = [row for row in rows if "fp8" in row]
    if not measured:
        return {}
    return {"fp8.png": map_figure(measured[-1]), "fp8_steps.png": steps_figure(measured)}


def map_figure(row: Mapping[str, Any]) -> Figure:
    """Every linear map and layer at one step."""
    maps, layers = axes_of(row["fp8"])
    size = (3.2 + 2.2 * len(OPERANDS), 0.8 + 4 * (0.5 + 0.19 * len(maps)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(len(PANELS), len(OPERANDS), sharex=True, sharey=True, squeeze=False)
    colours = colormaps["viridis"].with_extremes(bad="0.9")
    for line, (name, meaning) in zip(grid, PANELS.items(), strict=True):
        values = {o: values_of(row["fp8"], o, name) for o in OPERANDS}
        top = np.nanmax([np.nanmax(v, initial=0) for v in values.values()]) or 1.0
        for axes, operand in zip(line, OPERANDS, strict=True):
            axes.imshow(
                values[operand], vmin=0, vmax=top, cmap=colours, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_xticks(range(len(layers)), layers, fontsize=7)
            axes.set_yticks(range(len(maps)), maps, fontsize=7)
            if name == next(iter(PANELS)):
                axes.set_title(operand.replace("_", ", "), fontsize=9)
        share = None if name == "range" else PercentFormatter(1)
        figure.colorbar(line[0].images[0], ax=list(line), label=meaning, format=share)
    figure.suptitle(f"What FP8 loses, step {row['step']}", fontsize=10)
    return figure


def steps_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Over a run: the worst linear map of any layer, and faintly the median one."""
    figure = Figure(figsize=(7.5, 8), dpi=140, layout="constrained")
    steps = [row["step"] for row in rows]
    for axes, (name, meaning) in zip(
        figure.subplots(len(PANELS), sharex=True), PANELS.items(), strict=True
    ):
        for i, operand in enumerate(OPERANDS):
            values = [values_of(row["fp8"], operand, name) for row in rows]
            for summary, look in ((np.nanmedian, {"alpha": 0.35}), (np.nanmax, {"label": operand})):
                line = [summary(v) if np.isfinite(v).any() else np.nan for v in values]
                axes.plot(steps, line, color=f"C{i}", linewidth=1.5, **look)
        axes.set_ylabel(meaning, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if name != "range":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("Optimizer step")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8
    )
    return figure


def axes_of(found: Found) -> tuple[list[str], list[str]]:
    """Linear maps, and layers of all kinds: the rows and columns of a heat map."""
    maps, layers = {}, {}
    for kind in ("dense.", "moe.", "mtp."):
        for name in filter(lambda name: name.startswith(kind), found):
            maps[_split(name)[1]] = None
            layers |= dict.fromkeys(_layers(found, name))
    return list(maps), list(layers)


def values_of(found: Found, operand: str, figure: str) -> np.ndarray:
    """float64 [maps, layers]; NaN where there is none. 'range' is scale_max - scale_min."""
    if figure == "range":
        return values_of(found, operand, "scale_max") - values_of(found, operand, "scale_min")
    maps, layers = axes_of(found)
    values = np.full((len(maps), len(layers)), np.nan)
    for name, operands in found.items():
        for layer, x in zip(_layers(found, name), operands[operand][figure], strict=True):
            values[maps.index(_split(name)[1]), layers.index(layer)] = np.nan if x is None else x
    return values


def _split(name: str) -> tuple[str, str]:
    """'moe.ffn.shared.up' as 'm', 'ffn.shared.up'; 'mtp.1.block.attention.o' as 'p1', ..."""
    kind, rest = name.split(".", 1)
    if kind == "mtp":
        depth, _, rest = rest.split(".", 2)
        return f"p{depth}", rest
    return kind[0], rest


def _layers(found: Found, name: str) -> list[str]:
    kind, _ = _split(name)
    count = len(found[name][OPERANDS[0]]["error"])
    return [kind] if kind[0] == "p" else [f"{kind}{i}" for i in range(count)]
