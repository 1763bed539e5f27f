"""What FP8 loses in every linear map of a run: measured now and then, and described.

Every `reporting.fp8_every`-th batch is run through the model once more before its step, with every
dot rule watched (`numerics.watch`): the same weights, the same batch, so the operands are those
that the step itself multiplies. The step is left alone; a run is the same with and without. What is
watched is what one device multiplies at once: the first micro-batch, or its share of it, on one
device that holds the whole model for the while.

A line of metrics.jsonl then has `fp8`: linear map → operand → figure → one number a layer.

    underflow             share of the nonzero entries that were stored as zero
    saturation            share stored as the format's largest number, besides one for each group
    scale_min, scale_max  log2 of the smallest and largest scale of a group that is not all zero
    error                 relative error of the quantised operand, root mean square

Layers are counted within their kind: `dense`, `moe`, and each MTP depth. Experts are taken
together. A number that does not exist, since all entries are zero or some not finite, is null.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from dsv3.config import Config, Model
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.watch import OPERANDS, REPORT, SUMS, TALLIES, Watched
from dsv3.parallel import mesh as meshes
from dsv3.training.losses import training_loss
from dsv3.training.schedules import value_at
from dsv3.training.state import TrainState, merge, split
from dsv3.training.step import Metrics

FIGURES = ("underflow", "saturation", "scale_min", "scale_max", "error")
STACKED = ("dense", "moe")  # parts of the model whose layers are one stack
Step = Callable[[TrainState, Array], tuple[TrainState, Metrics]]
Watch = Callable[[tuple, Array], dict[str, Array]]


def watching(config: Config, mesh: Mesh, step: Step, taken: int) -> Step:
    """`step`, whose metrics now and then also hold `fp8`; `step` itself where nobody asked.

    `taken` steps were taken before. Batches are counted on the host, which so never waits.
    """
    every = config.reporting.fp8_every
    if every is None:
        return step
    watch, numbers = make_watch(config), itertools.count(taken + 1)

    def watched(state: TrainState, tokens_BS: Array) -> tuple[TrainState, Any]:
        found = {}
        if next(numbers) % every == 0:
            at_once = config.training.micro_batch or len(tokens_BS)
            needed = (state.params, state.router_bias, state.sequences), tokens_BS
            whole, tokens_BS_here = meshes.on_one_device(needed, mesh)
            part_bS = tokens_BS_here[: at_once // meshes.sizes_of(mesh).data_ranks]
            found = {"fp8": watch(whole, part_bS)}
        state, metrics = step(state, tokens_BS)
        return state, {**metrics, **found}

    return watched


def make_watch(config: Config) -> Watch:
    """((parameters, router bias, sequences trained on), int32 tokens [b, T + 1]) to the tallies
    [L, E, operand, tally] of each linear map, on one device.

    Raises ConfigError where a weight is too small for a report.
    """
    return _jitted_watch(replace(Config(), model=config.model, training=config.training))


@functools.cache
def _jitted_watch(config: Config) -> Watch:
    training = config.training
    graph, paths = _watched_model(config.model)

    @jax.jit
    def watch(state: tuple, tokens_bS: Array) -> dict[str, Array]:
        params, router_bias, sequences = state
        fraction = sequences.astype(jnp.float32) * training.sequence_length / training.tokens
        mtp_weight = value_at(training.mtp_weight, fraction)
        dtype = jnp.dtype(training.compute_dtype)

        def loss(params):
            return training_loss(merge(graph, params, router_bias), tokens_bS, mtp_weight, dtype)[0]

        reports = dict(nnx.to_flat_state(jax.grad(loss)(params)))
        return {name: _tallies(path, reports[path][...]) for name, path in paths.items()}

    return watch


def _watched_model(config: Model) -> tuple[nnx.GraphDef, dict[str, tuple]]:
    """The model's structure with every FP8 rule watched; names and paths of what they multiply."""
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    paths = {}
    for path, module in nnx.iter_modules(model):
        rule = getattr(module, "dot", None)
        if isinstance(rule, Fp8Rule):
            setattr(module, "dot", Watched(**vars(rule)))  # noqa: B010
            for part, weight in vars(module).items():
                if isinstance(weight, nnx.Param):
                    name = _name(path, part)
                    _require_room(name, weight.shape[-2:])
                    paths[name] = (*path, part)
    return split(model)[0], paths


def _require_room(name: str, shape: tuple[int, ...]) -> None:
    if math.prod(shape) < REPORT:
        raise ConfigError(
            f"reporting.fp8_every wants weights of at least {REPORT} numbers, and {name} is {shape}"
        )


def _name(path: tuple, part: str) -> str:
    """As `reporting.formats` has it."""
    return ".".join(map(str, path if part == "w" else (*path, part)))


def _tallies(path: tuple, report: Array) -> Array:
    layers = report.shape[0] if path[0] in STACKED else 1
    numbers = report.reshape(layers, -1, report.shape[-2] * report.shape[-1])[..., :REPORT]
    return numbers.reshape(*numbers.shape[:2], len(OPERANDS), len(TALLIES))


# --- on the host -------------------------------------------------------------------------------


def described(tallies: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Linear map → operand → figure → a number, or None, for each layer."""
    return {
        name: {operand: _figures(tally_LEOT[:, :, i]) for i, operand in enumerate(OPERANDS)}
        for name, tally_LEOT in tallies.items()
    }


def _figures(tally_LET: np.ndarray) -> dict[str, list[float | None]]:
    tally = {name: tally_LET[..., i].astype(np.float64) for i, name in enumerate(TALLIES)}
    total = {name: tally[name].sum(axis=1) for name in SUMS}
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = {
            "underflow": total["underflow"] / total["nonzero"],
            "saturation": total["saturated"] / total["nonzero"],
            "scale_min": tally["scale_min"].min(axis=1),
            "scale_max": tally["scale_max"].max(axis=1),
            "error": np.sqrt(total["error"] / total["power"]),
        }
    return {name: [_rounded(x) for x in values_L] for name, values_L in figures.items()}


def _rounded(x: float) -> float | None:
    return float(f"{x:.4g}") if np.isfinite(x) else None
