"""What a configuration costs on its mesh, before there is one: memory, messages, time, money.

    python -m dsv3.reporting.plan configs/deepseek_v3.py
    python -m dsv3.reporting.plan configs/v3_16b.py --set training.micro_batch=8 --out plan [--json]

The training step that would run is compiled for the devices that the configuration names, in a
process of its own and without an array (`compiled`). Each figure is one of three kinds:

    counted    read from the compiled program, or from how the state lies on the mesh
    derived    from the configuration: arithmetic; the rows that an even router sends. The program
               has buffers for the worst case and does not know how full they get
    assumed    a rate of `hardware`, and with it every time and every GPU-hour

Rows of tokens between devices: a hop's buffer is counted, what fills it is derived. Copies of a
token come from the model's own choice of experts on random scores, `SAMPLE` tokens of them.

Messages are what a device sends at least, a whole array of S bytes in a group of n: S (1 - 1/n) to
gather, scatter or exchange it, twice that to sum it. Of a group of N nodes with m members in each,
S (1 - 1/N) / m cross between nodes, S (1 - 1/N) where each member sends rows of its own.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dsv3 import counts
from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.cluster import Sizes
from dsv3.config import Bf16Dot, Config
from dsv3.errors import UserError, exits_cleanly
from dsv3.files import write_atomically
from dsv3.model.router import choose
from dsv3.parallel import mesh as meshes
from dsv3.parallel.shard import STACKS, path_of
from dsv3.reporting.compiled import TARGETS, Program, batch_of, compile_step
from dsv3.reporting.hardware import (
    REPORT_HOURS_PER_TRILLION,
    REPORT_HOURS_PRETRAINING,
    REPORT_PARAMETERS,
    TABLE,
    Hardware,
)
from dsv3.reporting.hlo import Collective
from dsv3.reporting.plan_pages import picture, text
from dsv3.sweeps import load_config
from dsv3.training import state as train_state

SAMPLE = 8192
LINKS = ("within_node", "between_nodes")  # also the names of their rates in `hardware`
EXCHANGES = ("all-to-all", "ragged-all-to-all")


def plan(config: Config, sizes: Sizes, program: Program, hardware: Hardware) -> dict[str, Any]:
    """All figures, as JSON has them; bytes and times are a device's unless they say otherwise."""
    copies = copies_of(config, sizes)
    tokens = batch_of(config) * config.training.sequence_length
    traffic = traffic_of(config, sizes, program.collectives, copies)
    return {
        "compiler": {"target": program.target, "seconds": program.seconds,
                     "host_bytes": program.host_bytes},
        "model": model_of(config),
        "mesh": sizes._asdict() | {"devices": sizes.devices,
                                   "transport": config.parallel.carried_by,
                                   "parameters": config.parallel.parameters},
        "batch": {"sequences": batch_of(config), "tokens": tokens,
                  "micro_batches": micro_batches(config),
                  "tokens_a_forward_pass": tokens_at_once(config, sizes)},
        "memory": memory_of(config, sizes, program, hardware),
        "collectives": traffic,
        "between_nodes": between_nodes(config, sizes, program.collectives, copies),
        "time": time_of(config, sizes, traffic, hardware),
    }  # fmt: skip


def model_of(config: Config) -> dict[str, Any]:
    model, length = config.model, config.training.sequence_length
    flops = counts.training_flops(model, length)
    return {
        "parameters": counts.parameters(model).total,
        "parameters_main": counts.parameters(model).main,
        "activated": counts.activated(model).total,
        "activated_main": counts.activated(model).main,
        "flops_a_token": flops,
        "flops_a_step": flops * length * batch_of(config),
    }


def micro_batches(config: Config) -> int:
    """Forward passes in a step."""
    return batch_of(config) // (config.training.micro_batch or batch_of(config))


def tokens_at_once(config: Config, sizes: Sizes) -> int:
    """Of a device, in a forward pass."""
    sequences = batch_of(config) // micro_batches(config) // sizes.data_ranks
    return sequences * config.training.sequence_length


