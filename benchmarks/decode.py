"""Decoding: with the latent cache and without, over growing contexts, beside transformers, drafted.

    python -m benchmarks.decode context [--contexts 128 512 2048 8192]
    python -m benchmarks.decode experts [--experts 8 64 256] [--batch 1]
    python -m benchmarks.decode transformers --torch-python PATH
    python -m benchmarks.decode speculative --workdir runs/tiny

`context` times a token of a model of the shape of `configs/tiny.py` behind so many others, from the
cache in either form and by running the whole sequence again. `experts` times a step of a wider one
with so many experts, 6 of which a token meets, in FP32, BF16 and FP8. `transformers` writes a model
like the first in the official layout and lets both complete the same prompts greedily, in turns, on
the same cores; PATH is the interpreter of an environment with torch and transformers, and what is
compared is the whole call, the prompt included, compilation not. `speculative` completes held-out
text of a run, plainly and with drafts, greedily and not, and says whether the greedy tokens are the
same.

Seconds are wall clock, medians; each command prints a table. A busy machine spoils them.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.checkpoint import huggingface
from dsv3.checkpoint.exporting import export, of_model
from dsv3.checkpoint.trained import from_workdir
from dsv3.cli import Parser
from dsv3.config import Bf16Dot, Config, Fp8Dot, Mla, Model, Moe
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import exits_cleanly
from dsv3.evaluation.bits_per_byte import held_out, held_out_texts
from dsv3.host import keep_freed_memory
from dsv3.inference import decode
from dsv3.inference.cache import FORMS, FormName
from dsv3.inference.decode import Plan
from dsv3.inference.generate import acceptance, drafts_of, generate, prompt_tokens
from dsv3.inference.rerun import last_logits
from dsv3.inference.sampling import Greedy, Random, Sampler
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import on_this_platform
from dsv3.sweeps import load_config

ROOT = Path(__file__).parents[1]
NEVER = [-1]  # a stop id that no token has


def random_model(config: Model, seed: int = 0) -> Transformer:
    """normal(0, 0.05) in every matrix, gains of 1: nothing to compile."""
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
        gain = "gain" in jax.tree_util.keystr(path)
        return jnp.asarray(gain + (not gain) * rng.normal(0, 0.05, abstract.shape), abstract.dtype)

    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    return jax.tree_util.tree_map_with_path(leaf, abstract)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median wall clock of `call`, its result awaited, behind one that is not timed."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# --- context -----------------------------------------------------------------------------------


def cached_seconds(model: Transformer, context: int, form: FormName, steps: int) -> float:
    """Seconds of one token behind `context` others, from `steps` of them."""
    size = 1 << (context + steps).bit_length()
    plan = Plan(Greedy(), model.config.vocab, jnp.dtype("float32"), form=form)
    rng = np.random.default_rng(0)
    tokens_BS = rng.integers(model.config.vocab, size=(1, size), dtype=np.int32)
    length_B, limit_B = (np.array([n], np.int32) for n in (context, context + steps))
    seconds = []
    for _ in range(4):
        state = jax.block_until_ready(
            decode.begin(plan, model, tokens_BS, length_B, 0, max(64, size // 2))
        )
        start = time.perf_counter()
        stop = np.array(NEVER, np.int32)
        jax.block_until_ready(decode.advance(plan, model, state, limit_B, stop, 0, steps))
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds[1:])


def rerun_seconds(model: Transformer, context: int) -> float:
    """Seconds of one token by running the whole sequence."""
    tokens_BS = np.ones((1, context), np.int32)
    length_B = np.array([context], np.int32)
    arguments = model, tokens_BS, length_B, model.config.vocab, None
    return seconds_of(functools.partial(last_logits, *arguments), 3)


def run_context(options: argparse.Namespace) -> None:
    model = random_model(load_config(ROOT / "configs/tiny.py").model)
    print("| tokens before | " + " | ".join(f"cache {f}" for f in FORMS) + " | run again | ratio |")
    print("|---" * (len(FORMS) + 3) + "|")
    for context in options.contexts:
        cached = {form: cached_seconds(model, context, form, options.steps) for form in FORMS}
        again = rerun_seconds(model, context)
        cells = [f"{1e3 * s:.2f} ms" for s in (*cached.values(), again)]
        print(
            f"| {context:,} | {' | '.join(cells)} | {again / cached['compute']:.1f} |", flush=True
        )


# --- experts -----------------------------------------------------------------------------------


def with_experts(experts: int, dot: Bf16Dot | Fp8Dot) -> Model:
    mla = Mla(heads=8, query_latent=256, kv_latent=128, nope_dim=64, rope_dim=32, value_dim=64)
    moe = Moe(routed_experts=experts, experts_per_token=6, groups=1, groups_per_token=1,
              expert_width=256, block=64)  # fmt: skip
    return Model(vocab=1024, width=512, layers=4, dense_layers=1, dense_width=1024, mtp_depths=0,
                 mla=mla, moe=moe, dot=dot)  # fmt: skip


def run_experts(options: argparse.Namespace) -> None:
    dots = {"float32": Bf16Dot(), "bfloat16": Bf16Dot(), "fp8": Fp8Dot()}
    print(f"| experts | {' | '.join(dots)} |\n{'|---' * (len(dots) + 1)}|")
    for experts in options.experts:
        cells = []
        for name, dot in dots.items():
            config = Config(model=with_experts(experts, dot))
            model = random_model(on_this_platform(config).model)
            call = functools.partial(
                generate, model, [[3 + row, 4] for row in range(options.batch)], Greedy(),
                stop=NEVER, vocab=1024, context=256,
                dtype=jnp.dtype("bfloat16" if name == "fp8" else name),
            )  # fmt: skip
            few, many = (
                seconds_of(functools.partial(call, max_tokens=n), 5) for n in (4, 4 + options.steps)
            )
            cells.append(f"{1e3 * (many - few) / options.steps:.1f} ms")
        print(f"| {experts} | {' | '.join(cells)} |", flush=True)


# --- transformers ------------------------------------------------------------------------------


def run_transformers(options: argparse.Namespace) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    config = dataclasses.replace(load_config(ROOT / "configs/tiny.py").model, mtp_depths=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "hf")
        whole = dataclasses.replace(Config(), model=config)
        export(of_model(whole, random_model(config)), folder, dtype="float32")
        _, model = huggingface.load(folder)
        rng = np.random.default_rng(0)
        shape = (options.batch, options.prompt)
        prompts = rng.integers(2, config.vocab, shape).tolist()
        Path(name, "prompts.json").write_text(json.dumps(prompts))
        ours = functools.partial(
            generate, model, prompts, Greedy(), options.new, stop=NEVER, vocab=config.vocab,
            context=options.prompt + options.new,
        )  # fmt: skip
        command = [options.torch_python, "benchmarks/decode_transformers.py", "--hf", str(folder),
                   "--prompts", str(Path(name, "prompts.json")),
                   "--new", str(options.new), "--threads", str(options.cores)]  # fmt: skip
        seconds: dict[str, list[float]] = {"dsv3": [], "transformers": []}
        theirs: dict = {}
        for _ in range(options.rounds):
            seconds["dsv3"].append(seconds_of(ours, 3))
            run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            theirs = json.loads(run.stdout.splitlines()[-1])
            seconds["transformers"].append(statistics.median(theirs["seconds"]))
    same = sum(c.tokens == t for c, t in zip(ours(), theirs["tokens"], strict=True))
    tokens = options.batch * options.new
    print(f"{theirs['what']}; {same} of {options.batch} completions are the same tokens")
    print("| | tokens/s | rounds | ratio |\n|---|---|---|---|")
    yardstick = statistics.median(seconds["transformers"])
    for name, of in seconds.items():
        rounds = ", ".join(f"{s:.2f} s" for s in of)
        median = statistics.median(of)
        print(f"| {name} | {tokens / median:,.0f} | {rounds} | {median / yardstick:.2f} |")


# --- speculative -------------------------------------------------------------------------------


def held_out_prompts(tokenizer: Tokenizer, texts: list[str], count: int, most: int):
    """`count` beginnings of lines of the texts with 8 to `most` tokens each."""
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(count):
        text = texts[rng.integers(len(texts))]
        tokens = prompt_tokens(tokenizer, text[rng.integers(max(len(text) - 8 * most, 1)) :])
        prompts.append(tokens[: rng.integers(8, most + 1)])
    return prompts


def run_speculative(options: argparse.Namespace) -> None:
    trained = from_workdir(options.workdir, print)
    tokenizer, config = trained.tokenizer(), trained.config
    drafts, context = drafts_of(trained.model), config.training.sequence_length
    texts = held_out_texts(held_out(config.data), config.evaluation.held_out_bytes or 100_000)
    prompts = held_out_prompts(tokenizer, texts, options.prompts, context // 2)
    samplers: dict[str, Sampler] = {"greedy": Greedy(), "temperature 1": Random()}
    for name, sampler in samplers.items():
        seconds, written = [], []
        for ahead in (0, drafts):
            call = functools.partial(
                generate, trained.model, sampler=sampler, max_tokens=context // 2, stop=NEVER,
                vocab=tokenizer.vocab_size, context=context, drafts=ahead,
                dtype=jnp.dtype(config.training.compute_dtype),
            )  # fmt: skip
            batches = [
                prompts[i : i + options.batch] for i in range(0, len(prompts), options.batch)
            ]
            call(prompts=[[tokenizer.eos] * (context // 2)] * len(batches[0]))
            start = time.perf_counter()
            written.append([completion for batch in batches for completion in call(prompts=batch)])
            seconds.append(time.perf_counter() - start)
        same = sum(a.tokens == b.tokens for a, b in zip(*written, strict=True))
        tokens = sum(len(c.tokens) for c in written[0])
        print(
            f"{name}, {options.batch} at a time: {tokens / seconds[0]:,.0f} tokens/s plain, "
            f"{tokens / seconds[1]:,.0f} drafted ({seconds[0] / seconds[1]:.2f} x); "
            f"{acceptance(written[1], drafts)}; {same} of {len(prompts)} the same", flush=True,
        )  # fmt: skip


@exits_cleanly
def main() -> None:
    keep_freed_memory()
    parser = Parser(__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="context | experts | transformers | speculative"
    )
    context = commands.add_parser("context", help="a token's time as the context grows")
    context.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192])
    context.add_argument("--steps", type=int, default=64)
    context.set_defaults(run=run_context)
    many = commands.add_parser("experts", help="a step's time as experts become more")
    many.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    many.add_argument("--batch", type=int, default=1)
    many.add_argument("--steps", type=int, default=32)
    many.set_defaults(run=run_experts)
    beside = commands.add_parser("transformers", help="beside transformers' generate")
    beside.add_argument("--torch-python", required=True, metavar="PATH")
    beside.add_argument("--batch", type=int, default=1)
    beside.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    beside.add_argument("--new", type=int, default=256, help="new tokens of each")
    beside.add_argument("--rounds", type=int, default=3)
    beside.add_argument("--cores", type=int, default=2)
    beside.set_defaults(run=run_transformers)
    drafted = commands.add_parser("speculative", help="with drafts and without")
    drafted.add_argument("--workdir", required=True, metavar="DIR")
    drafted.add_argument("--prompts", type=int, default=200)
    drafted.add_argument("--batch", type=int, default=1, help="prompts completed at a time")
    drafted.set_defaults(run=run_speculative)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
