"""Dot rules: the one seam through which precision enters the model.

Every linear map of the model is one of two products, and a dot rule is an object that has both:

    dot_general(x, w, dims)      y[..., O] = x[..., I] · w[I, O]          `lax.dot_general`-shaped
    grouped(x_PI, w_EIO, e_Z)    block z of x's rows times w[e_Z[z]]      experts, sorted and padded

Contract. `x` is in the compute dtype and so is `y`. `w` is the stored master weight, in any
precision; casting it is the rule's business. Products accumulate in FP32, the weight gradient
comes back in w's dtype without having passed through anything narrower than FP32 (Fig. 6).
A rule is a frozen, hashable value with no arrays in it: it is static to `jax.jit`, chosen once
from `config.model.dot`, and also drops into `flax.nnx.Linear(dot_general=rule.dot_general)`.

Why a scan over blocks and not `lax.ragged_dot`: the latter expands to one dense product per
expert on CPU and CUDA. Gathering a weight for every block materialises [Z, I, O]. The scan
touches one block and one expert at a time, in any order, and costs what the products cost.
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


def _scan_blocks(x_PI, w_EIO, expert_Z, dims):
    w_EIO = w_EIO.astype(x_PI.dtype)

    def one(_, block):
        x_bI, expert = block
        w_IO = lax.dynamic_index_in_dim(w_EIO, expert, keepdims=False)
        return None, _product(x_bI, w_IO, dims).astype(x_bI.dtype)

    _, y_ZbO = lax.scan(one, None, (blocks(x_PI, expert_Z), expert_Z))
    return y_ZbO.reshape(x_PI.shape[0], -1)


@jax.custom_vjp
def _grouped(x_PI, w_EIO, expert_Z):
    return _scan_blocks(x_PI, w_EIO, expert_Z, LINEAR)


def _grouped_forward(x_PI, w_EIO, expert_Z):
    return _grouped(x_PI, w_EIO, expert_Z), (x_PI, w_EIO, expert_Z)


def _grouped_backward(residuals, dy_PO):
    x_PI, w_EIO, expert_Z = residuals
    dx_PI = _scan_blocks(dy_PO, w_EIO, expert_Z, (((1,), (1,)), ((), ())))

    def accumulate(dw_EIO, block):
        x_bI, dy_bO, expert = block
        dw_IO = _product(x_bI, dy_bO, (((0,), (0,)), ((), ())))
        return dw_EIO.at[expert].add(dw_IO), None

    block_operands = (blocks(x_PI, expert_Z), blocks(dy_PO, expert_Z), expert_Z)
    dw_EIO, _ = lax.scan(accumulate, jnp.zeros(w_EIO.shape, jnp.float32), block_operands)
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
