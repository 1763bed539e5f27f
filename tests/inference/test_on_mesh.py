"""Decoding on several devices is decoding on one: the same tokens, the same counts."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Config, Parallel, Training
from dsv3.errors import CheckpointError, ConfigError
from dsv3.inference import generate as module
from dsv3.inference.generate import generate
from dsv3.inference.placement import place
from dsv3.inference.replicas import replicated
from dsv3.inference.sampling import Greedy, Random
from dsv3.model.transformer import Transformer
from dsv3.parallel import mesh as meshes
from dsv3.training.state import on_mesh
from tests.model.conftest import SMALL, _fill

MODEL = dataclasses.replace(SMALL, layers=2, dense_layers=0, mtp_depths=1)
CONFIG = Config(model=MODEL, training=Training(compute_dtype="float32"))
PROMPTS = [[5, 6, 9], [1], [7] * 12, [3, 4, 5, 6, 7], [8, 2]]  # more or fewer than there are ranks
OPTIONS = {"stop": [1, 18, 25], "vocab": 29, "context": 40}


@pytest.fixture(scope="module", autouse=True)
def small_matrices_are_cut():
    """As large ones are, but for the smallest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "WHOLE_BELOW", 150)
        yield


@functools.cache
def alone():
    return _fill(lambda key: Transformer(key, MODEL))


def mesh_of(parallel: Parallel):
    count = math.prod((parallel.pipe, parallel.replica, parallel.node, parallel.local))
    if jax.device_count() < count:
        pytest.skip(f"wants {count} devices")
    return meshes.build(parallel, jax.devices()[:count])


@functools.cache
def on(**parallel) -> Transformer:
    """The model on such a mesh; FSDP wants recomputation, which nothing here does."""
    remat = "report" if parallel.get("parameters") == "fsdp" else "none"
    model = dataclasses.replace(MODEL, remat=remat)
    config = dataclasses.replace(CONFIG, model=model, parallel=Parallel(**parallel))
    return on_mesh(config, alone(), mesh_of(config.parallel))


def seven_tokens(tokens):
    """Ends a completion with its seventh token, unless it began with 15."""
    return 7 if len(tokens) >= 7 and tokens[0] != 15 else None


DRAWN, SEED = Random(1.5), {"seed": 3}
LIMITED = {"pipe": 2, "node": 2, "local": 2}
FSDP = {"replica": 2, "local": 4, "parameters": "fsdp", "expert_rows": 1.0}
CASES = {  # mesh, sampler, what else is asked for
    "drawn, stop strings, fsdp, all_to_all over 4 in several passes, 2 replicas": (
        FSDP, DRAWN, SEED | {"ends": seven_tokens},
    ),
    "greedy, drafted, FP8 cache, all_to_all over 8": (
        {"local": 8}, Greedy(), {"drafts": 1, "cache": "fp8"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parallel", "sampler", "options"), CASES.values(), ids=CASES)
def test_a_mesh_completes_as_one_device_does(parallel, sampler, options):
    options = OPTIONS | options
    model = on(**parallel)
    ours, single = (generate(m, PROMPTS, sampler, 20, **options) for m in (model, alone()))
    assert ours == single
    np.testing.assert_array_equal(ours.counts_LE, single.counts_LE)
    assert len({len(c.tokens) for c in ours}) > 2  # devices end at different steps
    assert any(c.stopped for c in ours)
    routed = model.moe.ffn.routed.gate[...]
    assert routed.addressable_data(0).size < routed.size


def test_programs_are_shared_by_batches_of_a_size():
    model = on(**FSDP)
    generate(model, PROMPTS, DRAWN, 20, **OPTIONS)
    programs = module.decode.begin._cache_size(), module.decode.advance._cache_size()
    for prompts in ([[9]], PROMPTS[::-1], [[3, 4]] * 8):
        generate(model, prompts, DRAWN, 9, **OPTIONS)
    assert (module.decode.begin._cache_size(), module.decode.advance._cache_size()) == programs


def test_damaged_weights_of_one_device_are_named():
    model = jax.tree.map(lambda leaf: leaf, on(**FSDP))
    routed, down = model.moe.ffn.routed, model.moe.ffn.routed.down[...]
    broken = down.at[:, 3].set(jnp.nan)  # an expert that not every token goes to
    routed.down[...] = jax.device_put(broken, down.sharding)
    with pytest.raises(CheckpointError, match="logits are not finite"):
        generate(model, PROMPTS, DRAWN, 20, **OPTIONS)


# --- replicas ----------------------------------------------------------------------------------


def placement(groups, nodes):
    loads = np.random.default_rng(nodes).lognormal(0, 1.5, (3, 8))
    return place(loads, 12, groups=groups, nodes=nodes, devices=4)


def test_replicas_lie_where_the_placement_says_and_say_the_same():
    """Hierarchical, and then moved to a global one, whose groups lie on any node."""
    hierarchical, anywhere = placement(4, 2), placement(1, 1)
    once = replicated(on(**LIMITED), hierarchical)
    twice = replicated(once, anywhere)
    for model, planned in ((once, hierarchical), (twice, anywhere)):
        parts = [
            (alone().moe.ffn.routed, model.moe.ffn.routed.slots, planned.phy2log_LY[:2]),
            *(
                (a.block.ffn.routed, b.block.ffn.routed.slots, row)
                for a, b, row in zip(alone().mtp, model.mtp, planned.phy2log_LY[2:], strict=True)
            ),
        ]
        for plain, slots, experts in parts:
            for shard in slots.up[...].addressable_shards:
                *layer, own, rows, columns = shard.index
                assert shard.data.shape[-3] == 3
                wanted = np.take_along_axis(
                    np.asarray(plain.up[...]), experts[..., None, None], axis=-3
                )
                np.testing.assert_array_equal(shard.data, wanted[(*layer, own, rows, columns)])
        ours, plain = (generate(m, PROMPTS, DRAWN, 20, **OPTIONS) for m in (model, alone()))
        assert ours == plain
        np.testing.assert_array_equal(ours.counts_LE, plain.counts_LE)


def test_slots_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match="10 slots do not divide over the 4 devices of experts"):
        replicated(on(**LIMITED), place(np.ones((3, 8)), 10))
