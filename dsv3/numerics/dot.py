"""Dot rules: the one seam through which precision enters the model.

Every linear map of the model is one of two products, and a dot rule is an object that has both:

    dot_general(x, w, dims)      y[..., O] = x[..., I] · w[I, O]          `lax.dot_general`-shaped
    grouped(x_PI, w_EIO, e_Z)    block z of x's rows times w[e_Z[z]]      experts, sorted and padded

Contract. `x` is in the compute dtype and so is `y`. `w` is the stored master weight, in any
precision; casting it is the rule's business. Products accumulate in FP32, the weight gradient
comes back in w's dtype without having passed through anything narrower than FP32 (Fig. 6).
A rule is a frozen, hashable value with no arrays in it: it is static to `jax.jit`, chosen once
from `config.model.dot`, and also drops into `flax.nnx.Linear(dot_general=rule.dot_general)`.

Why a loop over blocks and not `lax.ragged_dot`: the latter expands to one dense product per
expert on CPU and CUDA. Gathering a weight for every block materialises [Z, I, O]. The loop
touches one block and one expert at a time, stops at the last block in use, and costs what the
products cost.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.config import Bf16Dot

LINEAR = (((1,), (0,)), ((), ()))  # the only contraction a linear map needs, on 2-D operands


class DotRule(Protocol):
    """See the module docstring for the contract."""

    def dot_general(
        self, x: Array, w: Array, dimension_numbers: Any, precision: Any = None,
        preferred_element_type: Any = None, out_sharding: None = None,
    ) -> Array: ...  # fmt: skip

    def grouped(self, x_PI: Array, w_EIO: Array, expert_Z: Array) -> Array: ...


def build(config: Bf16Dot) -> DotRule:
    """The rule that a configuration names."""
    match config:
        case Bf16Dot():
            return PlainDot()


@dataclass(frozen=True)
class PlainDot:
    """Products in the compute dtype (BF16, or FP32 when x is), accumulated in FP32."""

    def dot_general(
        self, x, w, dimension_numbers, precision=None, preferred_element_type=None,
        out_sharding=None,
    ) -> Array:  # fmt: skip
        """y[..., O] = x[..., I] · w[I, O] in x's dtype; ValueError for any other contraction."""
        require_linear(x, w, dimension_numbers, out_sharding)
        y_XO = _linear(x.reshape(-1, x.shape[-1]), w)
        y = y_XO.reshape(*x.shape[:-1], w.shape[1])
        return y if preferred_element_type is None else y.astype(preferred_element_type)

    def grouped(self, x_PI: Array, w_EIO: Array, expert_Z: Array) -> Array:
        """y_PO in x's dtype: rows of block z times w_EIO[expert_Z[z]]; blocks are P / Z rows."""
        return _grouped(x_PI, w_EIO, expert_Z)


def require_linear(x: Array, w: Array, dimension_numbers: Any, out_sharding: Any = None) -> None:
    """Raise ValueError unless the contraction is x's last axis with w's first, nothing batched."""
    if out_sharding is not None:
        raise ValueError("a dot rule leaves the sharding of its result to its operands")
    (contract_x, contract_w), (batch_x, batch_w) = dimension_numbers
    linear = tuple(contract_x) == (x.ndim - 1,) and tuple(contract_w) == (0,) and w.ndim == 2
    if not linear or tuple(batch_x) or tuple(batch_w):
        raise ValueError(f"a dot rule computes x[..., I] · w[I, O], not {dimension_numbers}")


def _product(a: Array, b: Array, dims: Any) -> Array:
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _linear(x_XI, w_IO):
    return _product(x_XI, w_IO.astype(x_XI.dtype), LINEAR).astype(x_XI.dtype)


def _linear_forward(x_XI, w_IO):
    return _linear(x_XI, w_IO), (x_XI, w_IO)


def _linear_backward(residuals, dy_XO):
    x_XI, w_IO = residuals
    dx_XI = _product(dy_XO, w_IO.astype(dy_XO.dtype), (((1,), (1,)), ((), ())))  # Dgrad
    dw_IO = _product(x_XI, dy_XO, (((0,), (0,)), ((), ())))  # Wgrad
    return dx_XI.astype(x_XI.dtype), dw_IO.astype(w_IO.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def blocks(x_PI: Array, expert_Z: Array) -> Array:
    """The rows of x as [Z, P / Z, I]."""
    return x_PI.reshape(expert_Z.shape[0], -1, x_PI.shape[-1])


def _each_block(w_EIO: Array, expert_Z: Array, body, start: Array) -> Array:
    """Fold `body(carry, z, expert)` over the blocks in use, which come first; E marks the rest."""
    used = jnp.sum(expert_Z < w_EIO.shape[0])
    return lax.fori_loop(0, used, lambda z, carry: body(carry, z, expert_Z[z]), start)


def _block_products(x_PI: Array, w_EIO: Array, expert_Z: Array, dims: Any, outputs: int) -> Array:
    w_EIO = w_EIO.astype(x_PI.dtype)
    x_ZbI = blocks(x_PI, expert_Z)

    def one(y_ZbO, z, expert):
        y_bO = _product(x_ZbI[z], w_EIO[expert], dims).astype(x_PI.dtype)
        return lax.dynamic_update_index_in_dim(y_ZbO, y_bO, z, 0)

    empty_ZbO = jnp.zeros((*x_ZbI.shape[:2], outputs), x_PI.dtype)
    return _each_block(w_EIO, expert_Z, one, empty_ZbO).reshape(x_PI.shape[0], outputs)


@jax.custom_vjp
def _grouped(x_PI, w_EIO, expert_Z):
    return _block_products(x_PI, w_EIO, expert_Z, LINEAR, w_EIO.shape[2])


def _grouped_forward(x_PI, w_EIO, expert_Z):
    return _grouped(x_PI, w_EIO, expert_Z), (x_PI, w_EIO, expert_Z)


def _grouped_backward(residuals, dy_PO):
    x_PI, w_EIO, expert_Z = residuals
    transposed = (((1,), (1,)), ((), ()))
    dx_PI = _block_products(dy_PO, w_EIO, expert_Z, transposed, w_EIO.shape[1])
    x_ZbI, dy_ZbO = blocks(x_PI, expert_Z), blocks(dy_PO, expert_Z)

    def accumulate(dw_EIO, z, expert):
        return dw_EIO.at[expert].add(_product(x_ZbI[z], dy_ZbO[z], (((0,), (0,)), ((), ()))))

    start_EIO = jnp.zeros(w_EIO.shape, jnp.float32)
    dw_EIO = _each_block(w_EIO, expert_Z, accumulate, start_EIO)
    return dx_PI, dw_EIO.astype(w_EIO.dtype), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


@functools.partial(jax.jit, static_argnames="block")
def grouped_loop(x_PI: Array, w_EIO: Array, expert_Z: Array, block: int) -> Array:
    """The oracle of `grouped`: for each expert, all rows times its weights, the others masked."""
    expert_P = jnp.repeat(expert_Z, block)
    y_PO = jnp.zeros((x_PI.shape[0], w_EIO.shape[-1]), x_PI.dtype)
    for expert in range(w_EIO.shape[0]):
        mine_P1 = (expert_P == expert)[:, None]
        y_PO += jnp.where(mine_P1, x_PI @ w_EIO[expert].astype(x_PI.dtype), 0)
    return y_PO
