"""What Hopper's FP8 accumulator loses, and what promotion every N_C elements gets back.

    python -m benchmarks.accumulation --out docs [--rows 128] [--draws 16]

Products of random E4M3 matrices of `rows` rows each, through the emulation of
`dsv3.numerics.accumulate`, against the exact product of the same E4M3 numbers: over K without
promotion and with N_C = 128, and over N_C at K = 4096. Prints a Markdown table and writes
`accumulation.md` and `accumulation.png` into the folder `--out`, which must exist. About a minute
on two cores.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv3.cli import Parser
from dsv3.errors import exits_cleanly
from dsv3.files import write_atomically
from dsv3.numerics.accumulate import hopper_product

DISTRIBUTIONS = {
    "normal": np.random.Generator.standard_normal,
    "uniform": np.random.Generator.random,
}
COLOURS = {"normal": "tab:blue", "uniform": "tab:orange"}
FP32 = "FP32"  # XLA's own product of the same numbers; beside the intervals, None among them

Scheme = int | str | None
Curve = dict[int, "Errors"]


@dataclass(frozen=True)
class Plan:
    """What is measured: N_C = 128 and none at every K of `lengths`, all `intervals` at `length`."""

    rows: int = 128
    draws: int = 16
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    intervals: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    length: int = 4096


@dataclass(frozen=True)
class Errors:
    """Errors of a product y of exact value r, over `draws` pairs of matrices.

    maxima: of each draw, the largest |y − r| / |r| over the entries with |r| > 0.1 rms(r)
    norm: ‖y − r‖ / ‖r‖ over all draws
    bias: mean of (y − r) · sign(r), over mean |r|
    """

    maxima: tuple[float, ...]
    norm: float
    bias: float

    @property
    def typical(self) -> float:
        """The median draw's largest relative error."""
        return float(np.median(self.maxima))


def measure(
    distribution: str, length: int, intervals: Sequence[int | None], rows: int, draws: int
) -> dict[Scheme, Errors]:
    """Errors of each N_C of `intervals`, and of FP32, on the same operands [rows, length]."""
    schemes: list[Scheme] = [*intervals, FP32]
    maxima: dict[Scheme, list[float]] = {scheme: [] for scheme in schemes}
    sums = {scheme: np.zeros(2) for scheme in schemes}
    squares, sizes = 0.0, 0.0
    rng = np.random.default_rng(length)
    for _ in range(draws):
        a_MK, b_NK = (random_operand(rng, distribution, rows, length) for _ in range(2))
        exact_MN = np.asarray(a_MK, np.float64) @ np.asarray(b_NK, np.float64).T
        size_MN = np.abs(exact_MN)
        squares, sizes = squares + np.sum(size_MN**2), sizes + np.sum(size_MN)
        large_MN = size_MN > 0.1 * np.sqrt(np.mean(size_MN**2))
        for scheme in schemes:
            error_MN = np.asarray(product(a_MK, b_NK, scheme), np.float64) - exact_MN
            maxima[scheme].append(float(np.max(np.abs(error_MN[large_MN]) / size_MN[large_MN])))
            sums[scheme] += np.sum(error_MN**2), np.sum(error_MN * np.sign(exact_MN))
    return {
        scheme: Errors(tuple(maxima[scheme]), float((square / squares) ** 0.5), float(bias / sizes))
        for scheme, (square, bias) in sums.items()
    }


def random_operand(rng: np.random.Generator, distribution: str, rows: int, length: int):
    """E4M3 [rows, length], rounded from FP32 without a scale."""
    x_MK = DISTRIBUTIONS[distribution](rng, (rows, length), np.float32)
    return jnp.asarray(x_MK).astype(jnp.float8_e4m3fn)


def product(a_MK, b_NK, scheme: Scheme):
    if isinstance(scheme, str):
        return _fp32(a_MK, b_NK)
    return hopper_product(a_MK, b_NK, scheme)


@jax.jit
def _fp32(a_MK, b_NK):
    return jnp.matmul(a_MK.astype(jnp.float32), b_NK.astype(jnp.float32).T, precision="highest")


# --- the page ----------------------------------------------------------------------------------

PAGE = """# What Hopper's FP8 accumulator loses

`python -m benchmarks.accumulation --out docs` writes this page; jax {jax}.

**Question.** The report (§3.3.2) finds that FP8 products on H800 keep about 14 bits while they
accumulate, so that the largest relative error of random products at K = 4096 is nearly 2 %, and
mends it by adding partial sums in FP32 every N_C = 128 elements of K. Does the accumulator of
[`numerics/accumulate.py`](../dsv3/numerics/accumulate.py) behave so?

**Definition.** a and b are [{rows}, K] matrices of independent numbers, standard normal or uniform
in [0, 1), rounded to E4M3 without a scale; r = a · bᵀ is the exact product of those E4M3 numbers,
so the error of quantisation is not in it. The maximum relative error of y is the largest
|y − r| / |r| over the entries with |r| > 0.1 rms(r); the report does not define its own. Given
are its median over {draws} draws of a and b with the smallest and the largest; norm, which is
‖y − r‖ / ‖r‖; and bias, which is the mean of (y − r) · sign(r) over the mean of |r|. "None" leaves
all of K to the tensor core, "FP32" is XLA's product in FP32. K = {length}:

{table}

![error against K and against the interval of promotion](accumulation.png)

Lines are medians, bands reach from the smallest to the largest draw.

**What it shows.** {finding}
Truncation is toward zero. Where all products are positive it always takes away, and more the
larger the sum has grown: that error is a bias, grows with K and nearly vanishes with promotion.
Where signs are mixed the errors mostly cancel, and the maximum is made by the few entries whose
own sum nearly cancelled; it varies from draw to draw by a factor of two, so that the norm is the
better figure for a ratio.

**What it cannot show.** This is an emulation from published measurements; no GPU took part, and
the docstring of the emulation says what it assumes. Activations and weights are not independent
random numbers, and real partial sums meet only after they were scaled. What a training loss makes
of all this is another experiment.
"""


