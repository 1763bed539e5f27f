"""Load exported checkpoints in transformers: the yardstick of `exported.py`.

Runs in a Python 3.11 environment of its own (`pip install torch==2.13.0 transformers==5.23.0`);
nothing of `dsv3` is imported.

    python benchmarks/exported_transformers.py FOLDER TOKENS.npy OUT.npz

OUT gets `logits` float32 [B, T, V] of the tokens [B, T] in FP32. Where config.json announces an MTP
layer it also gets `mtp_logits` [B, T - 1, V], position i from h_i and t_{i+1}, by the code that
makes the golden files, and greedy continuations without and with transformers' own speculation,
`plain` and `speculated`, for which transformers has to find every MTP tensor. Prints one JSON line:
the weights missing from the folder and those that transformers did not use.
"""

import json
import runpy
import sys
from pathlib import Path

NEW_TOKENS = 16


def main(folder: str, tokens_file: str, out: str) -> None:
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from transformers import DeepseekV3ForCausalLM

    golden = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "golden" / "make_golden.py"))
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    # transformers looks for MTP tensors under the number that they have in the released model, 61
    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}.*"]
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    found = {}
    with torch.no_grad():
        found["logits"] = model(input_ids=tokens).logits
        if model.config.num_mtp_layers:
            tensors = {}
            for file in Path(folder).glob("*.safetensors"):
                tensors |= {name: t.float() for name, t in load_file(file).items()}
            found["mtp_logits"] = golden["mtp_logits"](model, tensors, tokens)
            how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
            prompt = tokens[:1, :8]
            found["plain"] = model.generate(prompt, **how)
            found["speculated"] = model.generate(prompt, use_mtp=True, **how)
    np.savez(out, **{name: array.numpy() for name, array in found.items()})
    print(json.dumps({key: sorted(map(str, info[key])) for key in
                      ("missing_keys", "unexpected_keys", "mismatched_keys")}))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
