"""The main job: a small but complete DeepSeek-V3 learns the Python standard library on two cores.

Every part of the report is there, at toy size: MLA with both latents, one dense layer and MoE
layers with 16 routed experts (4 chosen, from 2 of 4 groups) and a shared one, bias balancing, one
MTP depth, FIM, BF16 moments, EMA. It is trained for one pass over about 3M tokens of code.
"""

from dsv3.config import (
    Checkpoint,
    Config,
    Data,
    Mla,
    Model,
    Moe,
    Phase,
    Training,
)
from dsv3.sweeps import param, product


def get_config() -> Config:
    return Config(
        model=Model(
            vocab=4096,
            width=256,
            layers=4,
            dense_layers=1,
            dense_width=1024,
            mla=Mla(
                heads=4, query_latent=128, kv_latent=64, nope_dim=64, rope_dim=32, value_dim=64
            ),
            moe=Moe(
                routed_experts=16, experts_per_token=4, groups=4, groups_per_token=2,
                expert_width=128,
            ),
            mtp_depths=1,
            init_std=0.02,
        ),
        data=Data(corpus="stdlib", tokenizer="bpe"),
        training=Training(
            tokens=3e6,
            sequence_length=256,
            batch=(Phase("constant", 1, 16),),
            batch_increment=8,
            learning_rate=3e-3,
            warmup_steps=30,
            decay=(Phase("constant", 0.5, 1.0), Phase("cosine", 1.0, 0.1)),
            bias_speed=(Phase("constant", 0.97, 0.01), Phase("constant", 1.0, 0.0)),
            mtp_weight=(Phase("constant", 0.67, 0.3), Phase("constant", 1.0, 0.1)),
            compute_dtype="float32",
        ),
        checkpoint=Checkpoint(every=100),
    )  # fmt: skip


sweeps = {
    # Table 5 in small: balancing without and with an auxiliary loss, and none at all.
    "balance": lambda: param("model.moe.balance", ["aux_free", "aux_loss", "none"]),
    # Table 4 in small: with and without the MTP module.
    "mtp": lambda: product(param("model.mtp_depths", [0, 1]), param("training.seed", [0, 1, 2])),
    "learning_rate": lambda: param("training.learning_rate", [1e-3, 3e-3, 1e-2]),
}
