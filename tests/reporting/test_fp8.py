"""FP8 watched in a run: every linear map, on the line of its step, and the run none the wiser."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train as train_module
from dsv3.bindings import apply
from dsv3.config import Fp8Dot
from dsv3.data.prepare import prepare
from dsv3.errors import ConfigError
from dsv3.numerics.watch import OPERANDS, TALLIES
from dsv3.parallel import mesh as meshes
from dsv3.reporting.formats import products
from dsv3.reporting.fp8 import FIGURES, described, make_watch, watching
from dsv3.reporting.fp8_plots import axes_of, fp8_figures, values_of
from dsv3.reporting.metrics import read_metrics
from dsv3.training import state as train_state
from dsv3.training.step import make_step
from tests.training.small import CONFIG, tokens

FP8 = apply(CONFIG, {"model.dot": "fp8"})
# one stack of MoE blocks: to compile more kinds would cost more and show no more
RUN = apply(FP8, {"model.dense_layers": 0, "model.layers": 2, "model.mtp_depths": 0,
                  "training.micro_batch": 2, "training.ema_decay": None})  # fmt: skip


MESH = meshes.build(RUN.parallel)


def in_fp8(config):
    return {p.name: p.shape for p in products(config.model) if "e4m3" in p.formats.fprop}


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("watched")
    asked = {"reporting.fp8_every": 2, "reporting.every": 3, "reporting.plots": True}
    train_module.train(apply(RUN, asked), workdir, steps=4)
    return workdir


def test_every_linear_map_is_on_the_lines_that_were_asked_for(watched_run):
    rows = read_metrics(watched_run)
    assert [(row["step"], "fp8" in row) for row in rows] == [
        (1, False), (2, True), (3, False), (4, True),
    ]  # fmt: skip
    found = rows[1]["fp8"]
    assert found.keys() == in_fp8(RUN).keys()
    for operands in found.values():
        assert tuple(operands) == OPERANDS
        for figures in operands.values():
            assert tuple(figures) == FIGURES
            assert all(len(per_layer) == 2 for per_layer in figures.values())
            assert all(0.001 < x < 0.1 for x in figures["error"])
            assert all(0 <= x < 0.1 for x in figures["underflow"] + figures["saturation"])
    routed, o = found["moe.ffn.routed.gate"], found["moe.attention.o"]
    for exponents in (routed["activation"], o["activation"]):  # powers of two (§3.3.3)
        assert all(x % 1 == 0 for x in exponents["scale_min"] + exponents["scale_max"])
    assert any(x % 1 for x in found["moe.ffn.shared.gate"]["activation"]["scale_min"])
    assert rows[1]["fp8"] != rows[3]["fp8"]
    assert {p.name for p in (watched_run / "plots").iterdir()} >= {"fp8.png", "fp8_steps.png"}


def test_a_batch_cut_over_a_mesh_is_watched_on_one_device(monkeypatch):
    config = apply(FP8, {"parallel.replica": 8, "reporting.fp8_every": 1})
    mesh = meshes.build(config.parallel)
    batch = jax.device_put(tokens(0), meshes.batch_sharding(mesh))
    state = SimpleNamespace(params=batch, router_bias=None, sequences=jnp.uint32(0))
    monkeypatch.setattr("dsv3.reporting.fp8.make_watch", lambda config: lambda *given: given)
    step = watching(config, mesh, lambda state, batch: (state, {}), 0)
    (params, _, _), part = step(state, batch)[1]["fp8"]
    assert len(params.devices()) == 1 and params.devices() == part.devices()
    np.testing.assert_array_equal(part, batch[:1])


def test_watching_changes_no_number(watched_run, tmp_path):
    train_module.train(RUN, tmp_path, steps=4)
    plain = {row["step"]: row for row in read_metrics(tmp_path)}
    for row in read_metrics(watched_run):
        for name in ("loss", "grad_norm", "max_violation", "lr"):
            assert row[name] == plain[row["step"]][name]


def test_watched_are_the_operands_of_the_step(watched_run):
    """The first micro-batch's: what is counted of a weight is the weight that the step has."""
    state = train_state.create(RUN)
    of_state = state.params, state.router_bias, state.sequences
    tallies = make_watch(RUN)(of_state, np.asarray(tokens(0))[:2])
    counts = np.asarray(tallies["moe.attention.q_a"])[:, 0, :, TALLIES.index("nonzero")]
    w = state.params["moe"]["attention"]["q_a"]["w"][...]
    assert (counts[:, OPERANDS.index("weight")] == w[0].size).all()
    two_sequences = 2 * 16 * RUN.model.width
    assert (counts[:, OPERANDS.index("activation")] == two_sequences).all()


