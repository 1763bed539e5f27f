"""Redundant experts in a model that serves, and keeping them where the load is (§3.4).

`replicated(model, placement)` is a model whose routed experts lie in physical slots, some of them
more than once: it computes the same, and is a drop-in `Transformer` for anything that decodes. The
router is untouched and knows experts only, so gates, biases and counts stay logical; behind it a
token's expert becomes one of that expert's slots:

    slot = the (x mod replicas)-th slot of the expert            x: the token's place in the batch

which depends on no other token and splits a batch evenly. Parameters are gathered, not computed.
All shapes depend on the number of slots alone, so a new placement compiles nothing.

On a mesh the slots take the place of experts: the same axes divide them in order, so slot y lies on
expert rank y // (slots / ranks), where the plan for so many devices has it. A token travels to its
slots as it would to experts. Only the bound on nodes goes: a plan need not keep a group on one.

A served batch tells what the next ones will ask for: `Balancer` averages the loads that decoding
counted and plans anew between batches. Rows of loads and placements are those of
`Stats.counts_LE`: MoE layers, then MTP depths.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from dsv3.errors import ConfigError
from dsv3.inference.generate import Completion, Completions
from dsv3.inference.placement import Placement, place
from dsv3.model.moe import MoeFfn, RoutedExperts
from dsv3.model.transformer import Transformer
from dsv3.parallel.shard import Shard

SHORTEST = 64  # tokens in the smallest buffer of sequences


class SlotTable(nnx.Variable):
    """Integers that say where experts lie: neither trained nor saved."""


class ReplicatedExperts(nnx.Module):
    """`RoutedExperts` over slots; called with the router's experts, as that is."""

    def __init__(self, slots: RoutedExperts, slot_Y: Array, first_E: Array, replicas_E: Array):
        self.slots = slots
        self.slot_Y = SlotTable(slot_Y)  # all slots, sorted by their expert
        self.first_E = SlotTable(first_E)  # where an expert's slots begin among these
        self.replicas_E = SlotTable(replicas_E)

    def __call__(self, u_XD: Array, experts_XK: Array, gates_XK: Array) -> Array:
        slots_XK = self.slots_of(experts_XK, self.slots.shard.first(len(u_XD)))
        return self.slots(u_XD, slots_XK, gates_XK)

    def slots_of(self, experts_XK: Array, first: Array | int = 0) -> Array:
        """The slot that serves each assignment of tokens `first`, ..., int32 [X, K]; one that there
        is not for numbers that are no expert."""
        tokens, slots = experts_XK.shape[0], self.slot_Y.size
        turn_X1 = (first + jnp.arange(tokens))[:, None]
        replica_XK = turn_X1 % self.replicas_E[...][experts_XK]
        slot_XK = self.slot_Y[...][self.first_E[...][experts_XK] + replica_XK]
        return jnp.where(experts_XK < self.replicas_E.size, slot_XK, slots)


def replicated(model: Transformer, placement: Placement) -> Transformer:
    """`model` with its experts in the slots of `placement`; it may have replicas already.

    `model` keeps its own. Raises ConfigError where the placement is of another model.
    """
    moe, layers = model.config.moe, model.config.moe_layers
    wanted = (layers + model.config.mtp_depths, moe.routed_experts)
    if placement.logcnt_LE.shape != wanted:
        given = placement.logcnt_LE.shape
        raise ConfigError(f"a placement of [layers, experts] = {given} for a model of {wanted}")
    shard, slots = _over_slots(model), placement.phy2log_LY.shape[1]
    if slots % (ranks := math.prod(hop.ranks for hop in shard.hops)):
        raise ConfigError(f"{slots} slots do not divide over the {ranks} devices of experts")
    tables = _tables(placement)
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, the same arrays
    if model.moe is not None:
        of_stack = (table[:layers] for table in tables)
        _place(_moe(model.moe), "moe.ffn.routed.", model.shard, shard, *of_stack)
    for depth, module in enumerate(model.mtp):
        of_depth = (table[layers + depth] for table in tables)
        name = f"mtp.{depth}.block.ffn.routed."
        _place(_moe(module.block), name, model.shard, shard, *of_depth)
    model.shard = shard
    return model


def _over_slots(model: Transformer) -> Shard:
    """The model's shard once slots stand for experts."""
    shard, most = model.shard, model.config.moe.experts_per_token
    to_slots = partial(re.sub, r"\brouted\.(?!slots\.)", "routed.slots.")
    places = tuple((to_slots(name), place) for name, place in shard.places)
    hops = tuple(hop._replace(copies=min(hop.ranks, most)) for hop in shard.hops)
    return replace(shard, places=places, hops=hops)


def _tables(placement: Placement) -> tuple[Array, Array, Array, Array]:
    """phy2log_LY, slot_LY, first_LE and replicas_LE, int32 on the device."""
    slot_LY = np.argsort(placement.phy2log_LY, axis=1, kind="stable")
    first_LE = np.cumsum(placement.logcnt_LE, axis=1) - placement.logcnt_LE
    tables = placement.phy2log_LY, slot_LY, first_LE, placement.logcnt_LE
    phy2log, slot, first, replicas = (jnp.asarray(table, jnp.int32) for table in tables)
    return phy2log, slot, first, replicas


def _moe(block) -> MoeFfn:
    assert isinstance(block.ffn, MoeFfn)
    return block.ffn


