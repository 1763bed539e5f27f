"""How far FP8 training is from BF16 training, and how far chaos is (Fig. 10 of the report).

    python -m benchmarks.loss_difference configs/tiny.py --seeds 6 --out runs/losses.jsonl \\
        --set training.compute_dtype=bfloat16 --set training.learning_rate=1e-3 \\
        --set training.tokens=4e5 --plot docs/loss_difference.png

A seed is an initialisation and a stretch of the data; every arm starts from the same numbers and
reads the same batches in the same order. Training is chaotic, so two runs part for any difference,
however small. Therefore one arm is BF16 again, from initial weights that differ in the seventh
digit: how far it comes from BF16 is what the experiment cannot resolve in one pair.

Runs are appended to `--out` as they end, and those found there are not made again. Main losses are
smoothed by an exponential average with coefficient 0.9. Printed for each arm is (arm - bf16) / bf16
over the last quarter of the steps: the mean over the seeds with a 95 % confidence interval
(Student's t), the standard deviation over seeds, and the largest difference of any seed and step.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dsv3.bindings import apply, difference
from dsv3.cli import Parser
from dsv3.config import Bf16Dot, Config, Fp8Dot
from dsv3.data.loader import Loader
from dsv3.data.prepare import prepare
from dsv3.errors import UserError, exits_cleanly, nearest
from dsv3.host import keep_freed_memory
from dsv3.model.transformer import Transformer
from dsv3.reporting.lines import append, encoded, read_rows
from dsv3.sweeps import load_config
from dsv3.training import state as train_state
from dsv3.training.schedules import batch_size, steps_to_end
from dsv3.training.step import make_step

SMOOTHING, SHARE, LIMIT = 0.9, 4, 0.0025  # LIMIT is the report's "below 0.25 %"
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 95 %, 1 to 9 degrees
Losses = Mapping[str, Mapping[int, np.ndarray]]  # arm → seed → smoothed main loss of every step


class Arm(NamedTuple):
    """A precision, and by how much, relatively, the initial weights differ from the others'."""

    rule: Bf16Dot | Fp8Dot
    nudge: float = 0.0


ARMS = {
    "bf16": Arm(Bf16Dot()),
    "nudged": Arm(Bf16Dot(), nudge=1e-6),
    "fp8": Arm(Fp8Dot()),
    "block": Arm(Fp8Dot(gradient_groups="block")),
    "tensor": Arm(Fp8Dot(groups="tensor")),
}


def main_losses(config: Config, arm: Arm, seed: int) -> Iterator[Array]:
    """The main loss of every step of one run."""
    config = replace(config, model=replace(config.model, dot=arm.rule))
    step, loader = make_step(config), Loader(prepare(config), config)
    size, steps = batch_size(config.training, 0), steps_to_end(config.training)
    loader.restore({**loader.state(), "position": seed * steps * size})
    initial = jax.jit(lambda key: Transformer(key, config.model))(jax.random.key(seed))
    state = train_state.from_model(config, initial)
    state = replace(state, params=nudged(state.params, arm.nudge, seed))
    for _ in range(steps):
        state, metrics = step(state, jnp.asarray(loader.next_batch(size).tokens))
        yield metrics["loss_main"]


