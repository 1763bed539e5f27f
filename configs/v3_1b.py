"""The 1B ablation scale (§4.5.3): a DeepSeek-V3 drawn small, 1.0B parameters, 0.23B activated.

The report gives no shape for its 1B model. This one keeps V3's proportions where they can be kept:

| kept from V3             |              | scaled down                    |                  |
|--------------------------|--------------|--------------------------------|------------------|
| head dim, rope, value    | 128, 64, 128 | layers, of them dense          | 12, 1            |
| key-value latent         | 512          | width                          | 1024             |
| groups kept              | 4 of 8       | heads (N·H = 2 d; V3: 2.3 d)   | 16               |
| experts chosen, shared   | 8, 1         | query latent (0.2 d)           | 256              |
| dense width              | 9 experts'   | routed experts                 | 64               |
| gate scale, alpha        | 2.5, 1e-4    | expert width (0.3 d)           | 384              |
| MTP depths               | 1            | vocabulary                     | 32,768           |

Training is a choice too: 20B tokens, 256 sequences of 4096, peak learning rate 6e-4, and from there
the report's schedules at the same fractions of the run: constant to 10/14.8, cosine to a tenth by
14.3/14.8, the bias at rest and MTP at 0.1 for the same last stretches.
"""

from dsv3.config import Config, Data, Mla, Model, Moe, Phase, Training


def get_config() -> Config:
    return Config(model=model(), data=Data(tokenizer="bpe"), training=training())


def model() -> Model:
    return Model(
        vocab=32_768,
        width=1024,
        layers=12,
        dense_layers=1,
        dense_width=9 * 384,
        mla=Mla(
            heads=16, query_latent=256, kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128
        ),
        moe=Moe(
            routed_experts=64,
            shared_experts=1,
            experts_per_token=8,
            groups=8,
            groups_per_token=4,
            expert_width=384,
        ),
        mtp_depths=1,
        remat="report",
    )


def training() -> Training:
    cosine_from, cosine_to = 10 / 14.8, 14.3 / 14.8
    return Training(
        tokens=20e9,
        sequence_length=4096,
        micro_batch=16,
        batch=(Phase("constant", 1, 256),),
        batch_increment=256,
        learning_rate=6e-4,
        warmup_steps=1000,
        decay=(
            Phase("constant", cosine_from, 1.0),
            Phase("cosine", cosine_to, 0.1),
            Phase("constant", 1, 0.1),
        ),
        bias_speed=(Phase("constant", cosine_to, 0.001), Phase("constant", 1, 0.0)),
        mtp_weight=(Phase("constant", cosine_from, 0.3), Phase("constant", 1, 0.1)),
    )
