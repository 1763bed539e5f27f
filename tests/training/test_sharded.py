"""A step on several devices is the step on one: counts exactly, sums up to their order."""

import dataclasses
import functools
import math

import chex
import jax
import numpy as np
import pytest

from dsv3.config import AuxLoss, Config, Parallel, Phase
from dsv3.errors import ConfigError
from dsv3.model.router import imbalance
from dsv3.parallel import mesh as meshes
from dsv3.training import state as train_state
from dsv3.training.step import make_step
from tests.training.small import CONFIG, tokens

BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def small_matrices_are_cut():
    """As large ones are; the smallest here are left whole, as they are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "WHOLE_BELOW", 16 * 32)
        yield


STEPS = 2  # the first has a learning rate of zero, the second moves everything


def with_training(config: Config, **fields) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **fields))


def with_model(config: Config, **fields) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


SMALL = with_model(CONFIG, layers=2, dense_layers=0)
SMALL = with_training(SMALL, batch=(Phase("constant", 1, BATCH),), batch_increment=BATCH)
ONE_BLOCK = with_model(SMALL, layers=1, mtp_depths=0)
BF16 = with_training(ONE_BLOCK, compute_dtype="bfloat16")
FP8 = with_model(BF16, dot="fp8")


def on(config: Config, **parallel) -> Config:
    """`config` on that mesh; FSDP brings the recomputation it wants."""
    remat = "report" if parallel.get("parameters") == "fsdp" else config.model.remat
    return dataclasses.replace(with_model(config, remat=remat), parallel=Parallel(**parallel))


def alone(config: Config) -> Config:
    """The same numbers on one device, all at once."""
    config = with_training(dataclasses.replace(config, parallel=Parallel()), micro_batch=None)
    return with_model(config, remat="none")


def mesh_of(config: Config):
    sizes = [config.parallel.pipe, config.parallel.replica, config.parallel.node]
    count = math.prod([*sizes, config.parallel.local])
    if jax.device_count() < count:
        pytest.skip(f"wants {count} devices")
    return meshes.build(config.parallel, jax.devices()[:count])


@functools.cache
def begun(config: Config):
    """The initial state on the host, made once for all that compute with it."""
    return jax.device_get(train_state.create(config))


@functools.cache
def trained(config: Config, order: int | None = None):
    """State, metrics of each step, after `STEPS` batches, their sequences in some order."""
    mesh = mesh_of(config)
    step = make_step(config, mesh)
    same_shapes = with_training(with_model(alone(config), dot="bf16"), compute_dtype="float32")
    state = jax.device_put(begun(same_shapes), train_state.placement(config, mesh))
    rows = np.arange(BATCH) if order is None else np.random.default_rng(order).permutation(BATCH)
    seen = []
    for seed in range(STEPS):
        state, metrics = step(state, np.asarray(tokens(seed, BATCH))[rows])
        seen.append(jax.device_get(metrics))
    return jax.device_get(state), seen


def compared(config: Config, *, loss: float, params: float, order: int | None = None):
    state, seen = trained(config, order)
    state_alone, seen_alone = trained(alone(config))
    for ours, single in zip(seen, seen_alone, strict=True):
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            np.testing.assert_allclose(ours[name], single[name], rtol=loss, err_msg=name)
    chex.assert_trees_all_close(state.params, state_alone.params, atol=params)
    return state, seen, state_alone, seen_alone


MESHES = {
    "all_to_all over 8": on(SMALL, local=8),
    "node_limited in 2 x 2 x 2, micro-batches": with_training(
        on(SMALL, replica=2, node=2, local=2), micro_batch=8
    ),
    "node_limited over 2 x 4, fsdp, several passes": on(
        SMALL, node=2, local=4, parameters="fsdp", expert_rows=1.0
    ),
    "4 replicas, parameters cut over pipe too": on(SMALL, pipe=2, replica=4),
}


@pytest.mark.parametrize("name", MESHES)
def test_a_step_on_several_devices_is_the_step_on_one(name):
    # FP32 sums in another order: 1e-7 of a value, and BF16 moments that then round to neighbours,
    # 2^-9 of a step of at most the rate, 1e-2 · 1/2.
    state, seen, state_alone, seen_alone = compared(MESHES[name], loss=3e-6, params=5e-5)
    for ours, single in zip(seen, seen_alone, strict=True):
        np.testing.assert_array_equal(ours["load"], single["load"])
    chex.assert_trees_all_equal(state.router_bias, state_alone.router_bias)
    assert any(np.any(bias) for bias in jax.tree.leaves(state.router_bias))
    assert int(state.step) == STEPS and int(state.sequences) == STEPS * BATCH


def test_the_order_of_sequences_changes_nothing():
    name = "all_to_all over 8"
    state, seen, state_alone, seen_alone = compared(MESHES[name], order=1, loss=3e-6, params=5e-5)
    np.testing.assert_array_equal(seen[1]["load"], seen_alone[1]["load"])
    chex.assert_trees_all_equal(state.router_bias, state_alone.router_bias)


def test_bf16_gathers_what_its_products_multiply():
    # Partial sums of experts are rounded to BF16, 2^-9, on their way back.
    compared(on(BF16, replica=2, local=2), loss=5e-3, params=1e-2)


def test_fp8_travels_to_experts():
    # As BF16, and blocks of 8 rows for Wgrad's scales that hold other rows of an expert.
    compared(on(FP8, local=2), loss=2e-2, params=1.1e-2)


# --- where arrays lie --------------------------------------------------------------------------


def test_the_state_is_made_in_its_place_with_the_same_numbers():
    config = on(SMALL, replica=2, node=2, local=2)
    mesh = mesh_of(config)
    state, abstract = train_state.create(config, mesh), train_state.abstract(config, mesh)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    for real, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert real.sharding == planned.sharding
    chex.assert_trees_all_equal(jax.device_get(state), begun(SMALL))
    gate = state.params["moe"]["ffn"]["routed"]["gate"].get_value()
    assert gate.sharding.shard_shape(gate.shape) == (2, 8 // 4, 32 // 2, 16)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.ema)} == {"pinned_host"}
    params = jax.tree.leaves(state.params)
    large = [p for p in params if math.prod(p.shape[-2:]) >= meshes.WHOLE_BELOW]
    assert len(large) > 10 and all(p.addressable_data(0).size * 8 == p.size for p in large)


def test_a_batch_wise_balance_loss_is_the_whole_batch_s():
    config = dataclasses.replace(CONFIG.model.moe, balance=AuxLoss(scope="batch"))
    shard = meshes.shard_of(on(SMALL, local=8), mesh_of(on(SMALL, local=8)), {})
    scores_BTE = np.random.default_rng(0).uniform(size=(1, 8 * 6, 8)).astype(np.float32)
    valid_BT = np.ones((1, 8 * 6), bool)

    def whole(scores_BTE):
        return imbalance(scores_BTE, valid_BT, config)

    def part(scores_BTE):
        def share(scores_BTE):
            return imbalance(scores_BTE, valid_BT[:, :6], config, shard) / 8

        value, gradient = jax.value_and_grad(share)(scores_BTE)
        return jax.lax.psum(value, "local"), gradient

    by_token = jax.P(None, "local")
    parts = jax.shard_map(
        part, mesh=mesh_of(on(SMALL, local=8)), in_specs=by_token, out_specs=(jax.P(), by_token),
        check_vma=False,
    )  # fmt: skip
    ours, expected = jax.jit(parts)(scores_BTE), jax.jit(jax.value_and_grad(whole))(scores_BTE)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-8)


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "named"),
    [
        ({"replica": 3, "local": 2}, "parallel.replica = 3"),
        ({"replica": None, "pipe": 16}, "parallel.pipe = 16"),
        ({"local": 3}, "parallel.local = 3"),
        ({"node": 8, "transport": "node_limited"}, "model.moe.groups = 4"),
        ({"parameters": "fsdp"}, "model.remat"),
        ({"replica": 0}, "parallel.replica = 0"),
        ({"expert_rows": 0.5}, "parallel.expert_rows = 0.5"),
        ({"transport": "all_to_all"}, "parallel.transport = 'all_to_all'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(parallel, named):
    with pytest.raises(ConfigError, match=named):
        config = dataclasses.replace(SMALL, parallel=Parallel(**parallel))
        meshes.build(config.parallel, jax.devices())


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"batch_increment": 4}, "training.batch_increment = 4"),
        ({"micro_batch": 4}, "training.micro_batch = 4"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_named(training, named):
    config = with_training(on(SMALL, local=8), **training)
    with pytest.raises(ConfigError, match=named):
        make_step(config, mesh_of(config))
