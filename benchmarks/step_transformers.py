"""Time a training step of transformers' DeepseekV3ForCausalLM: the yardstick of `step.py`.

Runs in a Python 3.11 environment of its own (`pip install torch==2.13.0 transformers==5.23.0`);
nothing of `dsv3` is imported. A step is forward, next-token loss, backward, clip to norm 1.0 and
AdamW, in eager mode, on fresh synthetic tokens, at the shape of `configs/bench_cpu.py` (SHAPE;
`side_by_side.py` checks that the two agree).

BF16 is tried in the two ways torch users have: `autocast`, FP32 parameters and moments with
matrix products in BF16, which is what `training.compute_dtype = 'bfloat16'` does here; and
`bfloat16`, everything stored and computed in BF16.

    python benchmarks/step_transformers.py --precision float32 --steps 20

`--shape` takes the fields of another model's config.json, `--device cuda --compile` a GPU. It
prints one JSON line: the median seconds of a step, all the steps, and what ran.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

BATCH, LENGTH = 8, 256
SHAPE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.006,
    "max_position_embeddings": 4096,
}


def build(shape: dict, attention: str, experts: str | None, precision: str, device: str):
    """The model of a shape and an AdamW with the report's hyper-parameters."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(**shape)
    config._attn_implementation = attention
    if experts is not None:
        config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(config).train().to(device)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2.2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    return model, optimizer


def measure(
    model, optimizer, precision: str, batch: int, length: int, steps: int, warmup: int
) -> list[float]:
    """Seconds of each of `steps` training steps after `warmup` untimed ones."""
    import torch

    device, vocab = next(model.parameters()).device, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(warmup + steps):
        tokens = torch.randint(vocab, (batch, length + 1), generator=generator).to(device)
        start = time.perf_counter()
        with (
            torch.autocast(device.type, torch.bfloat16)
            if precision == "autocast"
            else contextlib.nullcontext()
        ):
            # shift_labels: `length` targets a sequence, as in our step (labels alone drop one)
            inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
            loss = model(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--precision", choices=("float32", "autocast", "bfloat16"), default="float32"
    )
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager")
    parser.add_argument("--experts", help="eager, grouped_mm, batched_mm; transformers' own choice")
    parser.add_argument("--shape", metavar="FILE", help="JSON; that of configs/bench_cpu.py")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    args = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    shape = json.loads(Path(args.shape).read_text()) if args.shape else SHAPE
    model, optimizer = build(shape, args.attention, args.experts, args.precision, args.device)
    if args.compile:
        model.compile()
    seconds = measure(
        model, optimizer, args.precision, args.batch, args.length, args.steps, args.warmup
    )
    report = {
        "what": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "precision": args.precision,
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
        "threads": torch.get_num_threads(),
        "median_s": round(statistics.median(seconds), 4),
        "seconds": [round(s, 4) for s in seconds],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
