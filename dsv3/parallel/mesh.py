"""Devices: the only room that asks which there are, and the one table of how arrays lie on them.

A run has one mesh of four axes (`cluster.Parallel`). `build` makes it from the devices at hand, or
from any others that it is handed, virtual ones for instance. A parameter, its moments and its
average lie alike: matrices are cut over every axis of the mesh (ZeRO), routed experts first by
expert over the expert axes. Each axis goes to one of a matrix's two dimensions, the one that is
cut already if it divides it, else the longer one that it divides; to none, if it divides neither,
and then that axis holds copies. Matrices of few numbers, gains and router biases are everywhere:
gathering them would cost more than it saves.

What is rarely read and large, the average of the parameters, lives in host memory (§3.2.3).
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from dsv3.cluster import Parallel, Sizes
from dsv3.config import Bf16Dot, Config
from dsv3.errors import ConfigError
from dsv3.numerics import attention, dot
from dsv3.parallel.exchange import Hop
from dsv3.parallel.processes import compiled_together
from dsv3.parallel.shard import Place, Shard, path_of

AXES = Sizes._fields
WHOLE_BELOW = 2**16  # numbers; a smaller matrix is not cut
DATA = ("replica", "node", "local")  # the axes over which a batch is cut
EXPERTS = ("node", "local")  # ... and routed experts

# What XLA is asked for besides: GPUs else run transport and products one after the other.
COMPILER = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}

WAYS = {"local": (), "all_to_all": (EXPERTS,), "node_limited": (("node",), ("local",))}


class Rule(NamedTuple):
    pattern: str  # found in the path of a parameter, the first that is
    matrix: bool  # cut along its last two dimensions
    by_expert: bool  # dimension -3 counts experts
    wire: str | None  # the dtype it travels in; None is the one its products multiply


TABLE = (
    Rule(r"\brouted\.\w+$", matrix=True, by_expert=True, wire=None),
    Rule(r"\brouter\.w$", matrix=True, by_expert=False, wire="float32"),
    Rule(r"\b(w|table)$", matrix=True, by_expert=False, wire=None),
    Rule(r"", matrix=False, by_expert=False, wire="float32"),
)


def build(parallel: Parallel, devices: list | None = None) -> Mesh:
    """The mesh over `devices`, all there are unless told otherwise; one device is always at hand.

    Raises ConfigError where `parallel` does not multiply out to them.
    """
    devices = jax.devices() if devices is None else devices
    if parallel.replica is not None and jax.process_count() == 1:
        alone = parallel.pipe * parallel.replica * parallel.node * parallel.local == 1
        devices = devices[:1] if alone else devices
    sizes = parallel.sizes(len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """For `jax.jit` of what runs on the mesh."""
    return COMPILER.get(mesh.devices.flat[0].platform)


def require_even_batches(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError where a batch or micro-batch of `config` cannot be cut evenly."""
    training, ranks = config.training, sizes_of(mesh).data_ranks
    for name in ("batch_increment", "micro_batch"):
        value = getattr(training, name)
        if value is not None and value % ranks:
            raise ConfigError(
                f"training.{name} = {value} does not divide over parallel.replica · node · local "
                f"= {ranks} devices"
            )


def sizes_of(mesh: Mesh) -> Sizes:
    return Sizes(*(mesh.shape[axis] for axis in AXES))


def place_of(config: Config, sizes: Sizes, name: str, shape: tuple[int, ...]) -> Place:
    """Where the parameter of that name and shape lies, or a moment or average of it."""
    rule = next(rule for rule in TABLE if re.search(rule.pattern, name))
    axes = [axis for axis, size in zip(AXES, sizes, strict=True) if size > 1]
    owned = ()
    if rule.by_expert and config.parallel.carried_by != "local":
        owned = tuple(axis for axis in axes if axis in EXPERTS)
    cuts: dict[int, tuple[str, ...]] = {}
    rest = []
    cut = rule.matrix and (rule.by_expert or math.prod(shape[-2:]) >= WHOLE_BELOW)
    left = {dimension: shape[dimension] for dimension in (-1, -2)} if cut else {}
    for axis in (axis for axis in axes if axis not in owned):
        size = getattr(sizes, axis)
        fitting = [dimension for dimension, length in left.items() if length % size == 0]
        if not fitting:
            rest.append(axis)
            continue
        best = max(fitting, key=lambda dimension: (dimension in cuts, left[dimension]))
        cuts[best] = (*cuts.get(best, ()), axis)
        left[best] //= size
    multiplied = config.training.compute_dtype if config.model.dot == Bf16Dot() else "float32"
    return Place(owned, tuple(cuts.items()), tuple(rest), rule.wire or multiplied)


def shardings(config: Config, mesh: Mesh, state):
    """For every array of a state, or of anything that holds parameters by their names."""

    def one(path, leaf):
        place = place_of(config, sizes_of(mesh), path_of(path), leaf.shape)
        return NamedSharding(mesh, place.spec(len(leaf.shape)))

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of tokens [B, S]: every device has B / data ranks of the sequences."""
    return NamedSharding(mesh, jax.P(DATA))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Of what every device holds whole."""
    return NamedSharding(mesh, jax.P())


