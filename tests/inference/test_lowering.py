"""The decoding loop as Hopper's kernels would run it: it lowers for CUDA, on a machine without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3.bindings import apply
from dsv3.inference import decode
from dsv3.inference.decode import Plan
from dsv3.inference.sampling import Greedy
from dsv3.model.transformer import Transformer
from dsv3.numerics import attention, dot
from dsv3.sweeps import load_config


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("rule", ["bf16", "fp8"])
def test_a_step_of_few_tokens_lowers_with_kernels(rule):
    """Three rows with a draft: rows of experts, queries and activations are fewer than a tile."""
    config = apply(load_config("configs/v3_1b.py"), {"model.dot": rule, "model.layers": 2}).model
    machine = attention.Machine("hopper", "bfloat16", None)  # without cuDNN
    model = dataclasses.replace(
        config,
        dot=dot.placed(config.dot, "hopper", config.moe.block),
        mla=attention.placed(config.mla, machine),
    )
    assert (model.dot.backend, model.mla.decoding) == ("mosaic", "mosaic")
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    plan = Plan(Greedy(), model.vocab, jnp.dtype("bfloat16"), drafts=1)
    rows, number = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    tokens_BS = jax.ShapeDtypeStruct((3, 128), jnp.int32)
    begun = decode.begin.trace(plan, abstract, tokens_BS, rows, number, prompt=64)
    state = shapes(begun.out_info)
    step = decode.advance.trace(plan, abstract, state, rows, rows, number, number)
    for traced in (begun, step):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
