"""Time transformers' `generate` with its cache: the yardstick of `decode.py transformers`.

Runs in a Python environment of its own with torch and transformers; nothing of `dsv3` is imported.

    python benchmarks/decode_transformers.py --hf DIR --prompts FILE --new 256 --threads 2

DIR holds a checkpoint in the official layout, FILE token ids [B, T] in JSON. Prints one JSON line:
the seconds of each greedy completion of all prompts, the first one untimed, the new tokens of each
prompt, and what ran.
"""

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", required=True, type=Path)
    parser.add_argument("--prompts", required=True, type=Path, help="JSON: lists of token ids")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(args.hf, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(json.loads(args.prompts.read_text()))
    options = {"do_sample": False, "use_cache": True, "max_new_tokens": args.new, "pad_token_id": 0}
    seconds, tokens = [], prompts
    with torch.inference_mode():
        for _ in range(1 + args.repeats):
            start = time.perf_counter()
            tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            seconds.append(time.perf_counter() - start)
    what = f"transformers {transformers.__version__}, torch {torch.__version__}"
    new = tokens[:, prompts.shape[1] :].tolist()
    print(json.dumps({"what": what, "seconds": seconds[1:], "tokens": new}))


if __name__ == "__main__":
    main()
