"""The choice of a core attention, and what the two for GPUs do where they cannot run."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Mla
from dsv3.errors import ConfigError
from dsv3.numerics.attention import CORES, KEPT, Machine, causal_attention, obstacle, placed

V3 = Mla(kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128)
H200 = Machine("hopper", "bfloat16", 91_400)


@pytest.mark.parametrize(
    ("machine", "changes", "wanted"),
    [
        (H200, {}, "cudnn"),
        (H200._replace(cudnn=90_900), {}, "mosaic"),
        (H200._replace(cudnn=None), {}, "mosaic"),
        (H200, {"nope_dim": 100, "rope_dim": 20}, "cudnn"),
        (H200._replace(cudnn=None), {"value_dim": 96}, "xla"),
        (H200._replace(dtype="float32"), {}, "xla"),
        (Machine("gpu", "bfloat16", 91_400), {}, "xla"),
        (Machine("cpu", "bfloat16"), {}, "xla"),
        (H200, {"attention": "mosaic"}, "mosaic"),
        (H200, {"attention": "xla"}, "xla"),
    ],
)
def test_the_first_that_runs_is_chosen(machine, changes, wanted):
    mla = dataclasses.replace(V3, **changes)
    assert placed(mla, machine).attention == wanted
    assert obstacle(wanted, mla, machine) is None


@pytest.mark.parametrize(
    ("attention", "machine", "says"),
    [
        ("mosaic", Machine("cpu", "bfloat16"), "needs a GPU of compute capability 9.0, not 'cpu'"),
        ("cudnn", H200._replace(cudnn=90_000), "needs cuDNN 91000, not 90000"),
        ("mosaic", H200._replace(dtype="float32"), "needs training.compute_dtype = 'bfloat16'"),
    ],
)
def test_one_that_cannot_run_is_refused_by_name(attention, machine, says):
    mla = dataclasses.replace(V3, attention=attention)
    with pytest.raises(ConfigError, match=rf"model\.mla\.attention = '{attention}' {says}"):
        placed(mla, machine)


@pytest.mark.parametrize(
    ("machine", "changes", "wanted"),
    [
        (H200, {}, "mosaic"),
        (H200, {"kv_latent": 64}, "xla"),
        (H200, {"kv_latent": 640}, "xla"),
        (H200._replace(dtype="float32"), {}, "xla"),
        (Machine("cpu", "bfloat16"), {}, "xla"),
        (H200, {"decoding": "xla"}, "xla"),
    ],
)
def test_what_decodes_is_chosen_likewise(machine, changes, wanted):
    assert placed(dataclasses.replace(V3, **changes), machine).decoding == wanted


def test_a_decoder_that_cannot_run_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"model\.mla\.decoding = 'mosaic' needs .*, not 64 and 64"
    ):
        placed(dataclasses.replace(V3, kv_latent=64, decoding="mosaic"), H200)


@pytest.mark.parametrize("name", CORES)
def test_any_other_dtype_is_left_to_the_oracle(name):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 5, 2, 4)), jnp.float32) for _ in range(3))
    np.testing.assert_array_equal(CORES[name](q, k, v, 0.3), causal_attention(q, k, v, 0.3))


@pytest.fixture
def as_if_on_hopper(monkeypatch):
    """jax asks the driver what cuDNN's attention can do before it lowers it."""
    asked = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(asked + "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(asked + "check_compute_capability", lambda wanted: True)
    monkeypatch.setattr(asked + "is_cuda_compute_capability_equal", lambda other: False)


def calls_of(name, kept):
    """How often the gradient of a block calls each kernel when a policy keeps the names `kept`."""
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    core = jax.checkpoint(functools.partial(CORES[name], scale=0.1), policy=policy)

    def loss(*inputs):
        return jnp.sum(core(*inputs).astype(jnp.float32) ** 2)

    wide, narrow = (jax.ShapeDtypeStruct((1, 128, 2, w), jnp.bfloat16) for w in (192, 128))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(wide, wide, narrow)
    code = traced.lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@(mosaic_gpu|__cudnn\$fmha\w+)", code)


def test_cudnn_takes_values_of_another_width_both_ways(as_if_on_hopper):
    """Its forward call is run again, whatever a policy keeps."""
    calls = calls_of("cudnn", [KEPT])
    assert sorted(calls) == ["__cudnn$fmhaSoftmax"] * 2 + ["__cudnn$fmhaSoftmaxBackward"]


def test_what_the_kernel_keeps_is_not_computed_again():
    assert len(calls_of("mosaic", [KEPT])) == 3  # forward, dq, dk and dv
    assert len(calls_of("mosaic", [])) == 4
