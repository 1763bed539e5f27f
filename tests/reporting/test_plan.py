"""The plan of a small model on 2 x 2 x 2 devices: each figure against another way to find it."""

import dataclasses
import json
import math
import subprocess
import sys

import jax
import pytest

from dsv3 import counts
from dsv3.bindings import Binding
from dsv3.config import Config, Parallel
from dsv3.errors import UserError
from dsv3.parallel import mesh as meshes
from dsv3.parallel.shard import path_of
from dsv3.reporting import compiled, hardware, plan
from dsv3.reporting.plan_pages import picture, text
from dsv3.sweeps import load_config
from dsv3.training import state as train_state
from tests.training.small import CONFIG

SIZES = {"pipe": 1, "replica": 2, "node": 2, "local": 2}
MICRO_BATCHES = 2
FILE = """
import dataclasses
from dsv3.config import Parallel, Phase
from tests.training.small import CONFIG

def get_config():
    training = dataclasses.replace(
        CONFIG.training, batch=(Phase("constant", 1, 16),), batch_increment=16, micro_batch=8,
        compute_dtype="bfloat16",
    )
    parallel = Parallel(replica=2, node=2, local=2)
    return dataclasses.replace(CONFIG, training=training, parallel=parallel)
"""


def configuration() -> Config:
    scope: dict = {}
    exec(FILE, scope)
    return scope["get_config"]()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What the command prints as JSON, and the folder that it fills."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "small.py").write_text(FILE)
    done = command(folder / "small.py", "--json", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder / "out"


def command(*arguments):
    line = [sys.executable, "-m", "dsv3.reporting.plan", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_it_writes_what_it_prints(planned):
    figures, folder = planned
    assert json.loads((folder / "plan.json").read_text()) == figures
    assert (folder / "plan.txt").read_text() == text(figures)
    assert (folder / "plan.png").read_bytes() == picture(figures)
    assert picture(figures).startswith(b"\x89PNG")


def test_the_page_has_every_part(planned):
    figures, _ = planned
    page = text(figures)
    for words in (
        "replica 2 · node 2 · local 2 = 8 devices",
        "moments",
        "all-to-all",
        "a flat all-to-all",
        "GPU-hours a trillion",
        "fits the 80 GB of an H800",
    ):
        assert words in page
    assert "further pass" not in page  # `expert_rows` is not bound


def test_parameters_and_arithmetic_are_the_counted(planned):
    figures, _ = planned
    config, model = configuration(), figures["model"]
    assert model["parameters"] == counts.parameters(config.model).total
    assert model["activated"] == counts.activated(config.model).total
    assert model["flops_a_token"] == counts.training_flops(config.model, 16)
    assert model["flops_a_step"] == 16 * 16 * model["flops_a_token"]


def test_the_state_takes_what_a_real_one_takes(planned):
    figures, _ = planned
    if jax.device_count() < 8:
        pytest.skip("wants 8 devices")
    config = configuration()
    state = train_state.create(config, meshes.build(config.parallel, jax.devices()[:8]))

    def on_a_device(tree):
        return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(tree))

    memory = figures["memory"]
    assert memory["masters"] == on_a_device((state.params, state.router_bias))
    assert memory["moments"] == on_a_device(state.moments)
    assert memory["ema"] == on_a_device(state.ema)
    assert memory["total"] == memory["masters"] + memory["moments"] + memory["temporary"]
    assert memory["temporary"] > memory["gathered"] > 4 * state.params["head"]["w"].size


def test_every_parameter_is_gathered_and_scattered_once_a_step(planned):
    figures, _ = planned
    config = configuration()
    mesh = jax.sharding.AbstractMesh(tuple(SIZES.values()), meshes.AXES)
    params = train_state.abstract(config, mesh).params
    expected = {("all-gather", "bf16"): 0.0, ("all-gather", "f32"): 0.0,
                ("reduce-scatter", "f32"): 0.0}  # fmt: skip
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = meshes.place_of(config, meshes.sizes_of(mesh), path_of(path), leaf.shape)
        grown = math.prod(leaf.sharding.shard_shape(leaf.shape))
        wire, width = ("f32", 4) if place.wire == "float32" else ("bf16", 2)
        for _, axes in place.cuts:
            ranks = math.prod(mesh.shape[axis] for axis in axes)
            grown *= ranks
            expected["all-gather", wire] += width * grown * (1 - 1 / ranks)
            expected["reduce-scatter", "f32"] += 4 * grown * (1 - 1 / ranks)
    for (kind, dtype), size in expected.items():
        rows = [row for row in figures["collectives"]
                if row["kind"] == kind and row["dtype"] == dtype]  # fmt: skip
        assert sum(row["sent"] for row in rows) == pytest.approx(size)
        assert not any(row["repeated"] for row in rows)


def test_tokens_cross_once_a_layer_and_micro_batch_each_way(planned):
    figures, _ = planned
    layers = CONFIG.model.moe_layers + CONFIG.model.mtp_depths
    tokens, width, chosen = 16, CONFIG.model.width, CONFIG.model.moe.experts_per_token
    for axes, entering in ((["node"], tokens), (["local"], 2 * tokens)):
        rows = {row["dtype"]: row for row in figures["collectives"]
                if row["kind"] == "all-to-all" and row["axes"] == axes}  # fmt: skip
        times = layers * MICRO_BATCHES
        # tokens and sums, their gradients; gates and theirs; the numbers of experts forward only
        assert [rows[d]["times"] for d in ("bf16", "f32", "s32")] == [4 * times, 2 * times, times]
        assert rows["bf16"]["sent"] == 0.5 * 2 * entering * 2 * 4 * width * times
        assert rows["f32"]["sent"] == 0.5 * 2 * entering * 4 * 2 * chosen * times
        assert all(row["repeated"] and not row["dynamic"] for row in rows.values())


def test_an_even_router_fills_part_of_the_buffers(planned):
    figures, _ = planned
    between, config = figures["between_nodes"], configuration()
    copies = plan.copies_of(config, config.parallel.sizes(8))
    assert 1 < copies["node",] < 2 and copies["local",] == copies["flat",] > copies["node",]
    a_copy = 3 * (2 * 4 * 32 + 4 * 2 * 2 + 4 * 2)  # 3 layers; the rows of the test above, in bytes
    assert between["bytes_of_a_copy"] == a_copy
    assert between["bytes"] == pytest.approx(a_copy * copies["node",] / 2)
    assert between["bytes"] < between["bytes_at_most"] == 2 * a_copy
    assert between["bytes"] < between["flat_bytes"] == pytest.approx(a_copy * copies["flat",] / 2)
    exchanged = [row for row in figures["collectives"] if row["kind"] == "all-to-all"]
    for row in exchanged:
        assert row["travels"] < row["sent"]
        assert row["within_node"] + row["between_nodes"] == pytest.approx(row["travels"])
    crossing = sum(row["between_nodes"] for row in exchanged)
    assert crossing == pytest.approx(between["bytes"] * 16 * MICRO_BATCHES)


def test_fp8_travels_as_such(tmp_path):
    (tmp_path / "small.py").write_text(FILE)
    bindings = {"model.dot": "fp8", "model.layers": 1, "model.dense_layers": 0,
                "model.mtp_depths": 0, "parallel.replica": 1, "parallel.node": 1}  # fmt: skip
    bound = [Binding(path, value) for path, value in bindings.items()]
    program = compiled.compile_step(str(tmp_path / "small.py"), bound, 2, "cpu")
    exchanged = {one.dtype for one in program.collectives if one.kind == "all-to-all"}
    assert exchanged == {"f8e4m3fn", "bf16", "f32", "s32"}


def test_the_16b_model_fits_8_devices_of_80_gb():
    config = load_config("configs/v3_16b.py")
    program = compiled.compile_step("configs/v3_16b.py", [], 8, "cpu")
    memory = plan.memory_of(config, config.parallel.sizes(8), program, hardware.H800)
    assert memory["fits"] and 60e9 < memory["total"] < 70e9


def test_copies_of_a_token_are_its_distinct_ranks():
    # One group of 8 experts, one for each rank, 2 chosen of them: always 2 ranks, and with 2 ranks
    # of 4 experts the second is elsewhere in 4 cases of 7.
    moe = dataclasses.replace(CONFIG.model.moe, groups=1, groups_per_token=1)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, moe=moe))

    def flat(**parallel):
        laid = dataclasses.replace(config, parallel=Parallel(**parallel))
        return plan.copies_of(laid, laid.parallel.sizes(math.prod(parallel.values())))["flat",]

    assert flat(local=8) == 2.0
    assert flat(local=2) == pytest.approx(1 + 4 / 7, abs=0.03)  # 8192 draws: 0.005 of deviation
    assert flat(replica=2) == 1.0