# --- memory ------------------------------------------------------------------------------------


def memory_of(config: Config, sizes: Sizes, program: Program, hardware: Hardware) -> dict[str, Any]:
    """Bytes of a device; `ema` is in the host's memory and in no sum.

    `to_host` and `from_host` are copied in a step, as a GPU's program says; a CPU's has no copies.
    """
    mesh: Any = AbstractMesh(tuple(sizes), meshes.AXES)
    state = train_state.abstract(config, mesh)
    whole, gradients = gathered_bytes(config, mesh, state.params)
    lying = {"masters": bytes_of((state.params, state.router_bias)),
             "moments": bytes_of(state.moments)}  # fmt: skip
    total = sum(lying.values()) + program.temporary
    return lying | {
        "ema": bytes_of(state.ema),
        "to_host": copied(program, to_host=True),
        "from_host": copied(program, to_host=False),
        "gathered": whole,
        "gradients": gradients,
        "temporary": program.temporary,
        "total": total,
        "device": hardware.memory,
        "fits": total <= hardware.memory,
        "largest": [buffer._asdict() for buffer in program.buffers],
    }


def copied(program: Program, to_host: bool) -> int:
    """Bytes between a device and its host in a step, that way."""
    return sum(one.times * one.bytes for one in program.transfers if one.to_host == to_host)


