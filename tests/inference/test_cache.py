import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3 import counts
from dsv3.inference.cache import FORMS, empty
from dsv3.sweeps import load_config
from tests.model.conftest import SMALL

L, B, S = 3, 2, 8


def latents(seed, *shape):
    rng = np.random.default_rng(seed)
    widths = SMALL.mla.kv_latent, SMALL.mla.rope_dim
    return tuple(jnp.asarray(rng.normal(size=(*shape, w)), jnp.float32) for w in widths)


def cache(form="compute", dtype="float32"):
    return empty(form, SMALL.mla, L, B, S, jnp.dtype(dtype))


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("kv_latent", [9, 128, 300])  # a partial tile, a whole one, several
def test_arrays_have_the_counted_bytes(kv_latent, drafts):
    model = dataclasses.replace(SMALL, mla=dataclasses.replace(SMALL.mla, kv_latent=kv_latent))
    counted = {
        ("compute", "bfloat16"): counts.cache_bytes(model, drafts=drafts),
        ("compute", "float32"): counts.cache_bytes(model, 4, drafts=drafts),
        ("fp8", "float32"): counts.fp8_cache_bytes(model, drafts=drafts),
    }
    for (form, dtype), bytes_each in counted.items():
        held = empty(form, model.mla, model.layers + drafts, B, S, jnp.dtype(dtype))
        assert bytes_of(held) == B * S * bytes_each


def test_v3_caches_656_bytes_a_token_and_layer_in_fp8():
    model = load_config("configs/deepseek_v3.py").model
    shape = jax.eval_shape(lambda: empty("fp8", model.mla, 62, 1, 1, jnp.dtype("bfloat16")))
    assert bytes_of(shape) == 62 * 656 == counts.fp8_cache_bytes(model, drafts=1)
    assert counts.cache_bytes(model, drafts=1) == 62 * 576 * 2


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read_and_nothing_else_changes(form):
    first, more = latents(0, B, 5), latents(1, B, 2)
    position_BT = jnp.array([[5, 6], [1, 2]])
    held = cache(form).begin(1, *first).write(1, jnp.arange(B), position_BT, *more)
    wanted = [np.zeros((B, S, x.shape[-1]), np.float32) for x in first]
    for whole, begun, written in zip(wanted, first, more, strict=True):
        whole[:, :5] = begun
        whole[0, 5:7], whole[1, 1:3] = written[0], written[1]
    for whole, read in zip(wanted, held.read(1, jnp.int32(0), S), strict=True):
        # FP8: half a unit of E4M3's last of 3 mantissa bits; the rope key in BF16 is finer
        np.testing.assert_allclose(read, whole, rtol=0 if form == "compute" else 2**-4, atol=1e-3)
    c_BsC, _ = held.read(1, jnp.int32(4), 2)
    np.testing.assert_array_equal(c_BsC, held.read(1, jnp.int32(0), S)[0][:, 4:6])
    for layer in (0, 2):
        assert not any(np.any(read) for read in held.read(layer, jnp.int32(0), S))


def test_fp8_is_scaled_token_by_token():
    """A huge token does not crush a small one beside it, and scales restore both."""
    c_BTC, k_rope_BTR = latents(0, B, 2)
    c_BTC = c_BTC * jnp.array([1e4, 1e-4])[None, :, None]
    held = cache("fp8").write(0, jnp.arange(B), jnp.array([[0, 1]] * B), c_BTC, k_rope_BTR)
    read_BTC = held.read(0, jnp.int32(0), 2)[0]
    largest_BT1 = jnp.abs(c_BTC).max(axis=-1, keepdims=True)
    # half a step of E4M3 at most 2^-4 of a number, and at most 2^-10 of 1/448 of the largest
    bound = np.maximum(2**-4 * np.abs(c_BTC), 2**-10 / 448 * largest_BT1)
    assert np.all(np.abs(read_BTC - c_BTC) <= bound * 1.001)


def test_a_nan_stays_one():
    c_BTC, k_rope_BTR = latents(0, B, 1)
    held = cache("fp8").write(
        0, jnp.arange(B), jnp.zeros((B, 1), jnp.int32), c_BTC.at[0, 0, 0].set(jnp.nan), k_rope_BTR
    )
    read_BTC = held.read(0, jnp.int32(0), 1)[0]
    assert np.isnan(read_BTC[0]).any() and not np.isnan(read_BTC[1]).any()
