"""Redundant experts in a model that serves, and keeping them where the load is (§3.4).

`replicated(model, placement)` is a model whose routed experts lie in physical slots, some of them
more than once: it computes the same, and is a drop-in `Transformer` for anything that decodes. The
router is untouched and knows experts only, so gates, biases and counts stay logical; behind it a
token's expert becomes one of that expert's slots:

    slot = the (x mod replicas)-th slot of the expert            x: the token's place in the batch

which depends on no other token and splits a batch evenly. Parameters are gathered, not computed:
a device holds its slots when the slot axis is sharded as the expert axis of training is. All
shapes depend on the number of slots alone, so a new placement compiles nothing.

A served batch tells what the next ones will ask for: `Balancer` averages the loads that
`routed_loads` counts, a pass over what was read and written, and plans anew between batches. Rows
of loads and placements are those of `Stats.counts_LE`: MoE layers, then MTP depths.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dsv3.errors import ConfigError
from dsv3.inference.generate import Completion
from dsv3.inference.placement import Placement, place
from dsv3.model.moe import MoeFfn, RoutedExperts
from dsv3.model.transformer import Transformer

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
        return self.slots(u_XD, self.slots_of(experts_XK), gates_XK)

    def slots_of(self, experts_XK: Array) -> Array:
        """The slot that serves each assignment, int32 [X, K]."""
        turn_X1 = jnp.arange(experts_XK.shape[0])[:, None]
        replica_XK = turn_X1 % self.replicas_E[...][experts_XK]
        return self.slot_Y[...][self.first_E[...][experts_XK] + replica_XK]


def replicated(model: Transformer, placement: Placement) -> Transformer:
    """`model` with its experts in the slots of `placement`; it may have replicas already.

    `model` keeps its own. Raises ConfigError where the placement is of another model.
    """
    moe, layers = model.config.moe, model.config.moe_layers
    wanted = (layers + model.config.mtp_depths, moe.routed_experts)
    if placement.logcnt_LE.shape != wanted:
        given = placement.logcnt_LE.shape
        raise ConfigError(f"a placement of [layers, experts] = {given} for a model of {wanted}")
    tables = _tables(placement)
    model = jax.tree.map(lambda leaf: leaf, model)  # modules of its own, the same arrays
    if model.moe is not None:
        ffn = _moe(model.moe)
        moved = jax.vmap(_moved)(ffn.routed, *(table[:layers] for table in tables))
        ffn.routed = moved  # pyrefly: ignore
    for row, depth in enumerate(model.mtp, start=layers):
        ffn = _moe(depth.block)
        moved = _moved(ffn.routed, *(table[row] for table in tables))
        ffn.routed = moved  # pyrefly: ignore
    return model


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


def _moved(
    routed: RoutedExperts | ReplicatedExperts,
    phy2log_Y: Array,
    slot_Y: Array,
    first_E: Array,
    replicas_E: Array,
) -> ReplicatedExperts:
    """The experts of one layer gathered into slots."""
    source_Y = phy2log_Y
    if isinstance(routed, ReplicatedExperts):
        source_Y = routed.slot_Y[...][routed.first_E[...][phy2log_Y]]
        routed = routed.slots
    slots = jax.tree.map(lambda per_expert: per_expert[source_Y], routed)
    return ReplicatedExperts(slots, slot_Y, first_E, replicas_E)


def routed_loads(
    model: Transformer, sequences: Sequence[Sequence[int]], dtype: jnp.dtype | None = None
) -> np.ndarray:
    """Tokens that each expert gets from `sequences`, int64 [L, E]: by causality those that decoding
    them token by token sends it."""
    if len(sequences) == 0:
        rows = model.config.moe_layers + model.config.mtp_depths
        return np.zeros((rows, model.config.moe.routed_experts), np.int64)
    longest = max(map(len, sequences))
    size = max(SHORTEST, 1 << max(longest - 1, 0).bit_length())
    tokens_BT = np.zeros((len(sequences), size), np.int32)
    length_B1 = np.array([[len(sequence)] for sequence in sequences])
    for row, sequence in zip(tokens_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    valid_BT = np.arange(size)[None] < length_B1
    return np.asarray(_counts(model, tokens_BT, valid_BT, dtype), np.int64)


@partial(jax.jit, static_argnames="dtype")
def _counts(model: Transformer, tokens_BT: Array, valid_BT: Array, dtype) -> Array:
    return model.hidden(tokens_BT, valid_BT, dtype).stats.counts_LE


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


Generate = Callable[[Transformer, Sequence[Sequence[int]]], list[Completion]]


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
        balancer.observe(routed_loads(model, sequences_read(prompts, completions)))
        model = replicated(model, balancer.plan())


def sequences_read(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion]
) -> list[list[int]]:
    """What went through the model: prompts and completions, less a last token that ran out of
    room, which was chosen but never read."""
    return [
        [*prompt, *done.tokens[: None if done.stopped else -1]]
        for prompt, done in zip(prompts, completions, strict=True)
    ]