def test_hours_follow_from_seconds(planned):
    figures, _ = planned
    time, tokens = figures["time"], 16 * 16
    spent = time["as_compiled"]
    rate = hardware.H800_BF16 * hardware.EFFICIENCY
    assert spent["compute"] == pytest.approx(figures["model"]["flops_a_step"] / 8 / rate)
    crossing = sum(row["between_nodes"] for row in figures["collectives"] if not row["dynamic"])
    assert spent["between_nodes"] == pytest.approx(crossing / hardware.H800_INFINIBAND)
    assert spent["hours_a_trillion"] == pytest.approx(
        spent["overlapped"] * 8 / 3600 * 1e12 / tokens
    )
    assert spent["hours"] == pytest.approx(
        spent["hours_a_trillion"] * CONFIG.training.tokens / 1e12
    )
    assert time["pipelined"] is None and time["report"] is None


# --- errors ------------------------------------------------------------------------------------

WRONG = [
    (["configs/nothing.py"], "configs/nothing.py"),
    (["configs/v3_16b.py", "--devices", "12"], "parallel.local"),
    (["configs/deepseek_v3.py", "--devices", "100"], "parallel.replica = 2 does not fit"),
    (["configs/deepseek_v3.py", "--set", "parallel.replica=3"], "training.micro_batch = 128"),
    (["configs/deepseek_v3.py", "--set", "parallel.nodes=3"], "parallel.node"),
    (["configs/tiny.py", "--out", "README.md"], "--out README.md is not a folder"),
    (["configs/tiny.py", "--for", "h100"], "h200"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[named for _, named in WRONG])
def test_what_cannot_be_planned_is_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and named in lines[0]


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compiled, "WHEELS", ("no_such_plugin", "no_such.cuda"))
    with pytest.raises(UserError, match="--for h200 wants jax-cuda13-plugin"):
        compiled.compile_step("configs/tiny.py", [], 1, "h200")