def in_host_memory(sharding):
    """The tree of shardings in the pinned host memory of the same devices."""
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), sharding)


def shard_of(config: Config, mesh: Mesh, params) -> Shard:
    """What the model's code on one device of the mesh has to know; `params` may be abstract."""
    sizes = sizes_of(mesh)
    if sizes.devices == 1:
        return Shard()
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    places = tuple(
        (path_of(path), place_of(config, sizes, path_of(path), leaf.shape)) for path, leaf in leaves
    )
    return Shard(
        mesh=mesh,
        size=sizes.devices,
        data_ranks=sizes.data_ranks,
        data=DATA,
        hops=hops_of(config, sizes),
        expert_rows=config.parallel.expert_rows,
        places=places,
        by_layer=config.parallel.parameters == "fsdp",
    )


def hops_of(config: Config, sizes: Sizes) -> tuple[Hop, ...]:
    """The way of a token to its experts."""
    moe, hops = config.model.moe, []
    for axes in WAYS[config.parallel.carried_by]:
        axes = tuple(axis for axis in axes if getattr(sizes, axis) > 1)
        ranks = math.prod(getattr(sizes, axis) for axis in axes)
        copies = min(ranks, moe.experts_per_token)
        if axes == ("node",) and moe.groups % ranks == 0:
            copies = min(copies, moe.groups_per_token)
        if axes:
            hops.append(Hop(axes, ranks, copies))
    return tuple(hops)


def describe(config: Config, mesh: Mesh) -> str:
    """The devices of a run in words."""
    if mesh.size == 1:
        others = jax.device_count() - 1
        return f"{platform()}" + (f", 1 of {others + 1} devices (see parallel)" if others else "")
    axes = " · ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    run = config.parallel
    return f"{mesh.size} x {platform()}: {axes}; experts {run.carried_by}, {run.parameters}"


def on_one_device(tree, mesh: Mesh):
    """The arrays of `tree`, cut over `mesh`, whole on this process's first device."""
    device = jax.local_devices()[0]
    if jax.process_count() == 1:
        return jax.device_put(tree, device)
    return jax.tree.map(
        lambda x: jax.device_put(x.addressable_data(0), device), _gather(mesh)(tree)
    )


def on_host(tree):
    """The arrays of `tree` in numpy; those that several processes have parts of, in all of them."""
    leaves = jax.tree.leaves(tree)
    if all(leaf.is_fully_addressable for leaf in leaves):
        return jax.tree.map(np.asarray, tree)
    whole = _gather(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


@functools.cache
def _gather(mesh: Mesh):
    """One program: transfers of their own would meet in another order in each process, and wait."""
    return compiled_together(jax.jit(lambda tree: tree, out_shardings=everywhere(mesh)))


def on_this_platform(config: Config) -> Config:
    """`config` with the choices made that it leaves to the platform: what multiplies.

    Runs are written down with the choice left open, so that they go on elsewhere as well.
    """
    model = config.model
    chosen = {
        "dot": dot.placed(model.dot, accelerator(), model.moe.block),
        "mla": attention.placed(model.mla, _machine(config)),
    }
    return replace(config, model=replace(model, **chosen))


def backends(config: Config) -> str:
    """What multiplies on this platform and, where that was left to it, why nothing better does.

    A CPU's own is the best that there is for it.
    """
    asked, model, machine = config.model, on_this_platform(config).model, _machine(config)
    products = [("mosaic", dot.obstacle(asked.dot, machine.platform, model.moe.block))]
    cores = [(name, attention.obstacle(name, asked.mla, machine)) for name in attention.PREFERRED]
    over = [
        (name, attention.decoding_obstacle(name, asked.mla, machine))
        for name in attention.PREFERRED_DECODING
    ]
    chosen = (
        ("products", asked.dot.backend, model.dot.backend, products),
        ("attention", asked.mla.attention, model.mla.attention, cores),
        ("decoding", asked.mla.decoding, model.mla.decoding, over),
    )
    best = machine.platform == "cpu"
    return ", ".join(
        _said(what, asked, taken, () if best else why) for what, asked, taken, why in chosen
    )


def _said(what: str, asked: str, chosen: str, obstacles: Iterable[tuple[str, str | None]]) -> str:
    why: dict[str | None, list[str]] = {}
    for name, reason in itertools.takewhile(lambda item: item[0] != chosen, obstacles):
        why.setdefault(reason, []).append(repr(name))
    if asked != "auto" or not why:
        return f"{what} by {chosen!r}"
    reasons = "; ".join(f"{', '.join(names)} {reason}" for reason, names in why.items())
    return f"{what} by {chosen!r} ({reasons})"


def _machine(config: Config) -> attention.Machine:
    return attention.Machine(accelerator(), config.training.compute_dtype, cudnn_version())


def cudnn_version() -> int | None:
    """As 91000 for 9.10.0, where there is one."""
    from jax._src.lib import cuda_versions

    return None if cuda_versions is None else cuda_versions.cudnn_get_version()


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the default devices are."""
    return jax.default_backend()


def accelerator() -> str:
    """`platform()`, or 'hopper' for a GPU of compute capability 9.0, which has its own kernels."""
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    return "hopper" if platform() == "gpu" and capability == "9.0" else platform()
