"""The state of a run: one frozen pytree that a step maps to the next, and a checkpoint holds.

Counters stand here and not on the host because a step that the guard refuses must not move them.
`sequences` counts those that were trained on; times the sequence length it is the tokens consumed,
by which all schedules run (uint32: 4.29e9 sequences, 17.6e12 tokens at 4K).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dsv3.config import Config
from dsv3.model.router import RouterBias
from dsv3.model.transformer import Transformer
from dsv3.training.optimizer import adamw


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    step: Array  # uint32: optimizer steps taken
    sequences: Array  # uint32: sequences trained on
    skipped: Array  # uint32: steps refused by the guard, ever
    skipped_in_a_row: Array  # uint32
    params: nnx.State  # FP32 masters
    router_bias: nnx.State  # FP32, moved by the sign rule only
    moments: tuple  # optax state
    ema: nnx.State | None  # FP32 average of params, in host memory


def graphdef(config: Config) -> nnx.GraphDef:
    """The static half of the model: `model(graphdef, state)` puts the arrays back in."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config.model))
    return split(abstract)[0]


def split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Static structure, trainable parameters, router biases."""
    return nnx.split(model, nnx.Param, RouterBias, graph=False)


def merge(graph: nnx.GraphDef, params: nnx.State, router_bias: nnx.State) -> Transformer:
    """The model again, from what `split` gave."""
    return nnx.merge(graph, params, router_bias)


def create(config: Config) -> TrainState:
    """The state before the first step, from `training.seed`; made inside one jitted program."""

    def make():
        model = Transformer(jax.random.key(config.training.seed), config.model)
        return from_model(config, model)

    return jax.jit(make)()


def from_model(config: Config, model: Transformer) -> TrainState:
    """A state that starts training from `model`'s parameters."""
    _, params, router_bias = split(model)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def zero():
        return jnp.zeros((), jnp.uint32)

    ema = None
    if config.training.ema_decay is not None:
        ema = jax.tree.map(lambda p: jax.device_put(p, jax.memory.Space.Host), params)
    moments = adamw(config.training.optimizer).init(params)
    return TrainState(zero(), zero(), zero(), zero(), params, router_bias, moments, ema)