@pytest.mark.parametrize(
    ("script", "said"),
    [("kill -SEGV $$", "ended with SIGSEGV"), ("echo out of memory >&2; exit 1", "out of memory"),
     ("echo 'error: no such thing' >&2; exit 2", "^no such thing")],
)  # fmt: skip
def test_a_compiler_that_dies_is_reported(script, said, tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiled.sys, "executable", str(broken))
    with pytest.raises(UserError, match=said):
        compiled.compile_step("configs/tiny.py", [], 1, "cpu")


def pipelined():
    """The figures of time where two pipeline ranks share two micro-batches of two exchanges."""
    config = dataclasses.replace(configuration(), parallel=Parallel(pipe=2, local=4))
    exchange = {"kind": "all-to-all", "dynamic": False, "repeated": True, "within_node": 160e9,
                "between_nodes": 0.0}  # fmt: skip
    gather = exchange | {"kind": "all-gather", "within_node": 0.0, "between_nodes": 200e9}
    unlikely = exchange | {"dynamic": True}
    sizes = config.parallel.sizes(8)
    return plan.time_of(config, sizes, [exchange, gather, unlikely], hardware.H800)


def test_a_pipeline_divides_what_its_ranks_repeat():
    now, then = pipelined()["as_compiled"], pipelined()["pipelined"]
    assert (now["within_node"], now["between_nodes"]) == (1.0, 4.0)
    assert (then["within_node"], then["between_nodes"]) == (0.5, 4.0 / 2 / MICRO_BATCHES)
    assert then["compute"] == now["compute"] / 2
    assert now["overlapped"] == 4.0 and now["in_turn"] == pytest.approx(5.0, abs=1e-3)
