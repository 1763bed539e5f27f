"""Products that contract over rows: weight gradients, and attention's gradients of keys and values.

    y[..., I, O] = sum over t of a[..., t, I] · b[..., t, O]

XLA:CPU has fast products, with the processor's BF16 instructions where it has them, only for a left
operand whose contraction lies along memory. For any other it converts to FP32 and takes a path two
to three times slower. A transpose alone does not help, since XLA folds it back into the product:
here the left operand is really laid out anew, which costs a few per cent of the product. The
result's layout is fixed as well: in any other, XLA 0.12 fails on the product in BF16. GPUs and TPUs
transpose inside their products, so there XLA gets the plain form.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint


def contract_rows(a: Array, b: Array) -> Array:
    """FP32 [..., I, O] from a [..., T, I] and b [..., T, O] of one dtype and equal leading axes."""
    return lax.platform_dependent(a, b, cpu=_relaid, default=_plain)


@jax.custom_vjp
def matrix_product(a: Array, b: Array) -> Array:
    """FP32 [..., T, O] from a [..., T, I] and b [..., I, O] of one dtype and equal leading axes.

    Its derivative is that of a product of matrices, the gradient rounded to the operands' dtype
    before it is multiplied, as flash attention does.
    """
    return jnp.einsum("...ti,...io->...to", a, b, preferred_element_type=jnp.float32)


def _backward(operands: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    a, b = operands
    dy = dy.astype(a.dtype)
    da = matrix_product(dy, b.swapaxes(-1, -2))
    return da.astype(a.dtype), contract_rows(a, dy).astype(b.dtype)


matrix_product.defvjp(lambda a, b: (matrix_product(a, b), (a, b)), _backward)


def _plain(a: Array, b: Array) -> Array:
    return jnp.einsum("...ti,...to->...io", a, b, preferred_element_type=jnp.float32)


def _relaid(a: Array, b: Array) -> Array:
    product = jnp.einsum(
        "...it,...to->...io", _along_memory(a.swapaxes(-1, -2)), b,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return _along_memory(product)


def _along_memory(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