def percent(x: float) -> str:
    return f"{100 * x:.2g} %"


def table(results: dict[str, dict[Scheme, Errors]]) -> str:
    """Markdown: a row for each scheme, three columns for each distribution."""
    heads = [f"{what}: maximum relative error | norm | bias" for what in results]
    lines = [f"| N_C | {' | '.join(heads)} |", "|---" * (1 + 3 * len(results)) + "|"]
    for scheme in next(iter(results.values())):
        cells = ["none" if scheme is None else str(scheme)]
        for error in (errors[scheme] for errors in results.values()):
            span = f"{100 * min(error.maxima):.2g} to {100 * max(error.maxima):.2g}"
            cells.append(f"{percent(error.typical)} ({span})")
            cells += [percent(error.norm), percent(error.bias)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finding(results: dict[str, dict[Scheme, Errors]]) -> str:
    """Without promotion, with 128, and the ratios, in words."""
    sentences = []
    for distribution, errors in results.items():
        none, mended = errors[None], errors[128]
        sentences.append(
            f"With {distribution} numbers the maximum is {percent(none.typical)} without promotion "
            f"and\n{percent(mended.typical)} with N_C = 128, {none.typical / mended.typical:.1f} "
            f"times smaller; the norm of the error is {none.norm / mended.norm:.1f} times smaller."
        )
    return "\n".join(sentences)


# --- the plot ----------------------------------------------------------------------------------


def draw_curve(axes: Axes, curve: Curve, label: str, colour: str, style: str = "-") -> None:
    """The median of the draws over the band of all of them."""
    x = list(curve)
    low, high = ([f(errors.maxima) for errors in curve.values()] for f in (min, max))
    axes.plot(x, [e.typical for e in curve.values()], style, color=colour, label=label, marker=".")
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def label_axes(axes: Axes, title: str, x_label: str, ticks: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x_label, title=title)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def figure(plan: Plan, by_length: dict[str, dict[int, dict[Scheme, Errors]]]) -> bytes:
    """PNG: error against K on the left, against N_C on the right."""
    page = Figure(figsize=(10, 4.2), dpi=140, layout="constrained")
    left, right = page.subplots(1, 2, sharey=True)
    for distribution, results in by_length.items():
        colour = COLOURS[distribution]
        for interval, words, style in ((None, "no promotion", "-"), (128, "N_C = 128", "--")):
            curve = {length: results[length][interval] for length in plan.lengths}
            draw_curve(left, curve, f"{distribution}, {words}", colour, style)
        curve = {interval: results[plan.length][interval] for interval in plan.intervals}
        draw_curve(right, curve, distribution, colour)
    label_axes(left, "Products of any length", "K", plan.lengths)
    label_axes(right, f"K = {plan.length:,}", "Interval of promotion N_C", plan.intervals)
    left.set_ylabel("Maximum relative error")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    FigureCanvasAgg(page).print_png(picture)
    return picture.getvalue()


def run(plan: Plan, out: Path) -> None:
    """Measure, print the table, write the page and its picture into `out`."""
    by_length: dict[str, dict[int, dict[Scheme, Errors]]] = {}
    for distribution in DISTRIBUTIONS:
        by_length[distribution] = {}
        for length in plan.lengths:
            intervals = plan.intervals if length == plan.length else (128,)
            errors = measure(distribution, length, [None, *intervals], plan.rows, plan.draws)
            by_length[distribution][length] = errors
    chosen = {distribution: results[plan.length] for distribution, results in by_length.items()}
    print(table(chosen))
    page = PAGE.format(
        jax=jax.__version__, rows=plan.rows, draws=plan.draws, length=f"{plan.length:,}",
        table=table(chosen), finding=finding(chosen),
    )  # fmt: skip
    write_atomically(out / "accumulation.png", figure(plan, by_length))
    write_atomically(out / "accumulation.md", page)


@exits_cleanly
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the page and the plot")
    parser.add_argument("--rows", type=int, default=Plan.rows)
    parser.add_argument("--draws", type=int, default=Plan.draws)
    args = parser.parse_args()
    if not args.out.is_dir():
        parser.error(f"--out: {args.out} is no folder")
    run(Plan(rows=args.rows, draws=args.draws), args.out)


if __name__ == "__main__":
    main()
