"""One step: what it must equal, and what a refused one must not touch."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3.config import Config, Parallel
from dsv3.parallel import mesh as meshes
from dsv3.training import state as train_state
from dsv3.training.average import settled
from dsv3.training.step import _false, jitted_step, make_step, operands
from tests.training.small import CONFIG, tokens


def with_training(**fields) -> Config:
    return dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, **fields))


def with_model(**fields) -> Config:
    return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **fields))


def one_step(config, *, seed=3, state=None):
    return make_step(config)(state or train_state.create(config), tokens(seed))


def learning_state():
    """A state two steps in: past the warm-up's rate of zero, with moments and a bias."""
    state, _ = one_step(CONFIG, seed=1)
    return settled(CONFIG.training, one_step(CONFIG, seed=2, state=state)[0])


def test_it_learns_a_batch_by_heart():
    state, first = one_step(CONFIG)
    for _ in range(25):
        state, last = one_step(CONFIG, state=state)
    assert last["loss_main"] < 0.7 * first["loss_main"]
    assert last["loss_mtp"] < 0.8 * first["loss_mtp"]
    assert int(state.step) == 26 and int(state.sequences) == 26 * 8


def test_micro_batches_sum_to_the_whole_batch():
    whole, whole_metrics = one_step(CONFIG, state=learning_state())
    split, split_metrics = one_step(with_training(micro_batch=2), state=learning_state())
    np.testing.assert_array_equal(whole_metrics["load"], split_metrics["load"])
    chex.assert_trees_all_equal(whole.router_bias, split.router_bias)
    np.testing.assert_allclose(whole_metrics["loss"], split_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(whole_metrics["grad_norm"], split_metrics["grad_norm"], rtol=1e-5)
    # BF16 moments may round to neighbours; a step moves a weight by about the rate, 1e-2.
    chex.assert_trees_all_close(whole.params, split.params, atol=2e-4)


@pytest.mark.parametrize("remat", ["report", "full"])
def test_rematerialisation_counts_no_token_twice(remat):
    plain, plain_metrics = one_step(CONFIG, state=learning_state())
    again, again_metrics = one_step(with_model(remat=remat), state=learning_state())
    np.testing.assert_array_equal(plain_metrics["load"], again_metrics["load"])
    chex.assert_trees_all_equal(plain.router_bias, again.router_bias)
    np.testing.assert_allclose(plain_metrics["grad_norm"], again_metrics["grad_norm"], rtol=1e-5)


def test_the_bias_moves_by_the_sign_rule_on_the_whole_batch():
    before = learning_state()
    old = [np.asarray(b) for b in jax.tree.leaves(before.router_bias)]
    after, metrics = one_step(CONFIG, state=before)
    load_LE = np.asarray(metrics["load"], np.int64)
    assert load_LE.shape == (3, 8)  # two MoE layers, then the MTP depth
    # Each layer routes 8 × 16 tokens to 2 experts; the MTP depth has one position fewer.
    np.testing.assert_array_equal(load_LE.sum(1), [8 * 16 * 2, 8 * 16 * 2, 8 * 15 * 2])
    speed = CONFIG.training.bias_speed[0].value
    expected = np.concatenate([b.reshape(-1, 8) for b in old])
    expected = expected + np.float32(speed) * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
    new = np.concatenate([np.asarray(b).reshape(-1, 8) for b in jax.tree.leaves(after.router_bias)])
    np.testing.assert_allclose(new, expected, rtol=1e-6)
    assert np.any(new != 0)


@pytest.mark.parametrize("balance", ["aux_loss", "none"])
def test_without_bias_balancing_the_bias_stays(balance):
    moe = dataclasses.replace(CONFIG.model.moe, balance=balance)
    state, metrics = one_step(with_model(moe=moe))
    assert all(not np.any(b) for b in jax.tree.leaves(state.router_bias))
    assert (metrics["loss_balance"] > 0) == (balance == "aux_loss")


def test_the_average_follows_the_parameters_one_step_behind():
    before = learning_state()
    old = jax.device_get((before.ema, before.params))
    after, _ = one_step(CONFIG, state=before)
    chex.assert_trees_all_equal(jax.device_get(after.ema), old[0])
    average = settled(CONFIG.training, after)
    expected = jax.tree.map(lambda a, p: a + 0.1 * (p - a), old[0], jax.device_get(after.params))
    chex.assert_trees_all_close(jax.device_get(average.ema), expected, rtol=1e-5, atol=1e-7)
    assert settled(CONFIG.training, average) is average
    later, _ = one_step(CONFIG, state=after)
    chex.assert_trees_all_equal(later.ema, average.ema)  # bit for bit, whoever moved it
    for ema in (average.ema, later.ema):
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(ema)} == {"pinned_host"}


def test_no_parameters_are_averaged_twice():
    """Steps that go on from a settled average, as a resumed run does, and steps that never were."""
    straight, saved = learning_state(), learning_state()
    for seed in range(3):
        straight, _ = one_step(CONFIG, seed=seed, state=straight)
        saved, _ = one_step(CONFIG, seed=seed, state=saved)
        saved = settled(CONFIG.training, saved)
    chex.assert_trees_all_equal(settled(CONFIG.training, straight), saved)


def test_gradients_are_clipped_by_their_global_norm():
    config = with_training(clip_norm=1e-3)
    after, metrics = one_step(config)
    unclipped, _ = one_step(with_training(clip_norm=1e9))
    clipped, whole = (float(optax.tree.norm(s.moments[0].mu)) for s in (after, unclipped))
    assert metrics["grad_norm"] > 0.01
    assert clipped / whole == pytest.approx(1e-3 / float(metrics["grad_norm"]), rel=0.01)


