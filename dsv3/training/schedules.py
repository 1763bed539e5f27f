"""Schedules by consumed tokens (§4.2): learning rate, batch size, bias speed, MTP weight.

A schedule is a tuple of `config.Phase`s. Each phase moves the value from where the one before left
it to `phase.value` by the time the fraction `phase.until` of `training.tokens` is consumed; a
'constant' phase jumps to its value at its start and stays. The first phase of another shape starts
from 1.0 where there is nothing before it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3.config import Schedule, Training

COUNTED = 100_000


def value_at(schedule: Schedule, fraction: Array | float, xp=jnp) -> Array:
    """The schedule's value once `fraction` of all tokens is consumed, a float32 scalar.

    `xp` is jax.numpy inside the step, numpy (float64) on the host; beyond the last phase its end
    value holds.
    """
    starts = [0.0] + [phase.until for phase in schedule[:-1]]
    befores = [1.0] + [phase.value for phase in schedule[:-1]]
    value = schedule[-1].value
    for phase, start, before in reversed(list(zip(schedule, starts, befores, strict=True))):
        way = xp.clip((fraction - start) / (phase.until - start), 0.0, 1.0)
        match phase.shape:
            case "constant":
                here = phase.value
            case "linear":
                here = before + (phase.value - before) * way
            case "cosine":
                here = phase.value + (before - phase.value) * 0.5 * (1 + xp.cos(np.pi * way))
        value = xp.where(fraction < phase.until, here, value)
    return xp.asarray(value)


def learning_rate(training: Training, step: Array | int, fraction: Array | float, xp=jnp) -> Array:
    """Linear warm-up over the first `warmup_steps` steps, times the decay by tokens.

    `step` counts the optimizer steps before this one; number `warmup_steps` has the full rate.
    """
    warmth = xp.minimum(step / max(training.warmup_steps, 1), 1.0) if training.warmup_steps else 1.0
    return training.learning_rate * warmth * value_at(training.decay, fraction, xp)


def batch_size(training: Training, sequences_consumed: int) -> int:
    """Sequences of the next step: the ramp, rounded down to `batch_increment`; exact on the host.

    Follows the data position, so that it is the same in a resumed run.
    """
    fraction = sequences_consumed * training.sequence_length / training.tokens
    wanted = float(value_at(training.batch, fraction, np))
    step = training.batch_increment
    return max(step, int(wanted + 1e-6) // step * step)


def steps_to_end(training: Training) -> int:
    """Optimizer steps that consume `training.tokens`, if none is refused; an estimate where a
    batch ramp alone takes more than `COUNTED` of them."""
    total = math.ceil(training.tokens / training.sequence_length)
    ramp_ends = training.batch[-2].until if len(training.batch) > 1 else 0.0
    sequences = steps = 0
    while sequences < ramp_ends * total or training.batch[-1].shape != "constant":
        if sequences >= total or steps >= COUNTED:
            break
        sequences += batch_size(training, sequences)
        steps += 1
    return steps + math.ceil(max(total - sequences, 0) / batch_size(training, sequences))
