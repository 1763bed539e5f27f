"""DeepSeek-V3, 671B parameters of which 37B are activated, as in §4.2 of the report.

| model                        |            | training                     |                       |
|------------------------------|------------|------------------------------|-----------------------|
| layers, of them dense        | 61, 3      | tokens                       | 14.8T                 |
| width d                      | 7168       | sequence length              | 4096                  |
| heads n_h                    | 128        | AdamW β1, β2, weight decay   | 0.9, 0.95, 0.1        |
| head dim d_h, rope d_h^R     | 128, 64    | moments                      | BF16 (§3.3.3)         |
| latents d_c, d_c'            | 512, 1536  | peak learning rate           | 2.2e-4                |
| routed, shared experts       | 256, 1     | warm-up                      | 2000 steps            |
| experts a token, its groups  | 8, 4 of 8  | constant until               | 10T                   |
| expert width                 | 2048       | cosine to 2.2e-5 until       | 14.3T                 |
| MTP depths                   | 1          | 2.2e-5 until, 7.3e-6 until   | 14.633T, 14.8T        |
| initialisation               | 0.006      | batch, sequences             | 3072 to 15360         |
| vocabulary                   | 128K       | ... rising over              | 469B                  |
| parameters                   | 671B       | clipping norm                | 1.0                   |
| activated                    | 37B        | bias speed until 14.3T, then | 0.001, 0              |
|                              |            | balance loss alpha           | 0.0001                |
|                              |            | MTP weight until 10T, then   | 0.3, 0.1              |
|                              |            | FIM rate (§4.1)              | 0.1                   |

From the released config.json, the report being silent: dense width 18432, gate scale 2.5, RoPE base
10,000, 8 groups, norm eps 1e-6, 129,280 embedding rows (the vocabulary padded to 128).
Chosen here, both being silent: AdamW eps 1e-8; EMA decay 0.9999; the batch rises linearly in
tokens, in steps of 768 sequences; a micro-batch of 128 sequences, one for each data-parallel rank
(2048 GPUs in 16 pipeline stages). Positions are plain RoPE: YaRN belongs to the long-context
stage (§4.3).

The mesh is the report's 2048 devices: 16 pipeline ranks, 2 copies of the experts, 8 nodes of 8
devices for each. Until there is a pipeline its ranks only share the parameters, gathered layer by
layer, and each computes all layers: a plan of the memory, not a way to train.

The corpus of the report is not public: bind `data.corpus`. The tokenizer is that of the release.
"""

from dsv3.config import AdamW, AuxFree, Config, Data, Mla, Model, Moe, Parallel, Phase, Training

TOKENS = 14.8e12


def until(tokens: float) -> float:
    """Where `tokens` stand in the run, as a phase wants it."""
    return tokens / TOKENS


def get_config() -> Config:
    return Config(model=model(), data=data(), training=training(), parallel=parallel())


def model() -> Model:
    return Model(
        vocab=129_280,
        width=7168,
        layers=61,
        dense_layers=3,
        dense_width=18_432,
        mla=Mla(
            heads=128,
            query_latent=1536,
            kv_latent=512,
            nope_dim=128,
            rope_dim=64,
            value_dim=128,
            rope_theta=10_000.0,
            rope_layout="interleaved",
            yarn=None,
        ),
        moe=Moe(
            routed_experts=256,
            shared_experts=1,
            experts_per_token=8,
            groups=8,
            groups_per_token=4,
            group_score_experts=2,
            expert_width=2048,
            gate_scale=2.5,
            normalize_gates=True,
            balance=AuxFree(sequence_alpha=1e-4),
        ),
        mtp_depths=1,
        norm_eps=1e-6,
        init_std=0.006,
        remat="report",
    )


def data() -> Data:
    return Data(tokenizer="deepseek", fim_rate=0.1)


def training() -> Training:
    peak = 2.2e-4
    return Training(
        tokens=TOKENS,
        sequence_length=4096,
        micro_batch=128,
        batch=(
            Phase("constant", until(1), 3072),  # where the ramp starts
            Phase("linear", until(469e9), 15_360),
            Phase("constant", 1, 15_360),
        ),
        batch_increment=768,
        learning_rate=peak,
        warmup_steps=2000,
        decay=(
            Phase("constant", until(10e12), 1.0),
            Phase("cosine", until(14.3e12), 2.2e-5 / peak),
            Phase("constant", until(14.633e12), 2.2e-5 / peak),
            Phase("constant", 1, 7.3e-6 / peak),
        ),
        bias_speed=(Phase("constant", until(14.3e12), 0.001), Phase("constant", 1, 0.0)),
        mtp_weight=(Phase("constant", until(10e12), 0.3), Phase("constant", 1, 0.1)),
        optimizer=AdamW(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, moment_dtype="bfloat16"),
        clip_norm=1.0,
        ema_decay=0.9999,
        compute_dtype="bfloat16",
    )


def parallel() -> Parallel:
    return Parallel(
        pipe=16,
        replica=2,
        node=8,
        local=8,
        transport="node_limited",
        parameters="fsdp",
        expert_rows=2.0,
    )
