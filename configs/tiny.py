"""The main job: a small but complete DeepSeek-V3 learns the Python standard library on two cores.

Every part of the report is there at toy size: MLA with both latents, a dense layer and MoE layers
with 16 routed experts (4 chosen, from 2 of 4 groups) and a shared one, bias balancing with the
sequence-wise loss, one MTP depth, FIM, BF16 moments, an average in host memory.

What differs from the report because of the size: init 0.02 instead of 0.006, which is made for a
width of 7168; a bias that moves ten times as fast, since there are hundreds of steps and not
hundreds of thousands; the learning rate.
"""

from dsv3.config import Checkpoint, Config, Data, Evaluation, Mla, Model, Moe, Phase, Training
from dsv3.sweeps import param, product


def get_config() -> Config:
    mla = Mla(heads=4, query_latent=64, kv_latent=32, nope_dim=32, rope_dim=16, value_dim=32)
    moe = Moe(
        routed_experts=16, experts_per_token=4, groups=4, groups_per_token=2, expert_width=64,
        block=64,
    )  # fmt: skip
    return Config(
        model=Model(
            vocab=2048, width=128, layers=4, dense_layers=1, dense_width=512, mla=mla, moe=moe,
            mtp_depths=1, init_std=0.02,
        ),
        data=Data(corpus="stdlib", tokenizer="bpe"),
        training=Training(
            tokens=3e6,
            sequence_length=256,
            batch=(Phase("constant", 1, 8),),
            learning_rate=2e-3,
            warmup_steps=30,
            decay=(Phase("constant", 0.5, 1.0), Phase("cosine", 1.0, 0.1)),
            bias_speed=(Phase("constant", 0.97, 0.01), Phase("constant", 1.0, 0.0)),
            mtp_weight=(Phase("constant", 0.67, 0.3), Phase("constant", 1.0, 0.1)),
            compute_dtype="float32",
        ),
        checkpoint=Checkpoint(every=100),
        evaluation=Evaluation(held_out_bytes=400_000),
    )  # fmt: skip


sweeps = {
    # Table 5 in small: the router's bias, an auxiliary loss instead, and neither.
    "balance": lambda: param("model.moe.balance", ["aux_free", "aux_loss", "none"]),
    # Table 4 in small: without and with the MTP module.
    "mtp": lambda: product(param("model.mtp_depths", [0, 1]), param("training.seed", [0, 1, 2])),
    # Fig. 10 in small: BF16 against FP8, the same data and initialisation for each seed.
    "precision": lambda: product(
        param("training.compute_dtype", ["bfloat16"]),
        param("training.seed", [0, 1, 2]),
        param("model.dot", ["bf16", "fp8"]),
    ),
    "learning_rate": lambda: param("training.learning_rate", [1e-3, 2e-3, 4e-3, 8e-3]),
}
