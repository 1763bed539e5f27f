"""A plan for the eye: its text and its picture, from the figures that `plan` has as JSON."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Figures = Mapping[str, Any]

GB = 1e9
MEMORY = (
    ("masters", "masters, FP32, with router biases", "counted"),
    ("moments", "moments", "counted"),
    ("temporary", "temporaries at their peak", "counted"),
)
INSIDE = (
    ("gathered", "parameters gathered for use, FP32", "derived"),
    ("gradients", "gradients, FP32", "derived"),
)
WAYS = (
    ("bytes", "copies", "an even router", "derived"),
    ("bytes_at_most", "copies_at_most", "any router at most", "derived"),
    ("flat_bytes", "flat_copies", "a flat all-to-all, an even router", "derived"),
)


def text(plan: Figures) -> str:
    """All of it on one page."""
    parts = (_head(plan), _memory(plan), _collectives(plan), _between(plan), _time(plan))
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _head(plan: Figures) -> list[str]:
    model, mesh, batch, how = plan["model"], plan["mesh"], plan["batch"], plan["compiler"]
    axes = " · ".join(f"{axis} {mesh[axis]}" for axis in ("pipe", "replica", "node", "local"))
    flops = f"{_si(model['flops_a_token'])}FLOP a token, {_si(model['flops_a_step'])}FLOP a step"
    return [
        f"parameters   {model['parameters']:,}, activated {model['activated']:,}; without MTP "
        f"{model['parameters_main']:,} and {model['activated_main']:,}",
        f"mesh         {axes} = {mesh['devices']:,} device{'s'[: mesh['devices'] > 1]}; "
        f"experts {mesh['transport']}, parameters {mesh['parameters']}",
        f"step         {batch['sequences']:,} sequences, {batch['tokens']:,} tokens in "
        f"{batch['micro_batches']} micro-batches, {batch['tokens_a_forward_pass']:,} tokens of a "
        "device at once",
        f"arithmetic   {flops}; nothing recomputed or padded in it",
        f"compiled     for {how['target']} in {how['seconds']:.0f} s and "
        f"{how['host_bytes'] / 2**30:.1f} GiB of this host",
    ]


def _memory(plan: Figures) -> list[str]:
    memory = plan["memory"]
    rows = [(name, _gb(memory[key]), kind) for key, name, kind in MEMORY]
    inside = sum(memory[key] for key, *_ in INSIDE)
    rows += [(f"  of them {name}", _gb(memory[key]), kind) for key, name, kind in INSIDE]
    rest = max(memory["temporary"] - inside, 0)
    rows += [("  of them the rest: activations, logits, rows of experts", _gb(rest), "derived"),
             ("together", _gb(memory["total"]), "counted"),
             ("in host memory: EMA, FP32", _gb(memory["ema"]), "counted")]  # fmt: skip
    if memory["to_host"] or memory["from_host"]:
        rows += [("copied to the host in a step", _gb(memory["to_host"]), "counted"),
                 ("copied from it", _gb(memory["from_host"]), "counted")]  # fmt: skip
    verdict = "fits" if memory["fits"] else "does not fit"
    lines = _table(("a device holds", "GB", ""), rows)
    lines.append(f"{verdict} the {memory['device'] / GB:.0f} GB of an "
                 f"{plan['time']['hardware']['name']}")  # fmt: skip
    if memory["largest"]:
        named = [(_gb(one["bytes"]), one["arrays"]) for one in memory["largest"]]
        lines += ["", *_table(("GB", "the largest stretches of temporary memory: arrays in turn"),
                              named)]  # fmt: skip
    return lines


def _collectives(plan: Figures) -> list[str]:
    scheduled = any(one["meanwhile"] for one in plan["collectives"])

    def row(one):
        axes = " · ".join(one["axes"])
        meanwhile = (f"{one['meanwhile'] / 1e12:,.3f}",) if scheduled else ()
        return (one["kind"], axes, one["devices"], one["dtype"], f"{one['times']:,}", *meanwhile,
                _gb(one["sent"]), _gb(one["travels"]))  # fmt: skip

    during = ("TFLOP meanwhile",) if scheduled else ()
    head = ("collective", "axes", "group", "dtype", "times a step", *during, "GB counted",
            "GB that travel")  # fmt: skip
    sure = [row(one) for one in plan["collectives"] if not one["dynamic"]]
    maybe = [row(one) for one in plan["collectives"] if one["dynamic"]]
    lines = _table(head, sure) or ["no collectives: one device"]
    if maybe:
        title = "each further pass of expert rows, which an even router does not need; how many is"
        lines += ["", f"{title} known at run time only:"]
        lines += _table((*head[:-1], "GB at most"), maybe)
    return lines


def _between(plan: Figures) -> list[str]:
    between = plan["between_nodes"]
    if between is None:
        return []
    rows = [
        (name, f"{between[copies]:.2f}", f"{between[key] / 2**20:.3f}", kind)
        for key, copies, name, kind in WAYS
    ]
    rows.append(
        ("room in the program's buffers", "", f"{between['buffers'] / 2**20:.3f}", "counted")
    )
    title = "rows of a token between nodes, all layers, forward and backward"
    return _table((title, "copies", "MiB", ""), rows)


def _time(plan: Figures) -> list[str]:
    time = plan["time"]
    rates = time["hardware"]
    columns = [("as compiled", time["as_compiled"])]
    if time["pipelined"]:
        columns.append(("were pipe a pipeline", time["pipelined"]))
    lines = [
        f"at {rates['efficiency']:.0%} of {rates['bf16'] / 1e12:.0f} TFLOP/s in BF16, "
        f"{rates['fp8'] / 1e12:.0f} in FP8, {rates['within_node'] / 1e9:.0f} GB/s within a node, "
        f"{rates['between_nodes'] / 1e9:.0f} between nodes ({rates['name']}; assumed):"
    ]
    names = (
        ("compute", "products, s"),
        ("within_node", "messages within nodes, s"),
        ("between_nodes", "messages between nodes, s"),
        ("overlapped", "a step if all overlaps, s"),
        ("in_turn", "a step if nothing does, s"),
    )
    rows = [(name, *(f"{c[key]:.2f}" for _, c in columns)) for key, name in names]
    for name, key in (("GPU-hours a trillion tokens", "hours_a_trillion"),
                      ("GPU-hours of the run", "hours")):  # fmt: skip
        rows.append((name, *(f"{_k(c[key])} to {_k(c[key + '_in_turn'])}" for _, c in columns)))
    lines += _table(("", *(name for name, _ in columns)), rows)
    if report := time["report"]:
        lines.append(
            f"the report: {_k(report['hours_a_trillion'])} H800-hours a trillion, "
            f"{_k(report['hours'])} for pre-training (Table 1): "
            f"{report['flops_a_second'] / 1e12:.0f} TFLOP/s a device"
        )
    return lines


def _table(head: tuple, rows: Iterable[tuple]) -> list[str]:
    """Columns that line up; numbers to the right."""
    table = [[str(cell) for cell in row] for row in rows]
    if not table:
        return []
    columns = list(zip(head, *table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(_is_number(cell) for cell in column[1:]) for column in columns]
    lines = []
    for row in (head, *table):
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _is_number(cell: str) -> bool:
    return not cell or cell.replace(",", "").replace(".", "", 1).isdigit()


def _gb(number: float) -> str:
    return f"{number / GB:,.3f}"


def _si(number: float) -> str:
    """'260.7 G', with a prefix for every factor of a thousand."""
    thousands = int(math.log10(max(number, 1)) // 3)
    return (
        f"{number / 1000**thousands:.1f} {('', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y')[thousands]}"
    )


def _k(hours: float) -> str:
    return f"{hours / 1e3:,.3g}K" if hours < 1e6 else f"{hours / 1e3:,.0f}K"


# --- the picture -------------------------------------------------------------------------------


def picture(plan: Figures) -> bytes:
    """A PNG: memory of a device, bytes by collective, seconds of a step."""
    figure = Figure(figsize=(12, 4.4), dpi=140, layout="constrained")
    memory, traffic, time = figure.subplots(1, 3, width_ratios=(1, 1.6, 1.2))
    _draw_memory(memory, plan["memory"])
    _draw_traffic(traffic, plan["collectives"])
    _draw_time(time, plan["time"])
    for axes in (memory, traffic, time):
        axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_memory(axes: Axes, memory: Figures) -> None:
    inside = sum(memory[key] for key, *_ in INSIDE)
    parts = [(name, memory[key]) for key, name, _ in (*MEMORY[:2], *INSIDE)]
    parts.append(("activations and the rest", max(memory["temporary"] - inside, 0)))
    bottom = 0.0
    for name, size in parts:
        axes.bar([0], [size / GB], bottom=[bottom], width=0.6, label=name.split(",")[0])
        bottom += size / GB
    axes.axhline(memory["device"] / GB, color="0.3", linestyle=":", label="a device has")
    axes.set(xticks=[], xlim=(-0.5, 0.5), ylabel="GB", title="Memory of a device")
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02))


def _draw_traffic(axes: Axes, collectives: Sequence[Figures]) -> None:
    """The ten that send the most."""
    rows = [row for row in collectives if not row["dynamic"]][:10][::-1]
    names = [f"{row['kind']} {row['dtype']}\n{' · '.join(row['axes'])}" for row in rows]
    places = range(len(rows))
    left = [0.0] * len(rows)
    for key, name in (("within_node", "within nodes"), ("between_nodes", "between nodes")):
        sizes = [row[key] / GB for row in rows]
        axes.barh(places, sizes, left=left, height=0.6, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(places, names, fontsize=6)
    axes.set(xlabel="GB that a device sends in a step", title="The largest collectives")
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def _draw_time(axes: Axes, time: Figures) -> None:
    columns = {"as compiled": time["as_compiled"], "pipelined": time["pipelined"]}
    shown = {name: column for name, column in columns.items() if column}
    parts = (("compute", "products"), ("within_node", "messages within nodes"),
             ("between_nodes", "messages between nodes"))  # fmt: skip
    for place, (key, name) in enumerate(parts):
        places = [at + 0.27 * (place - 1) for at in range(len(shown))]
        axes.bar(places, [column[key] for column in shown.values()], width=0.25, label=name)
    axes.set_xticks(range(len(shown)), list(shown))
    axes.set(ylabel="Seconds", title=f"A step, {time['hardware']['name']}, rates assumed")
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06))
