import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Bf16Dot, Fp8Dot, Mla, Model, Moe
from dsv3.errors import ConfigError
from dsv3.inference.generate import generate
from dsv3.inference.placement import place, placement_of
from dsv3.inference.replicas import (
    Balancer,
    ReplicatedExperts,
    replicated,
    routed_loads,
    serve,
)
from dsv3.inference.sampling import Greedy
from dsv3.model.moe import RoutedExperts
from dsv3.model.transformer import Transformer
from dsv3.numerics import dot

EXPERTS, SLOTS, DEVICES = 8, 12, 4
CONFIG = Model(
    vocab=40, width=16, layers=3, dense_layers=1, dense_width=16, mtp_depths=1,
    mla=Mla(heads=1, query_latent=None, kv_latent=8, nope_dim=8, rope_dim=4, value_dim=8),
    moe=Moe(routed_experts=EXPERTS, experts_per_token=2, groups=4, groups_per_token=2,
            group_score_experts=1, expert_width=8, block=4),
)  # fmt: skip
LAYERS = 3  # with experts: two and the MTP depth
PROMPTS = [[1], [2, 30, 4], [9, 8, 7, 6, 5, 4, 3, 2, 10]]
complete = functools.partial(
    generate, sampler=Greedy(), max_tokens=6, stop=[1], vocab=40, context=40
)


def random(make, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype),
                        jax.eval_shape(make))  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random(lambda: Transformer(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def call():
    return jax.jit(lambda model, tokens_BT: model(tokens_BT))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 16)), jnp.int32)


def some_placement(seed):
    loads = np.random.default_rng(seed).lognormal(0, 1.5, (LAYERS, EXPERTS))
    return place(loads, SLOTS, groups=4, nodes=2, devices=DEVICES)


def test_replicas_change_nothing_that_is_computed_or_counted(model, call, tokens):
    plain, placed = call(model, tokens), call(replicated(model, some_placement(0)), tokens)
    np.testing.assert_array_equal(plain.stats.counts_LE, placed.stats.counts_LE)
    # the same rows in other places of the grouped product, which may sum them in another order
    np.testing.assert_allclose(plain.logits_BTV, placed.logits_BTV, atol=1e-5)
    np.testing.assert_allclose(plain.mtp_logits[0], placed.mtp_logits[0], atol=1e-5)


def test_a_new_placement_moves_parameters_and_compiles_nothing(model, call, tokens):
    first, second = some_placement(0), some_placement(1)
    assert (first.phy2log_LY != second.phy2log_LY).any()
    once = replicated(model, second)
    twice = replicated(replicated(model, first), second)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    call(replicated(model, first), tokens)
    programs = call._cache_size()
    call(twice, tokens)
    assert call._cache_size() == programs


def test_slots_hold_the_experts_that_the_placement_says(model):
    placement = some_placement(2)
    placed = replicated(model, placement)
    assert isinstance(model.moe.ffn.routed, RoutedExperts)  # the model itself is as it was
    layers = [(model.moe.ffn.routed, placed.moe.ffn.routed.slots, layer) for layer in (0, 1)]
    for layer, slot in np.ndindex(2, SLOTS):
        plain, slots, _ = layers[layer]
        expert = placement.phy2log_LY[layer, slot]
        np.testing.assert_array_equal(slots.up[layer, slot], plain.up[layer, expert])
    depth, placed_depth = model.mtp[0].block.ffn.routed, placed.mtp[0].block.ffn.routed.slots
    np.testing.assert_array_equal(placed_depth.down[...], depth.down[placement.phy2log_LY[2]])


@pytest.mark.parametrize("rule", [Bf16Dot(), Fp8Dot()], ids=lambda rule: rule.tag)
def test_a_layer_with_replicas_equals_one_without(rule):
    experts = random(lambda: RoutedExperts(jax.random.key(0), CONFIG, dot.build(rule)))
    rng = np.random.default_rng(0)
    u_XD = jnp.asarray(rng.normal(size=(19, 16)), jnp.bfloat16)
    chosen_XK = jnp.asarray([rng.permutation(EXPERTS)[:2] for _ in range(19)], jnp.int32)
    gates_XK = jnp.asarray(rng.random((19, 2)), jnp.float32)
    phy2log = [3, 0, 1, 1, 2, 1, 4, 5, 7, 6, 3, 1]
    placed = placed_layer(experts, phy2log)
    both = jax.jit(lambda *layers: [layer(u_XD, chosen_XK, gates_XK) for layer in layers])
    np.testing.assert_array_equal(*both(placed, experts))


