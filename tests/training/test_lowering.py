"""The step goes to platforms that are not here: it lowers for a TPU."""

import jax
import jax.numpy as jnp
import pytest

from dsv3.bindings import apply
from dsv3.parallel import mesh as meshes
from dsv3.training import state as train_state
from dsv3.training.step import jitted_step, operands
from tests.training.small import CONFIG


@pytest.mark.parametrize(
    ("bindings", "multiplied"),
    [
        ({"training.compute_dtype": "bfloat16"}, "bf16"),
        ({"model.dot": "fp8", "model.dot.backend": "dequant"}, "f8E4M3FN"),
    ],
)
def test_the_step_lowers_for_a_tpu(bindings, multiplied):
    config = apply(CONFIG, bindings)
    mesh = meshes.build(config.parallel)
    state = operands(train_state.abstract(config, mesh), jax.ShapeDtypeStruct((), bool))
    tokens = jax.ShapeDtypeStruct((8, config.training.sequence_length + 1), jnp.int32)
    traced = jitted_step(config, mesh).trace(*state, tokens)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.dot_general" in text and multiplied in text
    assert "mosaic_gpu" not in text and "cudnn" not in text
