"""The 16B ablation scale: 15.7B parameters of which 2.4B are activated (Tables 4 and 5, Fig. 9).

The report gives this model's size and its 1.33T tokens; the shape is that of DeepSeek-V2-Lite
(`config_16B` of the released code), whose count it is to the last 1,664, the router biases.

| layers, of them dense    | 27, 1        | routed, shared experts, chosen | 64, 2, 6         |
| width, dense width       | 2048, 10944  | expert width                   | 1408             |
| heads, query latent      | 16, none     | groups                         | 1: no limit      |
| head dim, rope, latent   | 128, 64, 512 | vocabulary                     | 102,400          |

As in Table 5: sigmoid affinity with gates normalised over the chosen experts, and balance by the
bias alone ('removes ALL auxiliary losses', so alpha = 0). Its baseline is
`model.moe.balance = 'aux_loss'` (alpha 0.001, V2-Lite's strength), the batch-wise variant of §4.5.3
that with `model.moe.balance.scope = 'batch'`; Table 4's variant is `model.mtp_depths = 1`.

Optimisation is V2-Lite's (arXiv 2405.04434, App. B), the report being silent: 4608 sequences of
4096, peak learning rate 4.2e-4 after 2000 steps, times 0.316 at 80 % and again at 90 % of the
tokens. Gates are not scaled, as in V2-Lite. The tokenizer is a BPE trained on the corpus, since the
one of the V3 release has more than 102,400 entries.

The mesh is nodes of 8 devices that each hold all experts among them, as many nodes as there are. A
micro-batch is one sequence for each device of a node, which 80 GB have room for (65 GB in use, see
docs/plan.md): on n nodes bind `training.micro_batch` to 8 n.
"""

from dsv3.config import AuxFree, Config, Data, Mla, Model, Moe, Parallel, Phase, Training


def get_config() -> Config:
    return Config(
        model=model(),
        data=Data(tokenizer="bpe"),
        training=training(),
        parallel=Parallel(replica=None, local=8, expert_rows=2.0),
    )


def model() -> Model:
    return Model(
        vocab=102_400,
        width=2048,
        layers=27,
        dense_layers=1,
        dense_width=10_944,
        mla=Mla(
            heads=16, query_latent=None, kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128
        ),
        moe=Moe(
            routed_experts=64,
            shared_experts=2,
            experts_per_token=6,
            groups=1,
            groups_per_token=1,
            expert_width=1408,
            gate_scale=1.0,
            balance=AuxFree(sequence_alpha=0.0),
        ),
        mtp_depths=0,
        remat="report",
    )


def training() -> Training:
    return Training(
        tokens=1.33e12,
        sequence_length=4096,
        micro_batch=8,
        batch=(Phase("constant", 1, 4608),),
        batch_increment=4608,
        learning_rate=4.2e-4,
        warmup_steps=2000,
        decay=(
            Phase("constant", 0.8, 1.0),
            Phase("constant", 0.9, 0.316),
            Phase("constant", 1, 0.316**2),
        ),
        ema_decay=None,
    )
