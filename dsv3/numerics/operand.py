"""What a linear map multiplies: an array, or SwiGLU of two, which the rule computes when it wants.

Only a product reads the hidden activation of a feed-forward network. FP8's rule wants it quantised,
which a kernel does while it computes it, and keeps its two inputs in FP8 in its place, from which
the backward pass computes it again (§3.3.3). BF16's rule computes it, and what is kept is up to the
rematerialisation policy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def recomputed(cheap: Callable[..., Array]) -> Callable[..., Array]:
    """`cheap` with a backward pass that starts from its inputs again, whatever the policy says.

    Plain differentiation would keep intermediate results several times the size of the inputs.
    """
    function = jax.custom_vjp(cheap)
    function.defvjp(
        lambda *inputs: (cheap(*inputs), inputs),
        lambda inputs, gradient: jax.vjp(cheap, *inputs)[1](gradient),
    )
    return function


class Swiglu(NamedTuple):
    """silu(gate) · up, each row times its `weight`; `gate` and `up` are alike, [..., I]."""

    gate: Any
    up: Any
    weight: Array | None = None  # [..., 1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape

    @property
    def dtype(self) -> DTypeLike:
        return self.up.dtype

    def each(self, change: Callable[[Any], Any]) -> "Swiglu":
        """With `change` of gate and of up."""
        return Swiglu(change(self.gate), change(self.up), self.weight)


Operand = Array | Swiglu


def value(x: Operand) -> Array:
    """The array itself."""
    return recomputed(swiglu)(*x) if isinstance(x, Swiglu) else x


def swiglu(gate: Array, up: Array, weight: Array | None = None) -> Array:
    """Computed in FP32, rounded to up's dtype before and after the weight; kernels call it on their
    tiles."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    hidden = hidden.astype(up.dtype)
    return hidden if weight is None else (hidden * weight).astype(up.dtype)
