"""The step as NVIDIA's compiler schedules it for H200s: what travels while products run."""

import dataclasses
import math

import jax
import pytest
from jax.sharding import AbstractMesh

from dsv3.config import Config, Parallel, Phase
from dsv3.errors import UserError
from dsv3.parallel import mesh as meshes
from dsv3.reporting import compiled
from dsv3.training import state as train_state
from tests.training.small import CONFIG

FILE = "from tests.reporting.test_schedule import wide as get_config\n"
TOKENS, WIDTH, HIDDEN = 256, 256, 192  # of a device in a micro-batch; an expert's


def wide() -> Config:
    """Two MoE layers, wide enough for products; two micro-batches on 2 nodes of 2 devices."""
    training = dataclasses.replace(
        CONFIG.training, batch=(Phase("constant", 1, 8),), sequence_length=TOKENS, micro_batch=4,
        tokens=1e6, compute_dtype="bfloat16",
    )  # fmt: skip
    moe = dataclasses.replace(CONFIG.model.moe, expert_width=HIDDEN, block=128)
    mla = dataclasses.replace(CONFIG.model.mla, heads=4, query_latent=64, kv_latent=64,
                              nope_dim=64, rope_dim=64, value_dim=64)  # fmt: skip
    model = dataclasses.replace(
        CONFIG.model, layers=2, dense_layers=0, mtp_depths=0, width=WIDTH, vocab=512, moe=moe,
        mla=mla, remat="report",
    )  # fmt: skip
    parallel = Parallel(node=2, local=2)
    return dataclasses.replace(CONFIG, model=model, training=training, parallel=parallel)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "wide.py"
    path.write_text(FILE)
    try:
        compiled._cuda()
    except UserError as missing:
        pytest.skip(str(missing))
    return compiled.compile_step(str(path), [], 4, "h200")


def test_shared_experts_compute_while_tokens_travel_to_routed_ones(program):
    """Forward and backward: one product at least of the size of the shared experts' first."""
    layers = 2 * wide().model.layers  # of both micro-batches
    shared = 2.0 * TOKENS * WIDTH * HIDDEN
    hidden = [one for one in program.collectives
              if one.kind == "ragged-all-to-all" and one.meanwhile >= shared]  # fmt: skip
    payload = [one for one in hidden if one.dtype == "bf16" and one.shapes[0].dims[-1] == WIDTH]
    assert sum(one.times for one in payload) >= 2 * layers
    assert all(one.times % layers == 0 for one in payload)


def test_the_average_stays_with_the_host_which_computes_it_under_the_micro_batches(program):
    config = wide()
    mesh = AbstractMesh((1, 1, 2, 2), meshes.AXES)
    params = train_state.abstract(config, mesh).params
    parameters = sum(
        4 * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params)
    )
    assert all(one.to_host for one in program.transfers)
    sent = sum(one.times * one.bytes for one in program.transfers)
    assert parameters <= sent <= parameters + 64  # and whether it is behind
    [meanwhile] = program.host_work
    assert meanwhile > 6.0 * config.model.moe_layers * 2 * TOKENS * WIDTH * 3 * HIDDEN
