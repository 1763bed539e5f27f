"""Rotary positions and their extension by YaRN (§2.1.1, §4.3; spec §1.4, 1.5).

The rope part of queries and keys is read as R/2 complex numbers, each turned by position · w_i,
w_i = theta^(-2i/R). In the released layout a number is a pair of neighbours (x_2i, x_2i+1):
'interleaved'. 'half' pairs x_i with x_(i+R/2). Scores are the same as long as queries, keys and
weights agree.

YaRN leaves fast frequencies alone, divides slow ones by `factor`, and blends between, the bounds
being where a frequency makes beta_fast, beta_slow turns over the original length. The temperature
sqrt(t) = 0.1·ln(factor) + 1 of the report sits whole in the softmax scale, so it multiplies the
nope and rope parts of a score alike; cos and sin carry only mscale / mscale_all_dim, 1 for V3.
Released checkpoints want it at every length, so it is applied always when configured.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3.config import Mla, Yarn


def frequencies(config: Mla) -> np.ndarray:
    """float64 [R/2]: the turning speed w_i of each pair, in radians a position."""
    pairs = np.arange(0, config.rope_dim, 2)
    plain = config.rope_theta ** (-pairs / config.rope_dim)
    if config.yarn is None:
        return plain
    low, high = _correction_range(config, config.yarn)
    ramp = np.clip((np.arange(len(pairs)) - low) / (high - low or 1e-3), 0, 1)
    return plain / config.yarn.factor * ramp + plain * (1 - ramp)


def _correction_range(config: Mla, yarn: Yarn) -> tuple[int, int]:
    """The pairs between which YaRN blends: those making beta_fast and beta_slow turns."""

    def pair_with(turns: float) -> float:
        positions = yarn.original_length / (2 * math.pi * turns)
        return config.rope_dim * math.log(positions) / (2 * math.log(config.rope_theta))

    low, high = math.floor(pair_with(yarn.beta_fast)), math.ceil(pair_with(yarn.beta_slow))
    return max(low, 0), min(high, config.rope_dim - 1)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: Mla) -> float:
    """(H + R)^-1/2, times the square of YaRN's temperature where it is configured."""
    scale = (config.nope_dim + config.rope_dim) ** -0.5
    if config.yarn is None or not config.yarn.mscale_all_dim:
        return scale
    return scale * _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def rotation(config: Mla, positions: Array) -> tuple[Array, Array]:
    """cos, sin of the angle of every position and pair: float32 [T, R/2] each for positions [T]
    that all sequences share, [B, T, R/2] for positions [B, T]."""
    w = jnp.asarray(frequencies(config), jnp.float32)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), w)
    size = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        size = _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate_interleaved(x_BTNR: Array, cos_TR: Array, sin_TR: Array) -> Array:
    """Turn neighbours (x_2i, x_2i+1); computed in FP32, returned in x's dtype and layout."""
    pairs = x_BTNR.astype(jnp.float32).reshape(*x_BTNR.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack(_turn(real, imaginary, cos_TR, sin_TR), axis=-1)
    return turned.reshape(x_BTNR.shape).astype(x_BTNR.dtype)


def rotate_half(x_BTNR: Array, cos_TR: Array, sin_TR: Array) -> Array:
    """Turn the pairs (x_i, x_(i+R/2)); computed in FP32, returned in x's dtype and layout."""
    real, imaginary = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(_turn(real, imaginary, cos_TR, sin_TR), axis=-1)
    return turned.astype(x_BTNR.dtype)


def _turn(real: Array, imaginary: Array, cos_TR: Array, sin_TR: Array) -> tuple[Array, Array]:
    shape = (-1, real.shape[1], 1, real.shape[3])  # [1 or B, T, 1, R/2]
    cos, sin = cos_TR.reshape(shape), sin_TR.reshape(shape)
    return real * cos - imaginary * sin, real * sin + imaginary * cos


ROTATE = {"interleaved": rotate_interleaved, "half": rotate_half}
