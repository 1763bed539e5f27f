"""The state of a run: one frozen pytree that a step maps to the next, and a checkpoint holds.

Counters stand here and not on the host because a step that the guard refuses must not move them.
`sequences` counts those that were trained on; times the sequence length it is the tokens consumed,
by which all schedules run (uint32: 4.29e9 sequences, 17.6e12 tokens at 4K).
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from dsv3.config import Config, Model, Training
from dsv3.model.router import RouterBias
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import host_sharding
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
    moments: optax.OptState
    ema: nnx.State | None  # FP32 average of params, in host memory


def split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Static structure, trainable parameters, router biases."""
    graph, params, router_bias = nnx.split(model, nnx.Param, RouterBias, graph=False)
    return graph, params, router_bias


def merge(graph: nnx.GraphDef, params: nnx.State, router_bias: nnx.State) -> Transformer:
    """The model again, from what `split` gave."""
    return nnx.merge(graph, params, router_bias)


def graphdef(config: Config) -> nnx.GraphDef:
    """The static half of the model, without making any array."""
    return split(jax.eval_shape(lambda: _initial_model(config.model, config.training)))[0]


def create(config: Config) -> TrainState:
    """The state before the first step, from `training.seed`; made by one jitted program."""
    return _placed(_fresh(config.model, config.training))


def from_model(config: Config, model: Transformer) -> TrainState:
    """The state that starts training from `model`'s parameters."""
    return _placed(jax.jit(_start, static_argnums=0)(config.training, model))


def abstract(config: Config) -> TrainState:
    """Shapes, dtypes and placement of the state, for restoring into."""
    state = jax.eval_shape(lambda: _fresh(config.model, config.training))
    host = host_sharding()
    ema = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), state.ema)
    return replace(state, ema=ema)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(model: Model, training: Training) -> TrainState:
    return _start(training, _initial_model(model, training))


def _initial_model(model: Model, training: Training) -> Transformer:
    return Transformer(jax.random.key(training.seed), model)


def _start(training: Training, model: Transformer) -> TrainState:
    _, params, router_bias = split(model)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    ema = None if training.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(
        step=jnp.zeros((), jnp.uint32),
        sequences=jnp.zeros((), jnp.uint32),
        skipped=jnp.zeros((), jnp.uint32),
        skipped_in_a_row=jnp.zeros((), jnp.uint32),
        params=params,
        router_bias=router_bias,
        moments=adamw(training.optimizer).init(params),
        ema=ema,
    )


def _placed(state: TrainState) -> TrainState:
    return replace(state, ema=jax.device_put(state.ema, host_sharding()))
