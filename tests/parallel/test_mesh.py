"""The table of partition specs: who holds what, on meshes that need no devices."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from dsv3.bindings import apply
from dsv3.cluster import Sizes
from dsv3.config import Config, Parallel
from dsv3.parallel import mesh as meshes
from dsv3.parallel.exchange import Hop
from dsv3.parallel.shard import path_of
from dsv3.sweeps import load_config
from dsv3.training import state as train_state

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30


@functools.cache
def report() -> Config:
    return load_config(CONFIGS / "deepseek_v3.py")


def lying_on(config: Config, sizes: Sizes):
    return train_state.abstract(config, AbstractMesh(sizes, meshes.AXES))


def on_a_device(tree) -> int:
    """Bytes of the part of `tree` that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_the_report_s_state_is_cut_over_all_its_devices():
    state = lying_on(report(), Sizes(16, 2, 8, 8))
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert whole / 1e9 == pytest.approx(682.6, abs=0.1)
    # FP32 masters, two BF16 moments, FP32 average; what is everywhere adds the rest.
    assert whole * 12 / 2048 <= on_a_device(state) < whole * 12 / 2048 + 0.02 * GIB
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        if path_of(path).endswith("gain"):
            assert leaf.sharding.is_fully_replicated, path_of(path)
        else:
            assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 2048 == leaf.size, path


def test_experts_lie_in_order_and_are_cut_further_over_their_copies():
    state = lying_on(report(), Sizes(16, 2, 8, 8))
    gate = state.params["moe"]["ffn"]["routed"]["gate"].get_value()
    assert gate.sharding.spec[1] == ("node", "local")
    assert gate.sharding.shard_shape(gate.shape)[:2] == (58, 256 // 64)


def test_moments_and_average_lie_where_their_parameters_do():
    state = lying_on(report(), Sizes(16, 2, 8, 8))
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(state.params)]
    for tree in (state.moments[0].mu, state.moments[0].nu, state.ema):
        assert [leaf.sharding.spec for leaf in jax.tree.leaves(tree)] == specs


def test_16b_has_room_on_8_devices_of_80_gb():
    config = load_config(CONFIGS / "v3_16b.py")
    state = lying_on(config, Sizes(1, 1, 1, 8))
    gathered = 4 * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) if "routed" in path_of(path) else leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    )
    # The state, parameters in use and their gradients, both FP32; the rest is for activations.
    assert (on_a_device(state) + 2 * gathered) / 1e9 < 45


shapes = st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 512), st.integers(1, 512))
sizes = st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 4).map(lambda s: Sizes(*s))


@given(shape=shapes, sizes=sizes, transport=st.sampled_from(["auto", "local"]))
def test_every_axis_cuts_a_parameter_evenly_or_holds_copies_of_it(shape, sizes, transport):
    parallel = Parallel(*sizes, transport=transport)
    experts = shape[1] * sizes.expert_ranks
    config = dataclasses.replace(Config(), parallel=Parallel())
    object.__setattr__(config, "parallel", parallel)  # the model's own experts do not matter here
    shape = (shape[0], experts, *shape[2:])
    cut = meshes.WHOLE_BELOW <= shape[-1] * shape[-2]
    for name in ("params.moe.ffn.routed.up", "ema.embedding.table", "params.norm.gain"):
        place = meshes.place_of(config, sizes, name, shape)
        used = [*place.experts, *place.rest, *(axis for _, axes in place.cuts for axis in axes)]
        assert len(used) == len(set(used))
        assert cut or place.cuts == () or "routed" in name
        if not name.endswith("gain"):
            assert set(used) == {axis for axis in meshes.AXES if getattr(sizes, axis) > 1}
        lengths = np.array(shape)
        for dimension, axes in (*place.cuts, (-3, place.experts)):
            ways = math.prod(getattr(sizes, axis) for axis in axes)
            assert lengths[dimension] % ways == 0
    assert place.cuts == () and place.experts == ()


@pytest.mark.parametrize(
    ("parallel", "hops"),
    [
        (Parallel(node=8, local=8), (Hop(("node",), 8, 4), Hop(("local",), 8, 8))),
        (Parallel(node=8, local=8, transport="all_to_all"), (Hop(("node", "local"), 64, 8),)),
        (Parallel(node=8, local=8, transport="local"), ()),
        (Parallel(local=8), (Hop(("local",), 8, 8),)),
        (Parallel(node=8, transport="node_limited"), (Hop(("node",), 8, 4),)),
        (Parallel(), ()),
    ],
)
def test_the_way_to_experts_is_that_of_the_transport(parallel, hops):
    config = dataclasses.replace(report(), parallel=parallel)
    assert meshes.hops_of(config, Sizes(1, 1, parallel.node, parallel.local)) == hops


@pytest.mark.parametrize(
    ("accelerator", "cudnn", "changes", "says"),
    [
        ("cpu", None, {}, "products by 'xla', attention by 'xla', decoding by 'xla'"),
        (
            "gpu", None, {},
            "products by 'xla' ('mosaic' needs a GPU of compute capability 9.0, not 'gpu'), "
            "attention by 'xla' ('cudnn', 'mosaic' needs a GPU of compute capability 9.0, not "
            "'gpu'), decoding by 'xla' ('mosaic' needs a GPU of compute capability 9.0, not 'gpu')",
        ),
        ("hopper", 91_000, {}, "products by 'mosaic', attention by 'cudnn', decoding by 'mosaic'"),
        (
            "hopper", 90_500, {"model.moe.block": 64},
            "products by 'xla' ('mosaic' needs model.moe.block a multiple of 128, not 64), "
            "attention by 'mosaic' ('cudnn' needs cuDNN 91000, not 90500), decoding by 'mosaic'",
        ),
        (
            "hopper", 91_000, {"model.mla.attention": "xla", "model.dot": "fp8"},
            "products by 'mosaic', attention by 'xla', decoding by 'mosaic'",
        ),
    ],
)  # fmt: skip
def test_a_backend_passed_over_is_said_to_be_and_why(
    monkeypatch, accelerator, cudnn, changes, says
):
    monkeypatch.setattr(meshes, "accelerator", lambda: accelerator)
    monkeypatch.setattr(meshes, "cudnn_version", lambda: cudnn)
    assert meshes.backends(apply(report(), changes)) == says