def bytes_of(tree) -> int:
    """Of a device's part of abstract arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def gathered_bytes(config: Config, mesh: Mesh, params) -> tuple[int, int]:
    """What parameters take while they are used, and what their gradients do, both in FP32.

    Experts are a device's own, and cost nothing to gather where they are cut no further. Under
    'fsdp' one layer is whole at a time and its gradients are cut at once; what is in no stack stays
    whole, under 'zero1' everything.
    """
    sizes, fsdp = meshes.sizes_of(mesh), config.parallel.parameters == "fsdp"
    whole, gradients, layers = 0, 0, defaultdict(int)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_of(path)
        place = meshes.place_of(config, sizes, name, leaf.shape)
        here = 4 * leaf.size // math.prod(mesh.shape[axis] for axis in place.experts)
        used = here if place.cuts else 0
        if fsdp and name.startswith(STACKS):
            layers[name.split(".")[0]] += used // leaf.shape[0]
            gradients += bytes_of(leaf)
        else:
            whole += used
            gradients += here
    return whole + max(layers.values(), default=0), gradients


# --- messages ----------------------------------------------------------------------------------


def copies_of(config: Config, sizes: Sizes) -> dict[tuple[str, ...], float]:
    """By the axes of each hop, and flat: on how many ranks a token of an even router has experts,
    in the mean; ranks of a hop are those of all hops up to it."""
    moe = config.model.moe
    scores = jax.random.uniform(jax.random.key(0), (SAMPLE, moe.routed_experts))
    chosen_XK = np.asarray(choose(scores, jnp.zeros(moe.routed_experts), moe))

    def on(ranks: int) -> float:
        rank_XK = np.sort(chosen_XK // (moe.routed_experts // ranks), axis=1)
        return 1.0 + float((np.diff(rank_XK, axis=1) > 0).sum(axis=1).mean())

    hops, ranks = {}, 1
    for hop in meshes.hops_of(config, sizes):
        ranks *= hop.ranks
        hops[hop.axes] = on(ranks)
    return hops | {("flat",): on(ranks)}


def traffic_of(
    config: Config, sizes: Sizes, found: Sequence[Collective], copies: Mapping
) -> list[dict[str, Any]]:
    """One row for each kind of collective, by axes and dtype; bytes that a device sends in a step.

    `sent` is counted, `travels` what an even router fills of it; `within_node` and `between_nodes`
    divide the latter by link. `repeated` is whether each micro-batch does it again, `meanwhile` the
    FLOP of products that the program launches while it is under way; of a CPU's program, none.
    """
    mesh, at_once = sizes._asdict(), tokens_at_once(config, sizes)
    pieces = micro_batches(config)
    rows: dict[tuple, dict[str, Any]] = {}
    for one in found:
        repeated = pieces > 1 and one.times % pieces == 0
        key = (one.dynamic, one.kind, one.axes, one.dtype, repeated)
        row = rows.setdefault(key, {
            "kind": one.kind, "axes": list(one.axes), "dtype": one.dtype, "devices": one.group,
            "times": 0, "sent": 0.0, "travels": 0.0, "within_node": 0.0, "between_nodes": 0.0,
            "dynamic": one.dynamic, "repeated": repeated, "meanwhile": 0.0,
        })  # fmt: skip
        share = filled(one, at_once, copies)
        within, between = links(one, mesh)
        row["times"] += one.times
        row["meanwhile"] += one.times * one.meanwhile
        row["sent"] += one.times * one.sent
        row["travels"] += one.times * one.sent * share
        row["within_node"] += one.times * within * share
        row["between_nodes"] += one.times * between * share
    return sorted(rows.values(), key=lambda row: (row["dynamic"], -row["travels"]))


def filled(one: Collective, tokens: int, copies: Mapping) -> float:
    """The share of a collective's buffer that an even router fills: 1 but for exchanges of rows.

    Later passes, which only an uneven router needs, count as full.
    """
    if one.kind not in EXCHANGES or one.dynamic or one.axes not in copies:
        return 1.0
    return tokens * copies[one.axes] / one.rows


def links(one: Collective, mesh: Mapping[str, int]) -> tuple[float, float]:
    """Bytes that a device sends within its node, and to others."""
    members = mesh["local"] if "local" in one.axes else 1
    nodes = one.group / members
    if one.kind in EXCHANGES:
        return one.whole * (1 / nodes - 1 / one.group), one.whole * (1 - 1 / nodes)
    if one.kind == "collective-permute":
        return (one.sent, 0.0) if one.axes == ("local",) else (0.0, one.sent)
    twice = 2 if one.kind == "all-reduce" else 1
    within = one.sent if members > 1 else 0.0
    return within, twice * one.whole * (1 - 1 / nodes) / members


def between_nodes(
    config: Config, sizes: Sizes, found: Sequence[Collective], copies: Mapping
) -> dict[str, Any] | None:
    """Bytes of a token's rows that leave its node, all layers and passes of a step together.

    None where experts are within one node. `buffers` is counted, the rest is rows as wide as the
    program's times copies: derived for an even router, bounded for any, and as a flat way would.
    """
    crossing = [one for one in found
                if one.kind in EXCHANGES and "node" in one.axes and not one.dynamic]  # fmt: skip
    if not crossing:
        return None
    hop = next(hop for hop in meshes.hops_of(config, sizes) if "node" in hop.axes)
    away, at_once = 1 - 1 / sizes.node, tokens_at_once(config, sizes)
    a_copy = sum(one.times * one.whole / one.rows for one in crossing) / micro_batches(config)
    buffers = sum(one.times * one.whole for one in crossing) / micro_batches(config) / at_once
    return {
        "bytes_of_a_copy": a_copy,
        "copies": copies[hop.axes] * away,
        "copies_at_most": min(hop.copies, hop.ranks),
        "flat_copies": copies[("flat",)] * away,
        "bytes": a_copy * copies[hop.axes] * away,
        "bytes_at_most": a_copy * min(hop.copies, hop.ranks),
        "flat_bytes": a_copy * copies[("flat",)] * away,
        "buffers": buffers * away,
    }


# --- time --------------------------------------------------------------------------------------


def time_of(
    config: Config, sizes: Sizes, traffic: Sequence[Mapping], hardware: Hardware
) -> dict[str, Any]:
    """Seconds of a step and GPU-hours, between everything overlapped and nothing.

    `as_compiled` is this program, in which the ranks of `pipe` all compute everything. `pipelined`
    is what would be left for each, were layers divided among them: compute and exchanges divided,
    parameters gathered and gradients scattered once a step and not for each micro-batch, no bubble.
    """
    model, length = config.model, config.training.sequence_length
    attention = counts.attention_flops(model, length)
    head = 6.0 * (1 + model.mtp_depths) * counts.parameters(model).head
    high = attention + head  # never in FP8
    linear = counts.training_flops(model, length) - high
    rate = hardware.bf16 if model.dot == Bf16Dot() else hardware.fp8
    tokens = batch_of(config) * length
    seconds = (linear / rate + high / hardware.bf16) / hardware.efficiency
    compute = seconds * tokens / sizes.data_ranks
    certain = [row for row in traffic if not row["dynamic"]]

    def spent(products: float, share: Callable[[Mapping], float]) -> dict[str, float]:
        sent = {link: sum(row[link] * share(row) for row in certain) for link in LINKS}
        parts = {link: sent[link] / getattr(hardware, link) for link in LINKS}
        return _hours(config, sizes, tokens, {"compute": products} | parts)

    def of_a_stage(row: Mapping) -> float:
        once = row["repeated"] and row["kind"] not in EXCHANGES
        return 1 / (sizes.pipe * (micro_batches(config) if once else 1))

    report = None
    if counts.parameters(model).main == REPORT_PARAMETERS:
        reached = counts.training_flops(model, length) * 1e12 / REPORT_HOURS_PER_TRILLION / 3600
        report = {"hours_a_trillion": REPORT_HOURS_PER_TRILLION, "flops_a_second": reached,
                  "hours": REPORT_HOURS_PRETRAINING}  # fmt: skip
    return {
        "hardware": hardware._asdict(),
        "as_compiled": spent(compute, lambda row: 1.0),
        "pipelined": spent(compute / sizes.pipe, of_a_stage) if sizes.pipe > 1 else None,
        "report": report,
    }


def _hours(config: Config, sizes: Sizes, tokens: int, parts: dict[str, float]) -> dict[str, float]:
    best, worst = max(parts.values()), sum(parts.values())
    trillion = sizes.devices / tokens * 1e12 / 3600
    run = config.training.tokens / 1e12
    return parts | {
        "overlapped": best, "in_turn": worst,
        "hours_a_trillion": best * trillion, "hours_a_trillion_in_turn": worst * trillion,
        "hours": best * trillion * run, "hours_in_turn": worst * trillion * run,
    }  # fmt: skip


# --- the command -------------------------------------------------------------------------------


def sizes_of(config: Config, devices: int | None) -> Sizes:
    """The mesh; where `parallel.replica` is open, of so many devices or of one replica."""
    run = config.parallel
    least = run.pipe * (run.replica or 1) * run.node * run.local
    return run.sizes(least if devices is None else devices)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_bindings()
    parser.add_argument("--devices", type=int, help="where parallel.replica leaves it open")
    parser.add_argument("--for", choices=TARGETS, default="cpu", dest="target",
                        help="virtual CPU devices, or an H200")  # fmt: skip
    parser.add_argument("--hardware", choices=TABLE, help="rates and memory; h800, or as compiled")
    parser.add_argument("--out", type=Path, help="a folder for plan.json, plan.txt and plan.png")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    options = parser.parse_args(arguments)
    config = apply(load_config(options.config), options.set)
    sizes = sizes_of(config, options.devices)
    abstract: Any = AbstractMesh(tuple(sizes), meshes.AXES)
    meshes.require_even_batches(config, abstract)
    if options.out and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is not a folder")
    name = options.hardware or ("h800" if options.target == "cpu" else options.target)
    program = compile_step(options.config, options.set, sizes.devices, options.target)
    figures = plan(config, sizes, program, TABLE[name])
    as_json = json.dumps(figures, indent=1) + "\n"
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out / "plan.json", as_json)
        write_atomically(options.out / "plan.txt", text(figures))
        write_atomically(options.out / "plan.png", picture(figures))
    print(as_json if options.json else text(figures), end="")


if __name__ == "__main__":
    main()
