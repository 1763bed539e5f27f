"""Products over rows against numpy, in every dtype and layout that a consumer may ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.numerics.rows import contract_rows, matrix_product

SHAPES = [((), 1, 1, 1), ((), 5, 3, 2), ((3,), 130, 16, 7), ((2, 2), 7, 1, 33)]


def operands(lead, rows, left, right, dtype, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(*lead, rows, columns)) for columns in (left, right))
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_contract_rows(dtype, transposed):
    """A consumer that wants the result transposed must not change the product's layout: XLA has
    no product of BF16 for that."""

    @jax.jit
    def each(pairs):
        results = [contract_rows(a, b) for a, b in pairs]
        return [y.swapaxes(-1, -2) * 2 for y in results] if transposed else results

    pairs = [operands(*shape, dtype) for shape in SHAPES]
    for (a, b), got in zip(pairs, each(pairs), strict=True):
        want = np.swapaxes(np.asarray(a, "f8"), -1, -2) @ np.asarray(b, "f8")
        want = 2 * np.swapaxes(want, -1, -2) if transposed else want
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-5)  # FP32 sums of 130 terms


def test_the_derivative_of_a_matrix_product_is_that_of_matmul():
    a, b = operands((2,), 5, 5, 4, "float32")

    def loss(product):
        return lambda a, b: jnp.sum(jnp.sin(product(a, b)))

    ours, theirs = (
        jax.jit(jax.grad(loss(product), argnums=(0, 1)))(a, b)
        for product in (matrix_product, jnp.matmul)
    )
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_keep_the_operands_dtype():
    a, b = operands((), 5, 5, 4, "bfloat16")
    da, db = jax.grad(lambda a, b: matrix_product(a, b).sum(), argnums=(0, 1))(a, b)
    assert da.dtype == db.dtype == jnp.bfloat16
    assert not np.any(np.isnan(np.asarray(da, "f4")))