def test_the_log_of_a_run_names_the_backend():
    said = []
    train_module.describe_run(RUN, MESH, prepare(RUN), said.append)
    assert "dot rule 'fp8' (backend 'reference') in float32 on cpu" in said[1]


def test_nobody_asked():
    step = make_step(FP8)
    assert watching(FP8, MESH, step, 0) is step


def test_all_kinds_of_layers_are_named_as_in_the_table_of_formats():
    config = apply(
        FP8, {"reporting.fp8_every": 1, "model.mtp_depths": 2, "model.dot.groups": "tensor"}
    )
    state = jax.eval_shape(lambda: train_state.create(config))
    of_state = state.params, state.router_bias, state.sequences
    tallies = jax.eval_shape(make_watch(config), of_state, tokens(0))
    assert tallies.keys() == in_fp8(FP8).keys() | {
        name.replace("mtp.0", "mtp.1") for name in in_fp8(FP8) if name.startswith("mtp")
    }
    for name, shape in in_fp8(FP8).items():
        layers = shape[0] if name[:3] != "mtp" else 1
        experts = CONFIG.model.moe.routed_experts if "routed" in name else 1
        assert tallies[name].shape == (layers, experts, len(OPERANDS), len(TALLIES))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model.dot": "bf16", "reporting.fp8_every": 2}, "model.dot"),
        ({"reporting.fp8_every": 0}, "must be positive"),
    ],
)
def test_bad_input(values, complaint):
    with pytest.raises(ConfigError, match=f"reporting.fp8_every.*{complaint}"):
        apply(FP8, values)


def test_a_weight_without_room_for_a_report_is_named():
    model = dataclasses.replace(RUN.model, dot=Fp8Dot(), width=2)
    with pytest.raises(ConfigError, match=r"35 numbers, and moe.*\(\d+, \d+\)"):
        make_watch(dataclasses.replace(RUN, model=model))


def tallies(**values):
    """One map of two layers and three experts, of which the last has no tokens."""
    tally = np.ones((2, 3, len(OPERANDS), len(TALLIES)), np.float32)
    tally[:, 2, :, :5], tally[:, 2, :, 5], tally[:, 2, :, 6] = 0, np.inf, -np.inf
    for name, value in values.items():
        tally[0, :2, :, TALLIES.index(name)] = value
    return tally


def test_figures_are_of_all_experts_together_and_null_where_nothing_was():
    found = described({
        "moe.a": tallies(nonzero=[[10], [30]], underflow=[[1], [3]], scale_min=[[-4], [-9]]),
        "moe.b": np.where(np.arange(3)[:, None, None] == 2, tallies(), np.nan),
    })  # fmt: skip
    activation = found["moe.a"]["activation"]
    assert activation["underflow"] == [0.1, 1.0] and activation["scale_min"] == [-9.0, 1.0]
    assert activation["scale_max"] == [1.0, 1.0]
    assert found["moe.b"]["weight"] == {figure: [None, None] for figure in FIGURES}
    figures = fp8_figures([{"step": 7, "fp8": found}])
    assert list(figures) == ["fp8.png", "fp8_steps.png"] and fp8_figures([{"step": 7}]) == {}


def test_the_heat_map_has_a_place_for_each_layer_of_each_kind():
    one, two = (
        {o: dict.fromkeys(FIGURES, [float(i)] * n) for o in OPERANDS} for i, n in ((1, 1), (2, 2))
    )
    found = {"moe.o": two, "dense.o": one, "dense.ffn.up": one, "mtp.0.block.o": one}
    assert axes_of(found) == (["o", "ffn.up"], ["d0", "m0", "m1", "p0"])
    np.testing.assert_array_equal(
        values_of(found, "weight", "error"), [[1, 2, 2, 1], [1] + [np.nan] * 3]
    )
    assert jnp.nanmax(values_of(found, "weight", "range")) == 0
