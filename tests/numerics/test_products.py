"""Products of quantised operands, by each backend: against the exact product of the same."""

import jax.numpy as jnp
import pytest

from dsv3.numerics.fp8 import BLOCK, COLUMN, TENSOR, TILE, Quantized, quantize
from dsv3.numerics.products import Dequantized, Hopper, Promoted, exact_product
from tests.numerics.measures import error, random

PRODUCTS = {  # how each GEMM groups and contracts its two operands (spec §2.2)
    "fprop": ((TILE, 1, (96, 300)), (BLOCK, 0, (300, 72))),
    "dgrad": ((TILE, 1, (96, 300)), (BLOCK, 1, (72, 300))),
    "wgrad": ((COLUMN, 0, (300, 96)), (COLUMN, 0, (300, 72))),
}


def operands(kind, groups=None, seed=0):
    for group, axis, shape in PRODUCTS[kind]:
        x = random(seed, *shape) * jnp.exp(random(seed + 1, shape[0], 1))
        yield quantize(x, groups or group), axis
        seed += 2


def multiply(backend, kind, groups=None):
    (a, axis_a), (b, axis_b) = operands(kind, groups)
    wanted = exact_product(*(Quantized(q.values, q.scales) for q in (a, b)), (axis_a, axis_b))
    return backend.multiply(backend.prepare(a, axis_a), backend.prepare(b, axis_b)), wanted


@pytest.mark.parametrize("groups", [None, TENSOR], ids=["fine", "tensor"])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_promoted_product_is_exact_to_fp32(kind, groups):
    got, wanted = multiply(Promoted(), kind, groups)
    assert got.dtype == jnp.float32
    assert error(got, wanted) < 1e-6  # a sum of 300 in FP32


@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_dequantized_product_rounds_operands_to_bf16(kind):
    got, wanted = multiply(Dequantized(), kind)
    assert 1e-5 < error(got, wanted) < 2**-8


def test_hopper_with_promotion_is_close_and_without_is_not():
    promoted, wanted = multiply(Hopper(128), "fprop")
    assert error(promoted, wanted) < 1e-3
    tensor, wanted = multiply(Hopper(None), "fprop", TENSOR)
    assert error(tensor, wanted) > 1e-5 > 10 * error(*multiply(Promoted(), "fprop", TENSOR))


def test_a_missing_promotion_is_caught_by_orders_of_magnitude():
    a, b = (quantize(jnp.abs(random(i, 16, 4096)), TENSOR) for i in (0, 1))
    wanted = exact_product(a, b, (1, 1))
    found = {
        backend: error(backend.multiply(backend.prepare(a, 1), backend.prepare(b, 1)), wanted)
        for backend in (Promoted(), Hopper(None))
    }
    assert found[Promoted()] < 1e-6 and found[Hopper(None)] > 1e-2
