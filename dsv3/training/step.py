"""One optimizer step, as one pure function of state and batch (§4.2).

    gradients over micro-batches -> clip -> AdamW -> router bias by the sign rule

Expert counts are summed over the whole batch before the bias moves, once a step. The guard stands
at the end: if the loss, the gradient or what would be stored is not finite, the new state is the
old one, whole, with only `skipped` and `skipped_in_a_row` counted up. It is a select over every
array, so nothing computed from a bad batch survives, the bias included. The average (`average`) is
moved meanwhile, by the parameters that the step begins with, and by none that the guard refused.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

from dsv3.cluster import Parallel
from dsv3.config import AuxFree, Config
from dsv3.model.router import updated_bias
from dsv3.model.transformer import Stats
from dsv3.parallel import mesh as meshes
from dsv3.parallel.processes import compiled_together
from dsv3.training.average import moved
from dsv3.training.losses import Losses, training_loss
from dsv3.training.optimizer import adamw
from dsv3.training.schedules import learning_rate, value_at
from dsv3.training.state import TrainState, abstract, graphdef, merge, placement

Metrics = dict[str, Array]


def make_step(
    config: Config, mesh: Mesh | None = None
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """The compiled step: (state, int32 tokens [B, T + 1]) to (state, metrics); donates the state.

    Metrics are scalars, and `load` int32 [L, E]: the expert counts of the step. Configurations that
    differ in neither model, training nor mesh share one compiled step. Without a mesh it is a step
    of one device; with one, tokens are the whole batch, lying as `mesh.batch_sharding` says or not
    on any device yet. Raises ConfigError where the batches of `config` do not divide.
    """
    mesh = mesh or meshes.build(Parallel())
    jitted = compiled_together(jitted_step(config, mesh))

    def step(state: TrainState, tokens_BS: Array) -> tuple[TrainState, Metrics]:
        behind = state.behind if state.behind is not None else _false(mesh)
        return jitted(*operands(state, behind), tokens_BS)

    return step


@functools.cache
def _false(mesh: Mesh) -> Array:
    """`behind` of a state whose average has all steps, lying as the step leaves it."""
    return jax.jit(lambda: jnp.zeros((), bool), out_shardings=meshes.everywhere(mesh))()


def operands(state: TrainState, behind) -> tuple[TrainState, tuple]:
    """What `jitted_step` donates, and what it does not: the average that the host reads."""
    return replace(state, ema=None, behind=None), (state.ema, behind)


def jitted_step(config: Config, mesh: Mesh):
    """The step before it is compiled, a function of `(*operands(state, behind), tokens)`."""
    meshes.require_even_batches(config, mesh)
    matters = {"model": config.model, "training": config.training, "parallel": config.parallel}
    return _jitted_step(replace(Config(), **matters), mesh)


@functools.cache
def _jitted_step(config: Config, mesh: Mesh):
    training = config.training
    optimizer = adamw(training.optimizer)
    gradients_of = _gradients(config, mesh)

    def step(state: TrainState, average: tuple, tokens_BS: Array) -> tuple[TrainState, Metrics]:
        ema, behind = average
        ema, tokens_BS = moved(ema, state.params, behind, training.ema_decay, tokens_BS)
        tokens = state.sequences.astype(jnp.float32) * training.sequence_length
        fraction = tokens / training.tokens
        rate = learning_rate(training, state.step.astype(jnp.float32), fraction)
        mtp_weight = value_at(training.mtp_weight, fraction)

        gradients, losses, stats, ema = gradients_of(
            state.params, state.router_bias, tokens_BS, mtp_weight, ema
        )
        norm = optax.tree.norm(gradients)
        gradients = jax.tree.map(
            lambda g: g * jnp.minimum(1.0, training.clip_norm / (norm + 1e-6)), gradients
        )
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)

        speed = value_at(training.bias_speed, fraction)
        bias = _moved_bias(config, state.router_bias, stats, speed)

        finite = jnp.isfinite(losses.total) & jnp.isfinite(norm)
        finite &= jnp.isfinite(optax.tree.norm((params, bias)))  # a broken moment breaks a weight
        keep = functools.partial(_select, finite)
        taken = finite.astype(jnp.uint32)
        state = TrainState(
            step=state.step + taken,
            sequences=state.sequences + taken * tokens_BS.shape[0],
            skipped=state.skipped + (1 - taken),
            skipped_in_a_row=(state.skipped_in_a_row + 1) * (1 - taken),
            params=keep(params, state.params),
            router_bias=keep(bias, state.router_bias),
            moments=keep(moments, state.moments),
            ema=ema,
            behind=None if ema is None else finite,
        )
        return state, _metrics(state, losses, stats, norm, rate)

    placed: Any = placement(config, mesh)
    everywhere = meshes.everywhere(mesh)
    given, average = operands(placed, everywhere)
    behind: Any = None if placed.ema is None else everywhere
    after = replace(placed, behind=behind)
    return jax.jit(
        step, donate_argnums=0, in_shardings=(given, average, meshes.batch_sharding(mesh)),
        out_shardings=(after, everywhere), compiler_options=meshes.compiler_options(mesh),
    )  # fmt: skip


def _gradients(config: Config, mesh: Mesh):
    """(parameters, router bias, tokens, MTP weight, average) to gradients, losses, counts, average.

    On several devices each runs this on its part of all of them, see `shard`. The loss of a device
    is its share of the whole loss, so that gradients are sums. The average passes through: the host
    moves it meanwhile.
    """
    dtype, micro_batch = jnp.dtype(config.training.compute_dtype), config.training.micro_batch
    state = abstract(config, mesh)
    params = state.params
    shard = meshes.shard_of(config, mesh, params)
    graph = graphdef(config, shard)

    def of_one_device(params, router_bias, tokens_BS: Array, mtp_weight: Array, average):
        whole, cut_again = jax.vjp(shard.params, params)

        def loss(params, tokens):
            model = merge(graph, params, router_bias)
            total, parts = training_loss(model, tokens, mtp_weight, dtype)
            return total / shard.size, parts

        def one(tokens):
            (_, (losses, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(whole, tokens)
            return gradients, losses, stats

        size = micro_batch // shard.data_ranks if micro_batch else tokens_BS.shape[0]
        pieces = tokens_BS.reshape(-1, size, tokens_BS.shape[1])
        (gradients, losses, stats), average = _accumulated(one, pieces, average)
        [gradients] = cut_again(gradients)
        losses = jax.tree.map(shard.mean, losses)
        counts_LE = shard.sum(stats.counts_LE)
        return gradients, losses, stats._replace(counts_LE=counts_LE), average

    specs, average = shard.specs(params), shard.specs(state.ema)
    arguments = specs, jax.P(), shard.rows, jax.P(), average
    return shard.each(of_one_device, arguments, (specs, jax.P(), jax.P(), average))


def _accumulated(one: Callable, pieces: Array, meanwhile):
    """Gradients and losses of `one` piece after the other, their mean; counts, their sum. And
    `meanwhile`, which is waited for where the loop over pieces ends: XLA then begins it before."""
    if len(pieces) == 1:
        return one(pieces[0]), meanwhile

    def accumulate(total, tokens):
        return jax.tree.map(jnp.add, total, one(tokens)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, pieces[0]))
    sums, _ = lax.scan(accumulate, zeros, pieces)
    (gradients, losses, stats), meanwhile = lax.optimization_barrier((sums, meanwhile))
    mean = 1.0 / len(pieces)
    return (*jax.tree.map(lambda x: x * mean, (gradients, losses)), stats), meanwhile


def _moved_bias(config: Config, router_bias, stats: Stats, speed: Array):
    """The router biases after this batch.

    Leaves come in the order of the rows of counts: the stack of MoE layers [L, E], then one bias
    [E] for each MTP depth.
    """
    biases, structure = jax.tree.flatten(router_bias)
    if not biases or not isinstance(config.model.moe.balance, AuxFree):
        return router_bias
    ends = np.cumsum([len(jnp.atleast_2d(bias)) for bias in biases])[:-1]
    counts = jnp.split(stats.counts_LE, ends)
    moved = [
        updated_bias(b, c.reshape(b.shape), speed) for b, c in zip(biases, counts, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def _select(finite: Array, new, old):
    """The tree `new` where finite, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _metrics(state: TrainState, losses: Losses, stats: Stats, norm: Array, rate: Array) -> Metrics:
    load_LE = stats.counts_LE.astype(jnp.float32)
    mean_L = jnp.maximum(load_LE.mean(axis=-1), 1e-9)
    violation_L = load_LE.max(axis=-1) / mean_L - 1
    return {
        "step": state.step,
        "sequences": state.sequences,
        "loss": losses.total,
        "loss_main": losses.main,
        "loss_mtp": losses.mtp,
        "loss_balance": losses.balance,
        "grad_norm": norm,
        "lr": rate,
        "max_violation": violation_L.mean() if violation_L.size else jnp.zeros(()),
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "load": stats.counts_LE,
    }
