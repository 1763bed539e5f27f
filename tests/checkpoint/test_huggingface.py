"""Models read from the hub's layout: parity with transformers (tests/golden), precision, place."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dsv3.checkpoint import hub, huggingface
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.weights import Weights
from dsv3.model.transformer import Transformer
from tests.checkpoint.folders import (
    CASES,
    GOLDEN,
    edit_tensors,
    golden,
    in_hub_layout,
    pieces_of,
)

UNOPTIMISED = {"xla_backend_optimization_level": 0}  # compiles in a third of the time


@functools.partial(jax.jit, compiler_options=UNOPTIMISED)
def loss_logits_gradients(model: Transformer, tokens_BT):
    """Mean next-token cross-entropy, the output and the loss's gradients by parameter."""

    def loss(model):
        output = model(tokens_BT)
        log_p = jax.nn.log_softmax(output.logits_BTV[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1)), output

    (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(model)
    return value, output, name_leaves(gradients)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(case):
    """Logits to 1e-4 (they reach 10; two FP32 orders of summation differ by 1e-5), every gradient
    to 1e-3 of its tensor's largest entry."""
    wanted = golden(case)
    config, model = huggingface.load(GOLDEN / case, dtype="float32")
    loss, output, gradients = loss_logits_gradients(model, wanted["tokens"])
    np.testing.assert_allclose(output.logits_BTV, wanted["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)

    found = in_hub_layout(config.model, gradients)
    names = [name.removeprefix("grad/") for name in wanted if name.startswith("grad/")]
    kinds = {piece.parameter for piece in pieces_of(config.model) if piece.tensor in names}
    own = {p for p in name_leaves(model) if not p.startswith("mtp") and not p.endswith("bias")}
    assert kinds == own
    for name in names:
        gradient = wanted[f"grad/{name}"]
        atol = 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=atol, err_msg=name)
    if "mtp_logits" in wanted:
        [mtp_BTV] = output.mtp_logits
        np.testing.assert_allclose(mtp_BTV[:, :-1], wanted["mtp_logits"], rtol=0, atol=1e-4)
    else:
        assert output.mtp_logits == ()


def test_bf16_computes_as_well_as_transformers_does():
    wanted = golden("bf16")
    _, model = huggingface.load(GOLDEN / "bf16")
    bias, rest = {}, {}
    for name, leaf in name_leaves(model).items():
        (bias if name.endswith("router.bias") else rest)[name] = leaf.dtype
    assert set(bias.values()) == {jnp.dtype("float32")}
    assert set(rest.values()) == {jnp.dtype("bfloat16")}
    forward = jax.jit(lambda m, t: m(t).logits_BTV, compiler_options=UNOPTIMISED)
    logits = forward(model, wanted["tokens"])
    assert logits.dtype == jnp.bfloat16

    def error(logits):
        return np.median(np.abs(np.asarray(logits, np.float32) - wanted["logits"]))

    assert error(logits) < 1.5 * error(wanted["logits_stored"])


@pytest.mark.parametrize("case", CASES)
def test_tables_read_backwards_give_the_files(case):
    config, model = huggingface.load(GOLDEN / case)
    files = {}
    for file in (GOLDEN / case).glob("*.safetensors"):
        files |= load_file(file)
    tensors = in_hub_layout(config.model, name_leaves(model))
    for copy, main in hub.copies(config.model).items():
        tensors[copy] = tensors[main]
    assert tensors.keys() == files.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == files[name].dtype
        np.testing.assert_array_equal(tensor, files[name], name)


def test_precision_is_the_files_or_as_asked(folder):
    def halve(tensors):
        name = "model.layers.1.mlp.gate.weight"
        tensors[name] = tensors[name].astype(np.float16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)

    edit_tensors(folder, halve)
    _, model = huggingface.load(folder)
    assert model.head.w.dtype == jnp.float16
    assert model.moe.ffn.router.w.dtype == jnp.float32  # layer 2 is FP32
    _, model = huggingface.load(folder, dtype=jnp.bfloat16)
    assert model.head.w.dtype == model.norm.gain.dtype == jnp.bfloat16
    assert model.moe.ffn.router.bias.dtype == jnp.float32


PLACED = """
import sys
import jax, numpy as np
from pathlib import Path
from jax.sharding import NamedSharding, PartitionSpec as P
from dsv3.checkpoint import exporting, huggingface
from tests.checkpoint.folders import assert_same_tensors

folder, out, kind = sys.argv[1:]
types = (getattr(jax.sharding.AxisType, kind),) * 2
mesh = jax.make_mesh((2, 2), ("node", "local"), axis_types=types)

def place(name, shape):
    if ".routed." in name:
        return NamedSharding(mesh, P(*[None] * (len(shape) - 3), "node", None, "local"))
    if name == "head.w":
        return NamedSharding(mesh, P("local", ("node",)))
    return NamedSharding(mesh, P()) if "norm" in name else None

plain = huggingface.load(folder, "float32")[1]
config, model = huggingface.load(folder, "float32", place)
gate = model.moe.ffn.routed.gate[...]
assert gate.sharding == place("moe.ffn.routed.gate", gate.shape)
assert gate.addressable_shards[0].data.shape[1] == gate.shape[1] // 2
jax.tree.map(np.testing.assert_array_equal, plain, model)
exporting.export(exporting.of_model(config, model), out, dtype="float32")
assert_same_tensors(Path(folder), Path(out))
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_lands_sharded_on_a_mesh_and_is_exported_from_it(tmp_path, kind):
    command = [sys.executable, "-c", PLACED, GOLDEN / "mtp_sharded", tmp_path / "out", kind]
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(command, check=True, env=environment, cwd=GOLDEN.parents[1])


def test_reads_no_more_than_a_device_needs(monkeypatch):
    read = []

    def spy(self, target):
        read.append(target.tensor)
        return chunks(self, target)

    chunks = Weights._chunks
    monkeypatch.setattr(Weights, "_chunks", spy)
    found = Folder(GOLDEN / "mtp_sharded")
    read.clear()
    everything = [slice(None)] * 2
    part = found.read("moe.ffn.routed.up", (slice(1, 2), slice(3, 5), *everything), np.float32)
    assert read == [f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in (3, 4)]
    whole = found.read("moe.ffn.routed.up", (slice(None),) * 4, np.float32)
    np.testing.assert_array_equal(part, whole[1:2, 3:5])
    inside = (slice(0, 2), slice(4, 6), slice(5, 21), slice(2, 7))
    np.testing.assert_array_equal(
        found.read("moe.ffn.routed.up", inside, np.float32), whole[inside]
    )
