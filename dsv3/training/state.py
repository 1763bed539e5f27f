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
from jax.sharding import Mesh

from dsv3.cluster import Parallel
from dsv3.config import Config, Training
from dsv3.model.router import RouterBias
from dsv3.model.transformer import Transformer
from dsv3.parallel import mesh as meshes
from dsv3.parallel.shard import ALONE, Shard
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
    behind: Array | None = None  # bool: `ema` lacks the last step, see `average`; None: it has all


def split(model: Transformer) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Static structure, trainable parameters, router biases."""
    graph, params, router_bias = nnx.split(model, nnx.Param, RouterBias, graph=False)
    return graph, params, router_bias


def merge(graph: nnx.GraphDef, params: nnx.State, router_bias: nnx.State) -> Transformer:
    """The model again, from what `split` gave."""
    return nnx.merge(graph, params, router_bias)


def graphdef(config: Config, shard: Shard = ALONE) -> nnx.GraphDef:
    """The static half of the model, without making any array."""
    key = jax.random.key(0)
    return split(jax.eval_shape(lambda: Transformer(key, config.model, shard)))[0]


def on_mesh(config: Config, model: Transformer, mesh: Mesh) -> Transformer:
    """`model` to compute with on `mesh`, in any dtype, its arrays where training has them."""
    _, *arrays = split(model)
    params, router_bias = (
        jax.device_put(x, meshes.shardings(config, mesh, x)) for x in arrays
    )  # fmt: skip
    shard = meshes.shard_of(config, mesh, params).as_stored(params)
    return merge(graphdef(config, shard), params, router_bias)


def create(config: Config, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step, from `training.seed`; made by one jitted program, each
    device its own part. Without a mesh it lies on one device."""
    mesh = mesh or meshes.build(Parallel())
    return _creation(_what_matters(config), mesh)()


def from_model(config: Config, model: Transformer, mesh: Mesh | None = None) -> TrainState:
    """The state that starts training from `model`'s parameters."""
    state = jax.jit(_start, static_argnums=0)(config.training, model)
    return jax.device_put(state, placement(config, mesh or meshes.build(Parallel())))


def abstract(config: Config, mesh: Mesh | None = None) -> TrainState:
    """Shapes, dtypes and placement of the state, for restoring into."""
    config, mesh = _what_matters(config), mesh or meshes.build(Parallel())
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        _shapes(config), placement(config, mesh),
    )  # fmt: skip


def placement(config: Config, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state; the average lies in host memory."""
    shardings = meshes.shardings(config, mesh, _shapes(_what_matters(config)))
    return replace(shardings, ema=meshes.in_host_memory(shardings.ema))


@functools.cache
def _creation(config: Config, mesh: Mesh):
    return jax.jit(lambda: _fresh(config), out_shardings=placement(config, mesh))


@functools.cache
def _shapes(config: Config) -> TrainState:
    return jax.eval_shape(lambda: _fresh(config))


def _what_matters(config: Config) -> Config:
    """Equal for configurations whose states are alike."""
    return replace(Config(), model=config.model, training=config.training, parallel=config.parallel)


def _fresh(config: Config) -> TrainState:
    model = Transformer(jax.random.key(config.training.seed), config.model)
    return _start(config.training, model)


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