def placed_layer(experts, phy2log):
    slot_Y = np.argsort(phy2log, kind="stable")
    count_E = np.bincount(phy2log, minlength=EXPERTS)
    slots = jax.tree.map(lambda leaf: leaf[np.array(phy2log)], experts)
    tables = (jnp.asarray(t) for t in (slot_Y, np.cumsum(count_E) - count_E, count_E))
    return ReplicatedExperts(slots, *tables)


def test_tokens_take_the_replicas_of_their_expert_in_turn():
    phy2log = np.array([3, 0, 1, 1, 2, 1, 4, 5, 7, 6, 3, 1])
    layer = ReplicatedExperts(None, *(
        jnp.asarray(t) for t in (np.argsort(phy2log, kind="stable"),
                                 np.cumsum(np.bincount(phy2log)) - np.bincount(phy2log),
                                 np.bincount(phy2log))
    ))  # fmt: skip
    chosen_XK = jnp.asarray(np.random.default_rng(0).integers(0, EXPERTS, (400, 2)))
    slots_XK = np.asarray(layer.slots_of(chosen_XK))
    np.testing.assert_array_equal(phy2log[slots_XK], chosen_XK)
    for expert in range(EXPERTS):
        taken = np.bincount(slots_XK[np.asarray(chosen_XK) == expert], minlength=SLOTS)
        taken = taken[phy2log == expert]
        assert taken.max() <= 1.5 * taken.mean()  # binomial: 100 assignments over 4 slots
    alone = np.asarray(layer.slots_of(jnp.ones((8, 1), jnp.int32)))[:, 0]
    assert alone.tolist() == [2, 3, 5, 11] * 2


def test_it_generates_what_the_plain_model_does(model):
    plain = complete(model, PROMPTS)
    assert complete(replicated(model, some_placement(3)), PROMPTS) == plain


def test_loads_are_those_of_reading_token_by_token(model, call):
    sequences = [[5, 6, 7, 8], [9, 10]]
    together = routed_loads(model, sequences)
    assert together.shape == (LAYERS, EXPERTS)
    assert together.sum(1).tolist() == [12, 12, 8]  # K = 2; the MTP depth lacks each one's last
    stepwise = np.zeros_like(together)
    for sequence in sequences:
        before = 0
        for length in range(1, len(sequence) + 1):
            counts = routed_loads(model, [sequence[:length], []])
            stepwise += counts - before
            before = counts
    np.testing.assert_array_equal(together, stepwise)


def test_no_prompt_is_no_load(model):
    nothing = routed_loads(model, [])
    assert nothing.shape == routed_loads(model, [[]]).shape and not nothing.any()
    balancer = Balancer(SLOTS, DEVICES)
    assert list(serve(model, [[], []], lambda model, prompts: 1 / 0, balancer)) == [[], []]
    assert balancer.load_LE is None


def test_serving_rebalances_between_batches_and_says_the_same(model):
    batches = [PROMPTS, [[3] * 5] * 3, PROMPTS]
    balancer = Balancer(SLOTS, DEVICES, keep=0.5)
    models = []

    def watched(model, prompts):
        models.append(model)
        return complete(model, prompts)

    served = list(serve(model, batches, watched, balancer))
    assert served == [complete(model, prompts) for prompts in batches]
    assert models[0] is model
    tables = [m.moe.ffn.routed.slot_Y[...] for m in models[1:]]
    assert (tables[0] != tables[1]).any()
    loads = [done.counts_LE for done in served]
    for prompts, completions, load in zip(batches, served, loads, strict=True):
        read = [len(p) + len(c.tokens) - (not c.stopped)
                for p, c in zip(prompts, completions, strict=True)]  # fmt: skip
        assert load.sum(1).tolist() == [2 * sum(read), 2 * sum(read), 0]  # K = 2; no drafts
    np.testing.assert_allclose(balancer.load_LE, loads[0] / 4 + loads[1] / 2 + loads[2])


def test_what_does_not_fit_is_named(model):
    with pytest.raises(ConfigError, match=r"= \(2, 8\) for a model of \(3, 8\)"):
        replicated(model, placement_of([range(8)] * 2, 8))
    with pytest.raises(ConfigError, match="observed no batch"):
        Balancer(SLOTS, DEVICES).plan()
