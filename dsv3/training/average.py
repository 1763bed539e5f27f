"""The average of the parameters (§3.2.3): in host memory, moved by the host, off the critical path.

    average += (1 - decay) (parameters - average)        for every step that the guard took

A step that averaged the parameters it has just made would end by waiting for the host. So the
average is one step behind: a step begins by sending the host the parameters that it is given, and
the host averages them while the devices compute. Parameters travel one way, the average not at all.

`TrainState.behind` says whether the last step has yet to be averaged. `settled` averages it, and
whatever saves or reads an average calls that first: on disk none is behind.

The host's work is launched before the loop over micro-batches and waited for behind it, see `step`.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.compute_on import compute_on

from dsv3.config import Training
from dsv3.training.state import TrainState


def moved(ema, params, behind: Array, decay: float | None, before):
    """The average with `params` in it where it is `behind` (bool scalar), else as it is; and the
    arrays `before`, which are there once the host has what it needs."""
    if ema is None or decay is None:
        return None, before

    @compute_on(compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)
    def on_the_host(ema, params, behind):
        def move(a, p):
            return jnp.where(behind, a + (1 - decay) * (p - a), a)

        return jax.tree.map(move, ema, params)

    sent, before = lax.optimization_barrier((jax.tree.map(_sent, (params, behind)), before))
    return on_the_host(jax.tree.map(_sent, ema), *sent), before


def _sent(x: Array) -> Array:
    """In host memory. What lies there is not copied: XLA:GPU has no copy from there to there."""
    there = jax.memory.Space.Host
    return x if jax.typeof(x).memory_space is there else jax.device_put(x, there)


def settled(training: Training, state: TrainState) -> TrainState:
    """`state` with an average that no step is missing from; `state` itself stays usable."""
    if state.behind is None:
        return state
    leaves, structure = jax.tree.flatten(state.ema)
    move = _settling(training.ema_decay, structure, tuple(leaf.sharding for leaf in leaves))
    return replace(state, ema=move(state.ema, state.params, state.behind), behind=None)


@functools.cache
def _settling(decay: float | None, structure, shardings: tuple):
    def move(ema, params, behind):
        return moved(ema, params, behind, decay, before=())[0]

    return jax.jit(move, out_shardings=structure.unflatten(shardings))
