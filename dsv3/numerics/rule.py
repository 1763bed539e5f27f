"""Dot rules: the one seam through which precision enters the model.

Every linear map of the model is a product of the last axis or of grouped rows; a dot rule has both:

    last_axis(x, *ws)            y[..., O] = x[..., I] · w[I, O] for each of several weights
    dot_general(x, w, dims)      one of them, shaped like `lax.dot_general`
    grouped(x_PI, ws, e_Z)       block z of x's rows times w_EIO[e_Z[z]] for each of several
                                 weights: experts, sorted and padded

Contract. `x` is in the compute dtype and so is `y`; in the first form and the last it may also be
SwiGLU of two arrays (`operand`), which the rule computes. `w` is the stored master weight, in any
precision; casting it is the rule's business. Products accumulate in FP32, the weight gradient
comes back in w's dtype without having passed through anything narrower than FP32 (Fig. 6).
A rule is a frozen, hashable value with no arrays in it: it is static to `jax.jit`, chosen once
from `config.model.dot`, and also drops into `flax.nnx.Linear(dot_general=rule.dot_general)`.

What a rule says besides, all of it trivial for BF16:

    formats              in words, what each of the three products multiplies, and what is cached
    kept                 names of the activations that the report's rematerialisation policy keeps
    wire, gradient_wire  how activations and their gradients are packed on their way to experts
    least_block          experts' rows come in blocks of a multiple of so many
    after_attention      the rule of the projection behind attention
    after_dispatch       the rule of the experts' first product: its input comes off the wire
    before_combine       the rule of their last: its gradient comes off the wire

Experts are a loop over blocks and not `lax.ragged_dot`: the latter expands to one dense product per
expert on CPU and CUDA. Gathering a weight for every block materialises [Z, I, O]. The loop touches
one block and one expert at a time, stops at the last block in use, and costs what its products do.
Only where blocks are fewer than experts are weights gathered (`in_use`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.numerics.operand import Operand

LEAST_BLOCK, KERNELS_BLOCK = 4, 128  # rows, of a loop's products and of kernels'
LINEAR = (((1,), (0,)), ((), ()))  # the only contraction a linear map needs, on 2-D operands


class Wire(Protocol):
    """`unpack(pack(x))` is what arrives of the rows x_XD; packed leaves have X as first axis."""

    def pack(self, x_XD: Array) -> Any: ...

    def unpack(self, packed: Any, dtype: Any) -> Array: ...


@dataclass(frozen=True)
class PlainWire:
    """Rows travel as they are."""

    def pack(self, x_XD: Array) -> Array:
        return x_XD

    def unpack(self, packed: Array, dtype: Any) -> Array:
        return packed


class Formats(NamedTuple):
    """In words: the operands of each product, and how the input is cached for Wgrad."""

    fprop: str
    dgrad: str
    wgrad: str
    cache: str


class DotRule(Protocol):
    """See the module docstring for the contract."""

    @property
    def formats(self) -> Formats: ...

    @property
    def kept(self) -> tuple[str, ...]: ...

    @property
    def wire(self) -> Wire: ...

    @property
    def gradient_wire(self) -> Wire: ...

    @property
    def least_block(self) -> int: ...

    @property
    def after_attention(self) -> "DotRule": ...

    @property
    def after_dispatch(self) -> "DotRule": ...

    @property
    def before_combine(self) -> "DotRule": ...

    def last_axis(self, x: Operand, *ws: Array) -> list[Array]: ...

    def dot_general(
        self, x: Array, w: Array, dimension_numbers: Any, precision: Any = None,
        preferred_element_type: Any = None, out_sharding: Any = None,
    ) -> Array: ...  # fmt: skip

    def grouped(self, x_PI: Operand, ws: Sequence[Array], expert_Z: Array) -> Sequence[Array]: ...


class LinearMap(ABC):
    """The forms of a linear map, for rules that implement `linear(x_XI, ws) -> ys`."""

    @abstractmethod
    def linear(self, x_XI: Operand, ws: tuple[Array, ...]) -> tuple[Array, ...]:
        """y_XO in x's dtype for each w_IO of `ws`."""

    def last_axis(self, x: Operand, *ws: Array) -> list[Array]:
        """y[..., O] = x[..., I] · w[I, O] in x's dtype, for each of several weights."""
        x_XI = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), x)
        ys_XO = self.linear(x_XI, ws)
        return [y_XO.reshape(*x.shape[:-1], -1) for y_XO in ys_XO]

    def dot_general(
        self, x, w, dimension_numbers, precision=None, preferred_element_type=None,
        out_sharding=None,
    ) -> Array:  # fmt: skip
        """One of them in `lax.dot_general`'s form; ValueError for any other contraction."""
        require_linear(x, w, dimension_numbers, out_sharding)
        [y] = self.last_axis(x, w)
        return y if preferred_element_type is None else y.astype(preferred_element_type)


