"""The smallest configuration that has every part, shared by the tests of training."""

import jax

from dsv3.config import (
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Mla,
    Model,
    Moe,
    Phase,
    Reporting,
    Training,
)  # fmt: skip

MLA = Mla(heads=2, query_latent=16, kv_latent=16, nope_dim=8, rope_dim=4, value_dim=8)
MOE = Moe(
    routed_experts=8, experts_per_token=2, groups=4, groups_per_token=2, group_score_experts=1,
    expert_width=16, block=8,
)  # fmt: skip
MODEL = Model(
    vocab=64, width=32, layers=3, dense_layers=1, dense_width=64, mla=MLA, moe=MOE, mtp_depths=1,
    init_std=0.05,
)  # fmt: skip
TRAINING = Training(
    tokens=16 * 8 * 20, sequence_length=16, batch=(Phase("constant", 1, 8),), learning_rate=1e-2,
    warmup_steps=2, ema_decay=0.9, compute_dtype="float32",
    mtp_weight=(Phase("constant", 0.5, 0.3), Phase("constant", 1, 0.1)),
)  # fmt: skip
CONFIG = Config(
    model=MODEL, data=Data(corpus="synthetic"), training=TRAINING, checkpoint=Checkpoint(every=4),
    reporting=Reporting(every=1, tensorboard=False, plots=False), evaluation=Evaluation(0, 0),
)  # fmt: skip


def tokens(seed: int, sequences: int = 8, length: int = 16):
    shape = (sequences, length + 1)
    return jax.random.randint(jax.random.key(seed), shape, 0, MODEL.vocab)