def nudged(params, by: float, seed: int):
    """Every parameter times 1 + by · (uniform in [-1, 1])."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: p * (1 + by * draw.uniform(-1, 1, p.shape).astype(np.float32)), params
    )


def described(config: Config) -> dict[str, str]:
    """The configuration, without what the arms and seeds are and where the data is kept."""
    found = difference(config, Config())
    return {path: repr(v) for path, v in found.items() if path not in ("data.cache", "model.dot")}


def run_all(config: Config, arms: Sequence[str], seeds: int, out: Path) -> None:
    """Every run that `out` lacks, seed by seed, so that an interrupted study is one of fewer."""
    what = described(config)
    done = {(row["arm"], row["seed"]) for row in read_rows(out) if row["what"] == what}
    for seed, arm in itertools.product(range(seeds), arms):
        if (arm, seed) not in done:
            losses = [float(loss) for loss in main_losses(config, ARMS[arm], seed)]
            append(out, encoded({"what": what, "arm": arm, "seed": seed, "losses": losses}))
            print(f"{arm}, seed {seed}: ended at {losses[-1]:.3f}", flush=True)


# --- what came of it ---------------------------------------------------------------------------


def smoothed(losses: Sequence[float]) -> np.ndarray:
    average = itertools.accumulate(losses, lambda a, x: SMOOTHING * a + (1 - SMOOTHING) * x)
    return np.array(list(average))


def read(out: Path, config: Config) -> Losses:
    found = {}
    for row in read_rows(out):
        if row["what"] == described(config):
            found.setdefault(row["arm"], {})[row["seed"]] = smoothed(row["losses"])
    return found


def differences(losses: Losses, arm: str) -> np.ndarray:
    """float64 [seeds, steps]: (arm - bf16) / bf16 for the seeds that both have."""
    base = losses.get("bf16", {})
    both = sorted(losses[arm].keys() & base.keys())
    return np.array([(losses[arm][seed] - base[seed]) / base[seed] for seed in both])


def interval(values_n: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of a mean; NaN for a single value."""
    n = len(values_n)
    if n < 2:
        return float("nan")
    student = STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.26
    return student * float(np.std(values_n, ddof=1)) / n**0.5


def table(losses: Losses) -> Iterator[str]:
    yield "| against BF16 | seeds | mean, 95 % interval | deviation over seeds | largest |"
    yield "|---|---|---|---|---|"
    for arm in losses:
        if arm != "bf16" and len(apart := differences(losses, arm)):
            last = apart[:, -(apart.shape[1] // SHARE) :]
            means = last.mean(axis=1)
            deviation = f"{np.std(means, ddof=1):.3%}" if len(means) > 1 else "–"
            yield (
                f"| {arm} | {len(means)} | {means.mean():+.3%} ± {interval(means):.3%} | "
                f"{deviation} | {np.abs(last).max():.3%} |"
            )


def plot(losses: Losses, path: Path) -> None:
    """BF16's losses, and every arm's difference: each seed faintly, and their mean."""
    figure = Figure(figsize=(7.5, 6), dpi=140, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for curve in losses["bf16"].values():
        above.plot(curve, color="0.4", linewidth=1)
    above.set_ylabel("BF16: main loss, smoothed")
    for i, arm in enumerate(arm for arm in losses if arm != "bf16"):
        apart = differences(losses, arm)
        for curve in apart:
            below.plot(curve, color=f"C{i}", alpha=0.25, linewidth=0.8)
        below.plot(apart.mean(axis=0), color=f"C{i}", linewidth=1.8, label=arm)
    for limit in (-LIMIT, LIMIT):
        below.axhline(limit, color="0.4", linestyle=":", linewidth=1)
    below.yaxis.set_major_formatter(PercentFormatter(1))
    below.set(xlabel="Optimizer step", ylabel="relative difference from BF16")
    below.legend(frameon=False)
    figure.savefig(path)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_bindings()
    parser.add_argument("--arms", default="bf16,nudged,fp8", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True, help="the runs, JSON lines")
    parser.add_argument("--plot", type=Path, help="a picture")
    options = parser.parse_args(arguments)
    arms = options.arms.split(",")
    for arm in arms:
        if arm not in ARMS:
            raise UserError(f"--arms {arm!r} is no arm{nearest(arm, ARMS)}")
    config = apply(load_config(options.config), options.set)
    cache = Path(config.data.cache).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
    options.out.touch()
    run_all(config, arms, options.seeds, options.out)
    losses = read(options.out, config)
    print("\n".join(table(losses)))
    if options.plot and "bf16" in losses:
        plot(losses, options.plot)


if __name__ == "__main__":
    main()