def require_linear(x: Array, w: Array, dimension_numbers: Any, out_sharding: Any = None) -> None:
    """Raise ValueError unless the contraction is x's last axis with w's first, nothing batched."""
    if out_sharding is not None:
        raise ValueError("a dot rule leaves the sharding of its result to its operands")
    (contract_x, contract_w), (batch_x, batch_w) = dimension_numbers
    linear = tuple(contract_x) == (x.ndim - 1,) and tuple(contract_w) == (0,) and w.ndim == 2
    if not linear or tuple(batch_x) or tuple(batch_w):
        raise ValueError(f"a dot rule computes x[..., I] · w[I, O], not {dimension_numbers}")


def blocks(x_PI: Array, expert_Z: Array) -> Array:
    """The rows of x as [Z, P / Z, I]."""
    return x_PI.reshape(expert_Z.shape[0], -1, x_PI.shape[-1])


def each_block(experts: int, expert_Z: Array, body, start: Array) -> Array:
    """Fold `body(carry, z, expert)` over the blocks in use, which come first; E marks the rest."""
    used = jnp.sum(expert_Z < experts)
    return lax.fori_loop(0, used, lambda z, carry: body(carry, z, expert_Z[z]), start)


def times_experts(
    multiply: Callable[[Any, Any], Array], x_Z: Any, w_E: Any, expert_Z: Array, start_ZbN: Array
) -> Array:
    """[Z · b, N]: `multiply` of each block's leaf of x_Z with its expert's of w_E; blocks that are
    not in use stay what they are in `start_ZbN`, whose dtype the result has."""

    def one(y_ZbN, z, expert):
        y_bN = multiply(_at(x_Z, z), _at(w_E, expert)).astype(y_ZbN.dtype)
        return lax.dynamic_update_index_in_dim(y_ZbN, y_bN, z, 0)

    y_ZbN = each_block(jax.tree.leaves(w_E)[0].shape[0], expert_Z, one, start_ZbN)
    return y_ZbN.reshape(-1, y_ZbN.shape[-1])


def expert_gradients(
    multiply: Callable[[Any, Any], Array], x_Z: Any, dy_Z: Any, expert_Z: Array, shape
) -> Array:
    """FP32 dw_EIO of `shape`: the sum of `multiply` over each expert's blocks."""

    def accumulate(dw_EIO, z, expert):
        return dw_EIO.at[expert].add(multiply(_at(x_Z, z), _at(dy_Z, z)))

    return each_block(shape[0], expert_Z, accumulate, jnp.zeros(shape, jnp.float32))


def in_use(ws: Sequence[Array], expert_Z: Array) -> tuple[tuple[Array, ...], Array]:
    """The weights [Z, I, O] of each block's expert, and int32 [Z] numbers of these (Z marks unused
    blocks), where blocks are fewer than experts, so that a decoding step reads, casts and quantises
    those alone; else what was given."""
    experts, Z = ws[0].shape[0], expert_Z.shape[0]
    if Z >= experts:
        return tuple(ws), expert_Z
    own_Z = jnp.where(expert_Z < experts, jnp.arange(Z), Z)
    return tuple(w_EIO[jnp.minimum(expert_Z, experts - 1)] for w_EIO in ws), own_Z


def _at(tree: Any, index: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)