def _place(ffn: MoeFfn, name: str, old: Shard, new: Shard, phy2log, slot, first, replicas) -> None:
    """Put the experts of a layer, or of a stack of them [L, ...], into slots."""
    routed: RoutedExperts | ReplicatedExperts = ffn.routed
    source = phy2log
    if isinstance(routed, ReplicatedExperts):
        one = jnp.take_along_axis(routed.first_E[...], phy2log, axis=-1)
        source = jnp.take_along_axis(routed.slot_Y[...], one, axis=-1)
        name, routed = f"{name}slots.", routed.slots
    slots = _moved(old, name, routed, source)
    slots.shard = new
    ffn.routed = ReplicatedExperts(slots, slot, first, replicas)  # pyrefly: ignore


@partial(jax.jit, static_argnums=(0, 1))
def _moved(shard: Shard, name: str, routed: RoutedExperts, source: Array) -> RoutedExperts:
    """`routed` with expert, or slot, `source` [Y] or [L, Y] in each place."""
    axes = tuple(axis for hop in shard.hops for axis in hop.axes)
    of_layer = partial(_taken, axes)

    def of_all(per_expert: Array, source: Array) -> Array:
        if source.ndim == 1:
            return of_layer(per_expert, source)
        return lax.map(lambda layer: of_layer(*layer), (per_expert, source))

    def here(routed: RoutedExperts, source: Array) -> RoutedExperts:
        return jax.tree.map(lambda per_expert: of_all(per_expert, source), routed)

    specs = shard.specs(routed, name)
    return shard.each(here, (specs, jax.P()), specs)(routed, source)


def _taken(axes: tuple[str, ...], per_expert: Array, source_Y: Array) -> Array:
    """This device's share of the experts `source_Y`, from whichever devices hold them: of each
    rank one at a time, which is all the memory that it takes."""
    if not axes:
        return per_expert[source_Y]
    mine, ranks = per_expert.shape[0], lax.axis_size(axes)

    def one(_, wanted_n: Array) -> tuple[None, Array]:
        own_n = wanted_n - lax.axis_index(axes) * mine
        held_n = (own_n >= 0) & (own_n < mine)
        sent = jnp.where(held_n[:, None, None], per_expert[jnp.clip(own_n, 0, mine - 1)], 0)
        return None, lax.psum_scatter(sent, axes)

    return lax.scan(one, None, source_Y.reshape(ranks, -1).T)[1]


def routed_loads(
    model: Transformer, sequences: Sequence[Sequence[int]], dtype: jnp.dtype | None = None
) -> np.ndarray:
    """Tokens that each expert gets from `sequences`, int64 [L, E], in one pass over all of them: by
    causality those that decoding them token by token sends it, which counts them by itself."""
    if len(sequences) == 0:
        rows = model.config.moe_layers + model.config.mtp_depths
        return np.zeros((rows, model.config.moe.routed_experts), np.int64)
    longest = max(map(len, sequences))
    size = max(SHORTEST, 1 << max(longest - 1, 0).bit_length())
    tokens_BT = np.zeros((model.shard.even(len(sequences)), size), np.int32)
    valid_BT = np.zeros(tokens_BT.shape, bool)
    for row, valid, sequence in zip(tokens_BT, valid_BT, sequences, strict=False):
        row[: len(sequence)], valid[: len(sequence)] = sequence, True
    return np.asarray(_counts(model, tokens_BT, valid_BT, dtype), np.int64)


@partial(jax.jit, static_argnames="dtype")
def _counts(model: Transformer, tokens_BT: Array, valid_BT: Array, dtype) -> Array:
    def here(model: Transformer, tokens_BT: Array, valid_BT: Array) -> Array:
        return model.shard.sum(model.hidden(tokens_BT, valid_BT, dtype).stats.counts_LE)

    return model.shard.evaluate(here, model, (tokens_BT, valid_BT), jax.P())


@dataclass
class Balancer:
    """Plans placements on `devices` from a moving average of loads.

    Each batch's loads count `keep` times as much as those of the next, a token like any other.
    """

    slots: int
    devices: int
    groups: int = 1
    nodes: int = 1
    keep: float = 0.9
    load_LE: np.ndarray | None = field(default=None, init=False)

    def observe(self, counts_LE: np.ndarray) -> None:
        """Take the loads of a batch."""
        before = 0.0 if self.load_LE is None else self.keep * self.load_LE
        self.load_LE = before + np.asarray(counts_LE, np.float64)

    def plan(self) -> Placement:
        """A placement for the next batch. Raises ConfigError where nothing was observed."""
        if self.load_LE is None:
            raise ConfigError("a balancer that observed no batch has nothing to plan from")
        return place(self.load_LE, self.slots, groups=self.groups, nodes=self.nodes,
                     devices=self.devices)  # fmt: skip


Generate = Callable[[Transformer, Sequence[Sequence[int]]], Completions]


def serve(
    model: Transformer,
    batches: Iterable[Sequence[Sequence[int]]],
    generate: Generate,
    balancer: Balancer,
) -> Iterator[list[Completion]]:
    """Completions of batches of prompts, the experts re-balanced between one batch and the next.

    A batch of no prompt is answered by none, and tells nothing of loads.
    """
    for prompts in batches:
        if len(prompts) == 0:
            yield []
            continue
        completions = generate(model, prompts)
        yield completions
        balancer.observe(completions.counts_LE)
        model = replicated(model, balancer.plan())
