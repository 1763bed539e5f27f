"""Makes the golden files beside it: tiny DeepseekV3 checkpoints and what transformers says of them.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy      # Python 3.11, CPU
    python tests/golden/make_golden.py [CASE ...]                         # rewrites these, or all

Each case of CASES becomes a folder in the official on-disk layout (config.json, safetensors) and an
.npz beside it, both committed:

    tokens int32 [B, T], logits float32 [B, T, V], loss (mean next-token cross-entropy over the
    T - 1 known targets of each sequence), grad/NAME float32 for a sample of tensors of every kind,
    under their checkpoint names and shapes; mtp_logits float32 [B, T - 1, V] where there is MTP;
    logits_stored float32 [B, T, V], computed in BF16, where the file is BF16. Cases in FP8 have no
    gradients; their logits are those of the dequantised weights, E4M3 · scale in FP32.

Weights are random and scaled so that activations stay of order 1 and logits of order 1-10. A seed
is taken only if every routing decision, of groups and of experts, is wide enough (MARGIN) for two
FP32 implementations to agree on it. Everything is computed in FP32 from the files as written.

Routing: transformers 5.23.0 masks the experts of rejected groups with -inf, as DeepSeek's mended
code does. Older releases masked with 0.0, which picks rejected experts wherever fewer than K kept
biased scores are positive; cases marked `zero_mask_differs` are made so that it would show, and
this script refuses to make them with a transformers that masks so.

The MTP layer is ignored by transformers' own forward; its logits are computed here from the
released layout: eh_proj [enorm(Emb(t_{i+1})) ; hnorm(h_i)], h after the main model's final norm,
one decoder layer, shared_head.norm, the head. Position i predicts t_{i+2}.
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

HERE = Path(__file__).parent
BATCH = 2
BLOCK = 128
MARGIN = 2e-4  # of scores in (0, 1), where two FP32 implementations differ by about 1e-6
HUB_ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
            "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001}  # fmt: skip

BASE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "num_nextn_predict_layers": 0, "max_position_embeddings": 128,
}  # fmt: skip

# name: (changes to BASE, how the case is made)
CASES = {
    "groups": ({"num_nextn_predict_layers": 1}, {
        # a checkpoint as save_pretrained leaves it: MTP announced (the default), never written
        "bias": "mixed", "length": 24, "zero_mask_differs": True,
    }),
    "yarn": ({"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "rope_theta": 10000.0}, "max_position_embeddings": 64,
        "qk_rope_head_dim": 16, "n_group": 2, "topk_group": 1}, {"length": 64}),
    "yarn_mscale": ({"rope_parameters": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32,
        "beta_fast": 2.0, "beta_slow": 0.25, "mscale": 1.0, "mscale_all_dim": 0.707,
        "rope_theta": 500.0}, "max_position_embeddings": 1280, "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-3}, {"length": 56, "hub": True, "bias": "mixed"}),
    "plain": ({"q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False,
               "n_group": 1, "topk_group": 1, "routed_scaling_factor": 0.6,
               "n_routed_experts": 6, "num_experts_per_tok": 3}, {"length": 24, "hub": True}),
    "half_rope": ({"rope_interleave": False, "first_k_dense_replace": 2}, {"length": 24}),
    "bf16": ({"first_k_dense_replace": 0, "num_hidden_layers": 2}, {
        "length": 24, "hub": True, "dtype": torch.bfloat16, "bias": "mixed",
    }),
    "mtp_sharded": ({"num_nextn_predict_layers": 1}, {
        "length": 24, "hub": True, "shards": 4, "bias": "negative", "zero_mask_differs": True,
    }),
    "fp8": ({  # partial blocks: 160 and 136 are one block and a bit, as kv_a's 576 rows are 4.5
        "hidden_size": 160, "num_hidden_layers": 2, "intermediate_size": 136, "q_lora_rank": 136,
        "kv_lora_rank": 144, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 20,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 24, "num_nextn_predict_layers": 1,
    }, {"length": 24, "hub": True, "shards": 2, "bias": "mixed", "dtype": torch.bfloat16,
        "fp8": True}),
}  # fmt: skip


def main() -> None:
    for name in sys.argv[1:] or CASES:
        changes, how = CASES[name]
        for seed in range(1000):
            if (golden := make(HERE / name, BASE | changes, how, seed)) is not None:
                break
        else:
            raise SystemExit(f"{name}: no seed gives wide enough routing decisions")
        np.savez_compressed(HERE / f"{name}.npz", **golden)
        size = sum(f.stat().st_size for f in [*(HERE / name).iterdir(), HERE / f"{name}.npz"])
        logits = golden["logits"]
        print(f"{name:12} seed {seed:3}  {size / 1e3:6.0f} kB  loss {golden['loss']:.3f}"
              f"  logits std {logits.std():.2f} max {abs(logits).max():.1f}")  # fmt: skip


def make(folder: Path, fields: dict, how: dict, seed: int) -> dict[str, np.ndarray] | None:
    """Write the checkpoint and return its golden arrays; None where a decision is too narrow."""
    generator = torch.Generator().manual_seed(seed)
    tensors, config_json = checkpoint(fields, how, generator)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if how.get("fp8"):
        write(folder, quantised(tensors), how["shards"])
        tensors = dequantised(quantised(tensors))
        config_json["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    else:
        write(folder, tensors, how.get("shards", 1))
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as plain:  # its own reading of partial blocks is another
        write(Path(plain), tensors, 1)
        unquantised = {k: v for k, v in config_json.items() if k != "quantization_config"}
        (Path(plain) / "config.json").write_text(json.dumps(unquantised))
        model = DeepseekV3ForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    tokens = torch.randint(fields["vocab_size"], (BATCH, how["length"]), generator=generator)
    watched = watch_routers(model)
    output = model(input_ids=tokens, labels=tokens)
    if not all(wide(w.router, w.logits) for w in watched):
        return None
    for w in watched:
        if not torch.equal(w.chosen, chosen_with(float("-inf"), w.router, w.logits)):
            raise SystemExit("this transformers does not mask rejected groups with -inf")
    if how.get("zero_mask_differs") and all(
        torch.equal(w.chosen, chosen_with(0.0, w.router, w.logits)) for w in watched
    ):
        return None
    golden = {"tokens": tokens.numpy().astype(np.int32), "logits": output.logits.detach().numpy(),
              "loss": np.float32(output.loss.item())}  # fmt: skip
    if not how.get("fp8"):
        output.loss.backward()
        golden |= {f"grad/{k}": g.numpy() for k, g in gradients(model)
                   if sampled(k, fields["first_k_dense_replace"])}  # fmt: skip
    if how.get("dtype") and not how.get("fp8"):
        stored = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=how["dtype"])
        golden["logits_stored"] = stored(input_ids=tokens).logits.float().detach().numpy()
    if any(name.endswith("eh_proj.weight") for name in tensors):
        golden["mtp_logits"] = mtp_logits(model, tensors, tokens).detach().numpy()
    return golden


# --- the checkpoint ----------------------------------------------------------------------------


def checkpoint(fields: dict, how: dict, generator) -> tuple[dict[str, torch.Tensor], dict]:
    """Random tensors under their on-disk names, and config.json."""
    layers, depths = fields["num_hidden_layers"], fields["num_nextn_predict_layers"]
    has_mtp = bool(depths and how.get("shards"))
    blocks = {"num_hidden_layers": layers + depths * has_mtp}  # an MTP block is one more layer
    with tempfile.TemporaryDirectory() as scratch:
        DeepseekV3ForCausalLM(DeepseekV3Config(**fields | blocks)).save_pretrained(scratch)
        shapes = load_file(Path(scratch) / "model.safetensors")
    if has_mtp:
        width = fields["hidden_size"]
        at = f"model.layers.{layers}"
        shapes |= {f"{at}.{norm}.weight": torch.empty(width)
                   for norm in ("enorm", "hnorm", "shared_head.norm")}  # fmt: skip
        shapes[f"{at}.eh_proj.weight"] = torch.empty(width, 2 * width)
    bias = how.get("bias", "zero")
    tensors = {name: filled(name, t.shape, bias, generator) for name, t in sorted(shapes.items())}
    if has_mtp:  # released checkpoints carry copies of what is shared
        tensors[f"{at}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{at}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    dtype = how.get("dtype", torch.float32)
    tensors = {n: t if n.endswith("correction_bias") else t.to(dtype) for n, t in tensors.items()}
    return tensors, config_of(fields, how.get("hub", False), dtype)


def filled(name: str, shape: torch.Size, bias: str, generator) -> torch.Tensor:
    """Random values of the size that keeps activations of order 1 and logits of order 1-10."""
    if name.endswith("correction_bias"):
        low, high = {"zero": (0, 0), "mixed": (-1.2, 0.4), "negative": (-2.0, -1.0)}[bias]
        return low + (high - low) * torch.rand(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.3 * noise
    if name == "model.embed_tokens.weight":
        return noise
    gain = 2.5 if name == "lm_head.weight" else 1.5 if name.endswith("gate.weight") else 1.0
    if "q_a_proj" in name or "kv_a_proj" in name:
        gain = 0.05  # latents so small that the epsilon of their norms matters
    return gain * noise / shape[1] ** 0.5


def config_of(fields: dict, hub: bool, dtype: torch.dtype) -> dict:
    """config.json as save_pretrained of transformers 5 writes it, or as the hub spells it."""
    with tempfile.TemporaryDirectory() as scratch:
        config = DeepseekV3Config(**fields)
        config.architectures, config.dtype = ["DeepseekV3ForCausalLM"], dtype
        config.save_pretrained(scratch)
        written = json.loads((Path(scratch) / "config.json").read_text())
    if not hub:
        return written
    rope = written.pop("rope_parameters")
    written["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    written["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    written["torch_dtype"] = written.pop("dtype")
    for own in ("head_dim", "qk_head_dim", "rope_interleave", "output_router_logits"):
        written.pop(own)
    return written | HUB_ONLY


def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The projections of attention and experts in E4M3, a scale for each block of 128 x 128, as
    DeepSeek's kernel makes them: max|W| is taken as 1e-4 at least. One block is made that small."""
    stored = {}
    for name, w in tensors.items():
        if not re.search(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$", name):
            stored[name] = w
            continue
        w = w.float()
        if name == "model.layers.0.self_attn.q_a_proj.weight":
            w[:BLOCK, BLOCK:] *= 1e-6
        grid = [torch.arange(n) // BLOCK for n in w.shape]
        amax = torch.zeros(*[1 + int(g[-1]) for g in grid])
        for i in range(amax.shape[0]):
            for j in range(amax.shape[1]):
                amax[i, j] = w[grid[0] == i][:, grid[1] == j].abs().max()
        scales = amax.clamp(min=1e-4) / 448.0
        stored[name] = (w / scales[grid[0]][:, grid[1]]).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
    return stored


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All in FP32, E4M3 times its scale."""
    plain = {}
    for name, w in stored.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = w.float()
        if (scales := stored.get(f"{name}_scale_inv")) is not None:
            rows, columns = (torch.arange(n) // BLOCK for n in w.shape)
            plain[name] = plain[name] * scales[rows][:, columns]
    return plain


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """One model.safetensors, or `shards` of them with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]  # neighbours land in different files
        save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


# --- what transformers says --------------------------------------------------------------------


class Routed(NamedTuple):
    """What one router saw and did: logits [X, E], chosen bool [X, E]."""

    router: torch.nn.Module
    logits: torch.Tensor
    chosen: torch.Tensor


def watch_routers(model) -> list[Routed]:
    """Filled by the next forward pass, one for each MoE layer."""
    watched = []

    def record(router, _, output):
        logits, _, experts = output
        chosen = torch.zeros_like(logits).scatter(1, experts, 1).bool()
        watched.append(Routed(router, logits.detach(), chosen.detach()))

    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(record)
    return watched


def group_scores(router, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Biased scores [X, G, E / G] and group scores [X, G]."""
    biased = logits.sigmoid() + router.e_score_correction_bias
    grouped = biased.view(len(logits), router.num_group, -1)
    return grouped, grouped.topk(2, dim=-1)[0].sum(-1)


def wide(router, logits: torch.Tensor) -> bool:
    """Whether the last taken and the first refused are MARGIN apart, for groups and experts."""
    grouped, scores = group_scores(router, logits)
    kept = keep(scores, router.topk_group)
    masked = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    gaps = [gap(masked, router.top_k)]
    if router.topk_group < router.num_group:
        gaps.append(gap(scores, router.topk_group))
    return min(gaps) > MARGIN


def keep(scores: torch.Tensor, best: int) -> torch.Tensor:
    return torch.zeros_like(scores).scatter(1, scores.topk(best)[1], 1).bool()


def gap(scores: torch.Tensor, best: int) -> float:
    ordered = scores.sort(descending=True)[0]
    return (ordered[:, best - 1] - ordered[:, best]).min().item()


def chosen_with(rejected_score: float, router, logits: torch.Tensor) -> torch.Tensor:
    """bool [X, E]: the experts that masking rejected groups with `rejected_score` chooses."""
    grouped, scores = group_scores(router, logits)
    rejected = ~keep(scores, router.topk_group)[..., None]
    return keep(grouped.masked_fill(rejected, rejected_score).flatten(1), router.top_k)


def gradients(model):
    """(on-disk name, gradient); the fused experts taken apart again."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            for expert, fused in enumerate(gradient):
                gate, up = fused.chunk(2)
                yield f"{base}{expert}.gate_proj.weight", gate
                yield f"{base}{expert}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("down_proj")
            yield from ((f"{base}{e}.down_proj.weight", g) for e, g in enumerate(gradient))
        else:
            yield name, gradient


def sampled(name: str, first_moe_layer: int) -> bool:
    """Everything but most of the experts: numbers 0 to 2 of the first MoE layer are kept."""
    expert = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
    return expert is None or (int(expert[1]) == first_moe_layer and int(expert[2]) < 3)


def mtp_logits(model, tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """float32 [B, T - 1, V]: position i from h_i and t_{i+1}, predicting t_{i+2}."""
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    prefix = f"model.layers.{layers}."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    block = type(model.model.layers[0])(model.config, layers).eval()
    fuse = {"gate_up_proj": lambda at: torch.cat([own[f"{at}.gate_proj.weight"],
                                                  own[f"{at}.up_proj.weight"]]),
            "down_proj": lambda at: own[f"{at}.down_proj.weight"]}  # fmt: skip
    state = {}
    for name in block.state_dict():
        kind = name.removeprefix("mlp.experts.")
        if kind in fuse:
            experts = range(model.config.n_routed_experts)
            state[name] = torch.stack([fuse[kind](f"mlp.experts.{e}") for e in experts])
        else:
            state[name] = own[name]
    block.load_state_dict(state)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(
            x, (width,), own[f"{name}.weight"], model.config.rms_norm_eps
        )

    h = model.model(input_ids=tokens).last_hidden_state[:, :-1]  # after the final norm
    ahead = model.model.embed_tokens(tokens[:, 1:])
    joint = torch.cat([norm("enorm", ahead), norm("hnorm", h)], dim=-1)
    x = joint @ own["eh_proj.weight"].T
    length = x.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    rotation = model.model.rotary_emb(x, torch.arange(length)[None])
    x = block(x, attention_mask=mask, position_embeddings=rotation)
    return norm("shared_head.norm", x) @ own["shared_head.head.weight"].T


if __name__ == "__main__":
    main()
