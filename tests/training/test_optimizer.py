"""AdamW against optax's own; what is decayed; moments in BF16."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from dsv3.config import AdamW
from dsv3.training.optimizer import adamw, decays
from dsv3.training.state import create
from tests.training.small import CONFIG


@pytest.fixture(scope="module")
def params():
    return create(CONFIG).params


def gradients_like(params, seed):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def updated(optimizer, params, steps=3):
    state = optimizer.init(params)
    for seed in range(steps):
        updates, state = jax.jit(optimizer.update)(gradients_like(params, seed), state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    return params, state


def test_fp32_moments_equal_optax(params):
    config = AdamW(moment_dtype="float32")
    peer = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays(params)),
    )
    ours, theirs = updated(adamw(config), params)[0], updated(peer, params)[0]
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_bf16_moments_are_stored_so_and_change_little(params):
    exact, _ = updated(adamw(AdamW(moment_dtype="float32")), params)
    stored, state = updated(adamw(AdamW()), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("bfloat16")}
    assert sum(x.nbytes for x in moments) == 2 * 2 * sum(x.size for x in jax.tree.leaves(params))
    # An update has size about 0.01 a step; BF16 moments are off by at most 2^-8 of it, three times.
    chex.assert_trees_all_close(stored, exact, atol=3 * 0.01 * 2**-7)


def test_everything_decays_but_norm_gains(params):
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer = adamw(AdamW(weight_decay=0.5))
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_gain = "gain" in jax.tree_util.keystr(path)
        assert bool(jnp.any(update != 0)) != is_gain, jax.tree_util.keystr(path)


def test_the_router_bias_is_no_parameter(params):
    state = create(CONFIG)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert not any("bias" in name for name in names)
    biases = [leaf.shape for leaf in jax.tree.leaves(state.router_bias)]
    assert biases == [(2, 8), (8,)]  # two MoE layers, one MTP depth
    assert dataclasses.is_dataclass(state)
