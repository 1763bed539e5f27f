"""The decoding kernel in interpret mode against the oracle, through the seam that chooses them."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Mla
from dsv3.inference.absorbed import over_blocks, over_splits
from dsv3.inference.cache import LatentCache, empty
from dsv3.numerics.kernels.decode import absorbed_attention
from tests.numerics.kernels.arrays import apart, random

B, T, N, C, R, S, LAYER = 2, 2, 3, 128, 64, 136, 1
CLOSE = 2**-7  # p is rounded to 8 bits for the tensor cores, and so are partial means and z
POSITION_BT = jnp.array([[3, 4], [127, 128]], jnp.int32)  # of two steps and a bit


def cache_of(dtype):
    return LatentCache((random(2, 2, B, S, C, dtype=dtype), random(3, 2, B, S, R, dtype=dtype)),
                       "compute", jnp.dtype(dtype))  # fmt: skip


def queries(dtype=jnp.bfloat16):
    return random(0, B, T, N, C, dtype=dtype), random(1, B, T, N, R, dtype=dtype)


def exact():
    q_BTNC, q_BTNR = (x.astype(jnp.float32) for x in queries())
    parts = tuple(part.astype(jnp.float32) for part in cache_of(jnp.bfloat16).parts)
    cache = LatentCache(parts, "compute", jnp.dtype(jnp.float32))
    return over_blocks(q_BTNC, q_BTNR, cache, LAYER, POSITION_BT, 0.1)


def test_over_the_whole_cache(interpret):
    with interpret():
        z = over_splits(*queries(), cache_of(jnp.bfloat16), LAYER, POSITION_BT, 0.1)
    assert z.dtype == jnp.bfloat16 and apart(z, exact()) <= CLOSE


def test_in_splits_of_which_some_are_empty(interpret):
    with interpret():
        z = absorbed_attention(
            *queries(), *cache_of(jnp.bfloat16).parts, LAYER, POSITION_BT, 0.1, 2
        )
    assert z.dtype == jnp.bfloat16 and apart(z, exact()) <= CLOSE


def test_other_caches_are_left_to_the_oracle():
    for form, dtype in (("compute", jnp.float32), ("fp8", jnp.bfloat16)):
        cache = empty(form, Mla(kv_latent=C, rope_dim=R), 2, B, S, jnp.dtype(dtype))
        cache = cache.begin(LAYER, random(4, B, S, C, dtype=dtype), random(5, B, S, R, dtype=dtype))
        arguments = *queries(dtype), cache, LAYER, POSITION_BT, 0.1
        np.testing.assert_array_equal(over_splits(*arguments), over_blocks(*arguments))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"q_BTNC": jnp.zeros((1, 1, 1, 96), jnp.bfloat16)}, "q_BTNC is 96 wide"),
        ({"k_LBSR": jnp.zeros((1, 1, 8, 32), jnp.bfloat16)}, "k_LBSR is 32 wide"),
        ({"c_LBSC": jnp.zeros((1, 1, 9, 128), jnp.bfloat16)}, "c_LBSC is .* S a multiple of 8"),
        ({"c_LBSC": jnp.zeros((1, 2, 8, 128), jnp.bfloat16)}, "c_LBSC is .* want B = 1"),
        ({"q_BTNR": jnp.zeros((1, 1, 1, 64))}, "q_BTNR is float32"),
    ],
)
def test_a_refusal_names_the_dimension(changes, says):
    names = {"q_BTNC": (1, 1, 1, C), "q_BTNR": (1, 1, 1, R), "c_LBSC": (1, 1, 8, C),
             "k_LBSR": (1, 1, 8, R)}  # fmt: skip
    fine = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in names.items()}
    with pytest.raises(ValueError, match=says):
        absorbed_attention(**fine | changes, layer=0, position_BT=jnp.zeros((1, 1), int), scale=1.0)
