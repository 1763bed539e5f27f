"""Attention over the cache: the seam between a layer's queries and what reads its latents.

    over(q_BTNC, q_BTNR, cache, layer, position_BT, scale) -> z_BTNC

For each query and head the mean of the latents up to the query's own position, which the cache
holds already (`model.mla`, the absorbed form). Chosen from `model.mla.decoding`:

    xla      the oracle, `mla.absorbed_attention`: any platform, any form of the cache
    mosaic   `kernels.decode`, GPUs of compute capability 9.0: latents in BF16, as they are; a cache
             of another form or dtype is left to the oracle
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from dsv3.inference.cache import LatentCache
from dsv3.model.mla import absorbed_attention

Over = Callable[[Array, Array, LatentCache, Array | int, Array, float], Array]


def over_blocks(
    q_BTNC: Array, q_BTNR: Array, cache: LatentCache, layer: Array | int, position_BT: Array,
    scale: float,
) -> Array:  # fmt: skip
    """The oracle."""

    def keys(start: Array, size: int) -> tuple[Array, Array]:
        return cache.read(layer, start, size)

    return absorbed_attention(q_BTNC, q_BTNR, keys, cache.length, position_BT, scale)


def over_splits(
    q_BTNC: Array, q_BTNR: Array, cache: LatentCache, layer: Array | int, position_BT: Array,
    scale: float,
) -> Array:  # fmt: skip
    """The kernel."""
    bf16 = q_BTNC.dtype == jnp.bfloat16 == cache.dtype
    if not bf16 or cache.form != "compute" or cache.length % 8:
        return over_blocks(q_BTNC, q_BTNR, cache, layer, position_BT, scale)
    from dsv3.numerics.kernels import decode  # a second to import

    c_LBSC, k_LBSR = cache.parts
    return decode.absorbed_attention(q_BTNC, q_BTNR, c_LBSC, k_LBSR, layer, position_BT, scale)


OVER: dict[str, Over] = {
    "auto": over_blocks,  # where nobody chose
    "xla": over_blocks,
    "mosaic": over_splits,
}