def test_a_model_without_experts_is_trained():
    dense = with_model(dense_layers=CONFIG.model.layers, mtp_depths=0)
    state, metrics = one_step(dense)
    assert metrics["load"].shape == (0, CONFIG.model.moe.routed_experts)
    assert int(state.step) == 1


def poisoned(state, where):
    """The state with one NaN in one array."""
    leaves, structure = jax.tree.flatten(getattr(state, where))
    last = leaves[-1]
    leaves[-1] = last.at[(0,) * last.ndim].set(jnp.nan)
    return dataclasses.replace(state, **{where: jax.tree.unflatten(structure, leaves)})


@pytest.mark.parametrize("where", ["params", "router_bias", "moments"])
def test_a_refused_step_touches_nothing_but_its_count(where):
    before = poisoned(learning_state(), where)
    kept = jax.device_get(before)
    after, metrics = one_step(CONFIG, state=before)
    after = settled(CONFIG.training, after)
    if where == "params":
        assert not np.isfinite(metrics["loss"])
    chex.assert_trees_all_equal(
        jax.tree.map(
            np.asarray, dataclasses.replace(jax.device_get(after), skipped=0, skipped_in_a_row=0)
        ),
        jax.tree.map(np.asarray, dataclasses.replace(kept, skipped=0, skipped_in_a_row=0)),
    )
    assert int(after.skipped) == int(after.skipped_in_a_row) == 1


def test_a_refused_step_is_not_averaged_and_the_good_one_before_it_is():
    good, _ = one_step(CONFIG, state=learning_state())
    average = jax.device_get(settled(CONFIG.training, good).ema)
    after, metrics = one_step(CONFIG, state=poisoned(good, "router_bias"))
    assert int(metrics["skipped"]) == 1
    chex.assert_trees_all_equal(jax.device_get(after.ema), average)
    chex.assert_trees_all_equal(jax.device_get(settled(CONFIG.training, after).ema), average)


def test_a_good_step_ends_the_row_of_refused_ones():
    state = learning_state()
    bad = poisoned(state, "params")
    good_params = jax.device_get(learning_state().params)
    bad, _ = one_step(CONFIG, state=bad)
    bad, _ = one_step(CONFIG, state=bad)
    assert int(bad.skipped_in_a_row) == 2
    healed, metrics = one_step(CONFIG, state=dataclasses.replace(bad, params=good_params))
    assert np.isfinite(metrics["loss"])
    assert (int(healed.skipped), int(healed.skipped_in_a_row)) == (2, 0)


def test_bf16_compute_keeps_fp32_masters_and_stays_close():
    _, exact_metrics = one_step(CONFIG)
    low, metrics = one_step(with_training(compute_dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(low.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=1e-2)
    np.testing.assert_allclose(metrics["grad_norm"], exact_metrics["grad_norm"], rtol=5e-2)
    assert metrics["loss"] != exact_metrics["loss"]


def test_a_step_compiles_once():
    other_data = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, seed=7))
    step, state = make_step(CONFIG), train_state.create(CONFIG)
    for seed in range(2):
        state, _ = step(state, np.asarray(tokens(seed)))
    jitted = jitted_step(CONFIG, meshes.build(Parallel()))
    compiled = jitted._cache_size()
    for seed in range(3):
        state, _ = make_step(other_data)(state, np.asarray(tokens(seed)))
    assert jitted._cache_size() == compiled
    first = operands(train_state.create(CONFIG), _false(meshes.build(Parallel())))
    for begun, later in zip(
        jax.tree.leaves(first), jax.tree.leaves(operands(state, state.behind)), strict=True
    ):
        assert jax.typeof(begun) == jax.typeof(later)  # else the second step would compile again


def test_the_abstract_state_is_the_real_one():
    real, abstract = train_state.create(CONFIG), train_state.abstract(CONFIG)
    chex.assert_trees_all_equal_shapes_and_dtypes(real, abstract)
    for r, a in zip(jax.tree.leaves(real.ema), jax.tree.leaves(abstract.ema), strict=True):
        assert r.sharding == a.sharding


def test_fp8_learns_and_its_guard_refuses_a_poisoned_step():
    config = with_model(dot="fp8", mtp_depths=0, layers=2)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, compute_dtype="bfloat16")
    )
    state, first = one_step(config)
    for _ in range(12):
        state, last = one_step(config, state=state)
    assert last["loss_main"] < 0.9 * first["loss_main"] and int(state.skipped) == 0
    poisoned = jax.tree.map(lambda x: x, state.params)
    poisoned["embedding"]["table"].set_value(
        poisoned["embedding"]["table"].get_value().at[:, 0].set(jnp.inf)
    )
    refused, metrics = one_step(config, state=dataclasses.replace(state, params=poisoned))
    assert int(metrics["skipped"]) == 1 and int(refused.step) == 13


def test_a_finite_gradient_that_makes_a_weight_infinite_is_refused_too():
    config = with_training(learning_rate=1e3, warmup_steps=0)
    state = learning_state()
    huge = jax.tree.map(lambda p: jnp.full_like(p, 3.4e38) if p.size > 1 else p, state.params)
    before = dataclasses.replace(state, params=huge)
    kept = jax.tree.map(np.asarray, before.params)
    after, metrics = one_step(config, state=before)
    assert int(metrics["skipped"]) == 1
    chex.assert_trees_all_equal(after.params, kept)
