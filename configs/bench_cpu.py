"""The shape whose training step is timed on two CPU cores (`benchmarks/`): no experiment, a ruler.

| layers, of them dense    | 4, 1         | routed, shared experts, chosen | 16, 1, 4         |
| width, dense width       | 256, 1024    | expert width                   | 128              |
| heads                    | 4            | groups kept                    | 2 of 4           |
| latents: query, kv       | 128, 64      | vocabulary                     | 4096             |
| head dim, rope, value    | 64, 32, 64   | MTP                            | none             |

8 sequences of 256 uniformly random tokens a step, in FP32; `--set training.compute_dtype=bfloat16`
is the other case. Every field that the comparison rests on is written out, defaults or not.
"""

from dsv3.config import Config, Data, Mla, Model, Moe, Phase, Training


def get_config() -> Config:
    return Config(
        model=model(),
        data=Data(corpus="synthetic"),
        training=Training(
            tokens=8 * 256 * 100,
            sequence_length=256,
            batch=(Phase("constant", 1, 8),),
            batch_increment=8,
            compute_dtype="float32",
            ema_decay=None,
        ),
    )


def model() -> Model:
    return Model(
        vocab=4096,
        width=256,
        layers=4,
        dense_layers=1,
        dense_width=1024,
        mla=Mla(heads=4, query_latent=128, kv_latent=64, nope_dim=64, rope_dim=32, value_dim=64),
        moe=Moe(
            routed_experts=16,
            shared_experts=1,
            experts_per_token=4,
            groups=4,
            groups_per_token=2,
            expert_width=128,
        ),
        mtp_depths=0,
        remat="none",
    )
