"""How a run lies on its devices: the section `parallel` (§3.1, §3.2.2).

The mesh has four axes, of size 1 where they are not used:

    pipe      pipeline stages; until there is a pipeline, one more axis that parameters are cut over
    replica   copies of the experts
    node      machines that share one copy of the experts     (InfiniBand between them)
    local     devices of such a machine                       (NVLink between them)

The batch is cut over `(replica, node, local)`, the experts over `(node, local)`, everything stored
over all four. The report's run is (16, 2, 8, 8).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from dsv3.schema import Section


class Sizes(NamedTuple):
    """Of the axes of a mesh, in their order."""

    pipe: int
    replica: int
    node: int
    local: int

    @property
    def devices(self) -> int:
        return math.prod(self)

    @property
    def data_ranks(self) -> int:
        """Into how many pieces a batch is cut."""
        return self.replica * self.node * self.local

    @property
    def expert_ranks(self) -> int:
        return self.node * self.local


@dataclass(frozen=True)
class Parallel(Section):
    """The mesh, how tokens reach their experts, and how parameters are gathered for use.

    `transport`: 'all_to_all' sends a token to each device that holds one of its experts,
    'node_limited' sends it once to each node and there to the devices (§3.2.2), 'local' keeps all
    experts on every device; 'auto' is the first that fits the mesh of node_limited, all_to_all and
    local. `parameters`: 'zero1' gathers all once a step and scatters the summed gradients once,
    'fsdp' gathers each layer when it is its turn and scatters its gradients at once.
    """

    path: ClassVar[str] = "parallel"
    pipe: int = 1
    replica: int | None = 1  # None: as many as the devices allow
    node: int = 1
    local: int = 1
    transport: Literal["auto", "local", "all_to_all", "node_limited"] = "auto"
    parameters: Literal["zero1", "fsdp"] = "zero1"
    expert_rows: float | None = None  # rows a device takes in one pass, see `parallel.exchange`

    def validate(self):
        self.require_positive("pipe", "node", "local")
        self.require(self.replica is None or self.replica > 0, "replica",
                     "must be positive or None")  # fmt: skip
        rows = self.expert_rows
        self.require(rows is None or rows >= 1, "expert_rows", "must be at least 1, an even share, "
                     "or None for the worst case")  # fmt: skip
        alone = self.node * self.local == 1
        self.require(not alone or self.transport in ("auto", "local"), "transport",
                     "wants experts on several devices: parallel.node · local is 1")  # fmt: skip

    @property
    def carried_by(self) -> Literal["local", "all_to_all", "node_limited"]:
        """The transport, chosen where it is left open."""
        if self.transport != "auto":
            return self.transport
        if self.node > 1 and self.local > 1:
            return "node_limited"
        return "all_to_all" if self.node * self.local > 1 else "local"

    def require_fitting(self, moe, remat: str) -> None:
        """Raise ConfigError where a model of these experts, so recomputed, cannot lie here."""
        experts, groups = moe.routed_experts, moe.groups
        if self.carried_by != "local":
            for name, ranks in (("node", self.node), ("local", self.node * self.local)):
                self.require(experts % ranks == 0, name, f"makes {ranks} shares of "
                             f"model.moe.routed_experts = {experts}: not even")  # fmt: skip
        if self.carried_by == "node_limited":
            self.require(groups % self.node == 0, "node", f"does not divide model.moe.groups = "
                         f"{groups}: no group may span nodes under node_limited")  # fmt: skip
        self.require(self.parameters == "zero1" or remat != "none", "parameters", "would keep "
                     "every layer gathered: bind model.remat to 'report' or 'full'")  # fmt: skip

    def sizes(self, devices: int) -> Sizes:
        """Of the mesh over so many devices; ConfigError where it does not multiply out."""
        rest = self.pipe * self.node * self.local
        replica = self.replica or devices // rest
        shown = f"pipe · replica · node · local = {self.pipe} · {replica or '?'} · {self.node} · "
        bound = [axis for axis in ("local", "node", "pipe") if getattr(self, axis) > 1]
        name = bound[0] if bound and self.replica in (None, 1) else "replica"
        self.require(rest * replica == devices, name, f"does not fit: {shown}{self.local} is not "
                     f"the number of devices, {devices}")  # fmt: skip
        return Sizes(self.pipe, replica, self.node, self.local)
