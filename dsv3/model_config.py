"""The model's part of the configuration tree (§2, §3.3); `dsv3.config` has the rest, and all names.

An optional part is an optional section (`None`); alternatives are a sum type named by a tag.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dsv3.schema import Section


@dataclass(frozen=True)
class Yarn(Section):
    """Context extension by YaRN (§4.3): frequencies stretched by `factor`, softmax temperature."""

    path: ClassVar[str] = "model.mla.yarn"
    tag: ClassVar[str] = "yarn"
    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def validate(self):
        self.require_positive("factor", "original_length", "beta_fast", "beta_slow")
        self.require(self.factor >= 1, "factor", "must be at least 1")
        self.require(self.beta_fast > self.beta_slow, "beta_fast", "must exceed yarn.beta_slow")


@dataclass(frozen=True)
class Mla(Section):
    """Multi-head latent attention (§2.1.1). `query_latent = None` projects queries directly."""

    path: ClassVar[str] = "model.mla"
    heads: int = 4
    query_latent: int | None = 128
    kv_latent: int = 64
    nope_dim: int = 64
    rope_dim: int = 32
    value_dim: int = 64
    rope_theta: float = 10_000.0
    rope_layout: Literal["interleaved", "half"] = "interleaved"
    attention: Literal["auto", "xla", "cudnn", "mosaic"] = "auto"  # what multiplies; by platform
    decoding: Literal["auto", "xla", "mosaic"] = "auto"  # the same over the latent cache
    yarn: Yarn | None = None

    def validate(self):
        self.require_positive("heads", "query_latent", "kv_latent", "nope_dim", "rope_dim",
                              "value_dim")  # fmt: skip
        self.require(self.rope_dim % 2 == 0, "rope_dim", "must be even: it is rotated in pairs")
        self.require(self.rope_theta > 1, "rope_theta", "must exceed 1")


@dataclass(frozen=True)
class AuxFree(Section):
    """Auxiliary-loss-free balancing (§2.1.2): a bias moved by the sign rule at the speed of
    `training.bias_speed`, and the complementary sequence-wise loss of weight `sequence_alpha`."""

    path: ClassVar[str] = "model.moe.balance"
    tag: ClassVar[str] = "aux_free"
    sequence_alpha: float = 1e-4

    def validate(self):
        self.require_not_negative("sequence_alpha")


@dataclass(frozen=True)
class AuxLoss(Section):
    """A pure auxiliary loss (§4.5): Eq. 17-20 over each sequence, or over all of a forward pass,
    which is the batch unless `training.micro_batch` cuts it."""

    path: ClassVar[str] = "model.moe.balance"
    tag: ClassVar[str] = "aux_loss"
    alpha: float = 1e-3
    scope: Literal["sequence", "batch"] = "sequence"

    def validate(self):
        self.require_not_negative("alpha")


@dataclass(frozen=True)
class NoBalance(Section):
    """No balancing at all: the control of the ablations."""

    path: ClassVar[str] = "model.moe.balance"
    tag: ClassVar[str] = "none"


@dataclass(frozen=True)
class Moe(Section):
    """DeepSeekMoE (§2.1.2): shared and fine-grained routed experts, group-limited, dropless."""

    path: ClassVar[str] = "model.moe"
    routed_experts: int = 16
    shared_experts: int = 1
    experts_per_token: int = 4
    groups: int = 4
    groups_per_token: int = 2
    group_score_experts: int = 2  # best experts summed into a group's score (K_r/M in the report)
    expert_width: int = 128
    gate_scale: float = 2.5
    normalize_gates: bool = True
    balance: AuxFree | AuxLoss | NoBalance = AuxFree()
    block: int = 128  # rows: each expert's tokens are padded to a multiple of this

    def validate(self):
        self.require_positive("routed_experts", "experts_per_token", "expert_width", "block")
        self.require_positive("groups", "groups_per_token", "group_score_experts", "gate_scale")
        self.require_not_negative("shared_experts")
        self.require(self.routed_experts % self.groups == 0, "groups",
                     f"does not divide the {self.routed_experts} routed experts")  # fmt: skip
        self.require(self.groups_per_token <= self.groups, "groups_per_token",
                     f"exceeds model.moe.groups = {self.groups}")  # fmt: skip
        in_group = self.routed_experts // self.groups
        self.require(self.group_score_experts <= in_group, "group_score_experts",
                     f"exceeds the {in_group} experts of a group")  # fmt: skip
        reachable = in_group * self.groups_per_token
        self.require(self.experts_per_token <= reachable, "experts_per_token",
                     f"exceeds the {reachable} experts that groups_per_token allows")  # fmt: skip


@dataclass(frozen=True)
class Bf16Dot(Section):
    """Linear maps multiply in the compute dtype, accumulate and return weight gradients in FP32."""

    path: ClassVar[str] = "model.dot"
    tag: ClassVar[str] = "bf16"
    backend: Literal["auto", "xla", "mosaic"] = "auto"  # of experts' products; chosen by platform


@dataclass(frozen=True)
class ExactAccumulator(Section):
    """Products of 128 of the contraction are exact, their scaled sums FP32 (§3.3.2)."""

    path: ClassVar[str] = "model.dot.accumulator"
    tag: ClassVar[str] = "exact"


@dataclass(frozen=True)
class HopperAccumulator(Section):
    """Bit-level emulation of Hopper's tensor core, for studies: slow. `promote_every` is N_C;
    None leaves the whole contraction to the tensor core."""

    path: ClassVar[str] = "model.dot.accumulator"
    tag: ClassVar[str] = "hopper"
    promote_every: int | None = 128

    def validate(self):
        every = self.promote_every
        self.require(every is None or (every > 0 and every % 32 == 0), "promote_every",
                     "must be a multiple of 32, one instruction's share, or None")  # fmt: skip


@dataclass(frozen=True)
class Fp8Dot(Section):
    """Linear maps multiply in FP8 (§3.3). Defaults are the report's, alternatives its comparisons.

    One scale for a tensor spans the batch: a position depends, faintly, on later ones and on other
    sequences; fit for comparing training losses. Groups along tokens are at most `moe.block` long.
    """

    path: ClassVar[str] = "model.dot"
    tag: ClassVar[str] = "fp8"
    groups: Literal["fine", "tensor"] = "fine"  # one scale for 128 or 128 x 128, or for a tensor
    scales: Literal["float32", "power_of_two"] = "float32"
    gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
    gradient_groups: Literal["tile", "block"] = "tile"  # block: App. B.2, which diverged
    accumulator: ExactAccumulator | HopperAccumulator = ExactAccumulator()
    backend: Literal["auto", "reference", "dequant", "mosaic"] = "auto"

    def validate(self):
        self.require(self.groups == "fine" or self.gradient_groups == "tile", "gradient_groups",
                     "contradicts model.dot.groups = 'tensor', which has none")  # fmt: skip
        if isinstance(self.accumulator, HopperAccumulator):
            self.require(self.backend not in ("dequant", "mosaic"), "backend",
                         "does not multiply by model.dot.accumulator = 'hopper'")  # fmt: skip
            every = self.accumulator.promote_every
            self.require(self.groups == "tensor" or every in (32, 64, 128), "groups",
                         "needs model.dot.accumulator.promote_every = 32, 64 or 128: scales are "
                         f"applied at each promotion, not every {every}")  # fmt: skip


@dataclass(frozen=True)
class Model(Section):
    """The transformer: dense layers, then MoE layers, then MTP modules (§2, Fig. 2 and 3)."""

    path: ClassVar[str] = "model"
    vocab: int = 4096
    width: int = 256
    layers: int = 4
    dense_layers: int = 1
    dense_width: int = 1024
    mla: Mla = Mla()
    moe: Moe = Moe()
    mtp_depths: int = 1
    norm_eps: float = 1e-6
    init_std: float = 0.006
    dot: Bf16Dot | Fp8Dot = Bf16Dot()
    remat: Literal["none", "report", "full"] = "none"

    def validate(self):
        self.require_positive("vocab", "width", "layers", "dense_width", "norm_eps", "init_std")
        self.require(self.init_std <= 100, "init_std", "exceeds 100")
        self.require_range("vocab", 1, 2**24)
        self.require_range("dense_layers", 0, self.layers)
        pairs = self.mla.heads * self.mla.value_dim % 2 == 0
        self.require(pairs or not isinstance(self.dot, Fp8Dot), "dot", "keeps the input of W^O in "
                     "pairs of E5M6 numbers: model.mla.heads · value_dim must be even")  # fmt: skip
        self.require_not_negative("mtp_depths")

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers
