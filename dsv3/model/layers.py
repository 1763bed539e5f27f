"""The small parts: RMSNorm, linear map, embedding, SwiGLU (§2.1; spec §1.2).

Modules are plain pytrees: built from a key, called with arrays, nothing stateful. A weight is
stored [inputs, outputs] as the master copy; products go through the dot rule given at construction.
Activations flow in the compute dtype, which the embedding sets and everything after it follows.

`save_as(name, x)` marks an activation as one that the rematerialisation policies may keep; what a
policy keeps is decided in `transformer.remat`, never in the layers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name as _checkpoint_name

from dsv3.numerics.operand import Operand, Swiglu, recomputed
from dsv3.numerics.rule import DotRule


def save_as(name: str, x: Array) -> Array:
    """Name an activation for the rematerialisation policies; the value is unchanged."""
    return _checkpoint_name(x, name)


def normal(key: Array, shape: tuple[int, ...], std: float) -> Array:
    """FP32 normal(0, std): the initialisation of every learnable matrix (§4.2: std 0.006)."""
    return std * jax.random.normal(key, shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + eps) · gain, the statistics in FP32, the result in x's dtype."""

    def __init__(self, width: int, eps: float):
        self.gain = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        gain = self.gain[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return recomputed(functools.partial(_normalised, eps=self.eps))(x, gain)


def _normalised(x: Array, gain: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain).astype(x.dtype)


class Linear(nnx.Module):
    """y[..., O] = x[..., I] · w[I, O], without bias, by the dot rule."""

    def __init__(self, key: Array, inputs: int, outputs: int, std: float, dot: DotRule):
        self.w = nnx.Param(normal(key, (inputs, outputs), std))
        self.dot = dot

    def __call__(self, x: Operand) -> Array:
        [y] = self.dot.last_axis(x, self.w[...])
        return y


def together(x: Array, *linears: Linear) -> list[Array]:
    """Each of them applied to x, which a dot rule then quantises and caches once."""
    return linears[0].dot.last_axis(x, *(linear.w[...] for linear in linears))


class Embedding(nnx.Module):
    """A table of V rows of width D; looked up, never multiplied, kept in high precision."""

    def __init__(self, key: Array, vocab: int, width: int, std: float):
        self.table = nnx.Param(normal(key, (vocab, width), std))

    def __call__(self, tokens_BT: Array, dtype: jnp.dtype | None = None) -> Array:
        x_BTD = self.table[...][tokens_BT]
        return x_BTD if dtype is None else x_BTD.astype(dtype)


class SwigluMlp(nnx.Module):
    """W_down (silu(W_gate x) · W_up x): the dense FFN, and the shared experts as one wide one."""

    def __init__(self, key: Array, width: int, hidden: int, std: float, dot: DotRule):
        k_gate, k_up, k_down = jax.random.split(key, 3)
        self.gate = Linear(k_gate, width, hidden, std, dot)
        self.up = Linear(k_up, width, hidden, std, dot)
        self.down = Linear(k_down, hidden, width, std, dot)

    def __call__(self, x_BTD: Array) -> Array:
        both_BTF = [save_as("swiglu_in", y) for y in together(x_BTD, self.gate, self.up)]
        return self.down(Swiglu(*both_BTF))
