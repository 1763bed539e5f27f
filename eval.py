"""Evaluate a trained model: a run's workdir, or a checkpoint in the layout of the Hugging Face hub.

    python eval.py bpb      --workdir runs/tiny            bits per byte on held-out documents
    python eval.py generate --workdir runs/tiny --prompt 'def main(' --temperature 0.8 --top-p 0.95
    python eval.py generate --hf DIR --prompt 'def f(' --fim-suffix 'return x'     what lies between
    python eval.py generate --workdir runs/tiny --prompt 'def f(' --stop 'class ' --speculative
    python eval.py logits   --hf DIR --tokens T.npy --out O.npz
    python eval.py tasks    --workdir runs/tiny --tasks arc_easy.jsonl infilling.jsonl --out R.json
    python eval.py lm-eval  --workdir runs/tiny --tasks arc_easy,hellaswag      the harness's own

`generate` writes the new text to stdout and nothing else; with `--speculative` it says on stderr
how many drafts of the MTP modules were right. `logits` reads integers [B, T] and writes
float32 `logits` [B, T, V], for a model with MTP also `mtp_logits` [B, T, V], its depth 1, and
`mtp_logits_2`, ... of further depths. `bpb` scores `--set data.corpus=...`, by default the run's
own; with `--hf`, where no run says which, that of the default configuration, which it names.
A run's model lies on the mesh that it was trained on where that has its devices here, else on one;
`--set parallel.local=8` and the like say which, also with `--hf`. Devices of several processes are
one mesh, as in train.py: all get the same command, and the first one says and writes what there is.
Task files are described in docs/evaluation.md; `--execute` runs the programs that a model writes.
"""

import argparse
import functools
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.bindings import Binding, apply
from dsv3.checkpoint.trained import Trained, from_hf, from_workdir, on_one_device
from dsv3.cli import Parser
from dsv3.config import Config
from dsv3.errors import ConfigError, UserError, exits_cleanly
from dsv3.evaluation import bits_per_byte as bpb
from dsv3.evaluation.harness import Reader, evaluate, require_fit
from dsv3.evaluation.logits import logits, read_tokens
from dsv3.evaluation.sandbox import Limits, runner
from dsv3.evaluation.tasks import read_task
from dsv3.files import write_atomically
from dsv3.host import keep_freed_memory
from dsv3.inference import generate as inference
from dsv3.inference.sampling import sampler_of
from dsv3.parallel import launch
from dsv3.parallel import mesh as meshes
from dsv3.parallel.processes import exchange, is_first, require_same


def run_bpb(trained: Trained, config: Config, options: argparse.Namespace) -> None:
    tokenizer = trained.tokenizer()
    texts = bpb.held_out_texts(bpb.held_out(config.data), config.evaluation.held_out_bytes)
    length, dtype = config.training.sequence_length, jnp.dtype(config.training.compute_dtype)
    found = bpb.bits_per_byte(trained.model, tokenizer, texts, length, dtype)
    show(f"held out: {len(texts):,} documents, {found.bytes:,} bytes, {found.tokens:,} tokens"
         f" of data.corpus = {config.data.corpus!r}")  # fmt: skip
    show(f"model     {found.value:.4f} bits per byte")
    show(f"xz -9     {bpb.compressor_bits_per_byte(texts):.4f} bits per byte")


def run_generate(trained: Trained, config: Config, options: argparse.Namespace) -> None:
    drafts = inference.drafts_of(trained.model) if options.speculative else 0
    tokenizer, context = trained.tokenizer(), inference.context_length(config)
    texts = [text for text in (options.prompt, options.fim_suffix) if text is not None]
    named = [token for token in tokenizer.special if any(token in text for text in texts)]
    if named and not options.as_text:
        raise UserError(f"the prompt holds {min(named)!r}: no text names a special token; "
                        "--as-text reads it like any other")  # fmt: skip
    if options.fim_suffix is None:
        prompt = inference.prompt_tokens(tokenizer, options.prompt or "")
    else:
        prompt = inference.fim_tokens(tokenizer, options.prompt or "", options.fim_suffix)
    [completion] = inference.generate(
        trained.model,
        [prompt],
        options.sampler,
        options.max_tokens,
        stop=[tokenizer.eos],
        vocab=tokenizer.vocab_size,
        context=context,
        seed=options.seed,
        dtype=jnp.dtype(config.training.compute_dtype),
        ends=inference.at_text(tokenizer, options.stop) if options.stop else None,
        cache=options.cache,
        drafts=drafts,
    )
    show(inference.completion_text(tokenizer, completion, options.stop))
    if drafts:
        warn(inference.acceptance([completion], drafts))
    if not completion.stopped and len(completion.tokens) < options.max_tokens:
        warn(f"ended after {len(completion.tokens)} tokens: the context of {context} is full")


def run_logits(trained: Trained, config: Config, options: argparse.Namespace) -> None:
    tokens_BT = read_tokens(options.tokens, config.model.vocab)
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **logits(trained.model, tokens_BT))
    write(options.out, content.getvalue())


def run_tasks(trained: Trained, config: Config, options: argparse.Namespace) -> None:
    reader, run = _reader(trained, config), None
    if options.execute:
        alone, network = runner(options.limits)
        run = functools.partial(for_all, alone)
        warn(f"programs run as you, with limits; network {network}")
    for task in options.tasks:
        require_fit(reader, task)
    results = {}
    for task in options.tasks:
        found = evaluate(reader, task, run)
        show(f"{task.name}: {found.line()}")
        results[task.name] = found.as_json()
        if options.out:  # after each: what was computed outlives a later task's end
            write(options.out, json.dumps(results, indent=1, allow_nan=False) + "\n")


def run_lm_eval(trained: Trained, config: Config, options: argparse.Namespace) -> None:
    from dsv3.evaluation import lm_eval_adapter  # an extra: seconds to import, if it is there

    names = [name for name in options.tasks.split(",") if name]
    found = lm_eval_adapter.run(
        _reader(trained, config), names, options.include_path, options.shots, options.limit
    )
    for name, figures in found["results"].items():
        figures = {k: v for k, v in figures.items() if isinstance(v, float)}
        show(f"{name}: {' · '.join(f'{k} {v:.4f}' for k, v in figures.items())}")
    if options.out:
        text = json.dumps(found, default=str)
        found = json.loads(text, parse_constant=lambda _: None)  # an error of one item is nan
        write(options.out, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _reader(trained: Trained, config: Config) -> Reader:
    dtype = jnp.dtype(config.training.compute_dtype)
    return Reader(trained.model, trained.tokenizer(), inference.context_length(config), dtype)


def check_tasks(options: argparse.Namespace) -> None:
    check_counts(options, "limit")
    options.limits = Limits(options.seconds, options.megabytes)
    options.tasks = [read_task(path, options.limit, options.shots) for path in options.tasks]
    for task in options.tasks:
        if options.shots is not None and task.shots < options.shots:
            warn(f"{task.name}: --shots {options.shots}, but it holds {task.shots} demonstrations")
    names = [task.name for task in options.tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks names two files {twice[0]!r}: results go by that name")
    check_out(options)


def check_lm_eval(options: argparse.Namespace) -> None:
    check_counts(options, "limit")
    check_out(options)


def check_counts(options: argparse.Namespace, *positive: str) -> None:
    for name in ("shots", *positive):
        value, least = getattr(options, name), 0 if name == "shots" else 1
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")


def check_generate(options: argparse.Namespace) -> None:
    if options.prompt == "":
        raise UserError("--prompt is empty; without it the model begins a document")
    if "" in options.stop:
        raise UserError("--stop '' is in every text")
    options.sampler = sampler_of(options.temperature, options.top_k, options.top_p)


def check_out(options: argparse.Namespace) -> None:
    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        raise UserError(f"--out {options.out} is a folder, or lies in one that does not exist")


COMMANDS = "bpb", "generate", "logits", "tasks", "lm-eval"
# Options that processes need not have alike, and those that are no text (`set` goes by field).
OF_A_PROCESS = ("process", "coordinator", "join_seconds", "run", "check", "set")


def parser() -> Parser:
    top = Parser(__doc__)
    commands = top.add_subparsers(required=True, metavar=" | ".join(COMMANDS))
    _command(commands, "bpb", "bits per byte on held-out documents", run_bpb)

    text = _command(commands, "generate", "complete a prompt, or fill in", run_generate)
    text.set_defaults(check=check_generate)
    text.add_argument("--prompt", metavar="TEXT", help="without it the model begins a document")
    text.add_argument("--fim-suffix", metavar="TEXT", help="fill in between the prompt and this")
    text.add_argument("--as-text", action="store_true",
                      help="spelled-out special tokens in them are text")  # fmt: skip
    text.add_argument("--speculative", action="store_true", help="MTP modules draft tokens ahead")
    text.add_argument("--cache", choices=inference.FORMS, default="compute",
                      help="how latents are stored: in the compute dtype, or in FP8")  # fmt: skip
    text.add_argument("--max-tokens", type=int, default=64)
    text.add_argument("--stop", action="append", default=[], metavar="TEXT",
                      help="ends the new text, which leaves it out; repeatable")  # fmt: skip
    text.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    text.add_argument("--top-k", type=int)
    text.add_argument("--top-p", type=float)
    text.add_argument("--seed", type=int, default=0)

    arrays = _command(commands, "logits", "logits of given tokens, in FP32", run_logits)
    arrays.set_defaults(check=check_out)
    arrays.add_argument("--tokens", required=True, metavar="T.npy", help="integers [B, T]")
    arrays.add_argument("--out", required=True, type=Path, metavar="O.npz")

    tasks = _command(commands, "tasks", "figures of task files", run_tasks)
    tasks.set_defaults(check=check_tasks)
    tasks.add_argument("--tasks", required=True, nargs="+", metavar="FILE", help="JSONL")
    tasks.add_argument("--execute", action="store_true", help="RUN the programs that the model "
                       "writes, as you, in processes with limits")  # fmt: skip
    tasks.add_argument("--seconds", type=int, default=10, help="that such a program may take")
    tasks.add_argument("--megabytes", type=int, default=1024, help="that it may use")

    theirs = _command(commands, "lm-eval", "tasks of lm-evaluation-harness", run_lm_eval)
    theirs.set_defaults(check=check_lm_eval)
    theirs.add_argument("--tasks", required=True, metavar="NAME,NAME")
    theirs.add_argument("--include-path", metavar="DIR", help="of your own task files")

    for command in (tasks, theirs):
        command.add_argument("--shots", type=int, metavar="N", help="demonstrations")
        command.add_argument("--limit", type=int, metavar="N", help="only the first items")
        command.add_argument("--out", type=Path, metavar="R.json")
    return top


def _command(commands, name: str, what: str, run) -> Parser:
    command = commands.add_parser(name, help=what, description=what)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="of a run")
    source.add_argument("--hf", metavar="DIR", help="config.json, *.safetensors, tokenizer.json")
    command.add_argument("--ema", action="store_true", help="of a run: the averaged parameters")
    command.add_argument("--dtype", choices=("float32", "bfloat16"),
                         help="of --hf: what weights are held in; else as they are stored, FP32 "
                         "where some are in FP8")  # fmt: skip
    command.add_bindings()
    command.add_processes()
    command.set_defaults(run=run, check=lambda options: None)
    return command


def load(options: argparse.Namespace) -> tuple[Trained, Config]:
    """The model that the options name, and its configuration with `--set` bound."""
    if options.ema and options.hf:
        raise UserError("--ema belongs to --workdir: a Hugging Face folder holds no average")
    if options.dtype and not options.hf:
        raise UserError("--dtype belongs to --hf: a run's parameters are FP32")
    bind = functools.partial(bound, options.set)
    if options.hf:
        trained = from_hf(options.hf, bind, options.dtype)
    else:
        trained = from_workdir(options.workdir, warn, ema=options.ema, bind=bind)
    return trained, trained.config


def bound(bindings: list[Binding], trained: Config) -> Config:
    """The configuration of what was trained, bound for evaluation."""
    config = apply(trained, bindings)
    if replace(config.model, remat=trained.model.remat) != trained.model:  # remat computes the same
        raise ConfigError("--set model...: a trained model stays as it is")
    if not any(binding.path.partition(".")[0] == "parallel" for binding in bindings):
        try:
            meshes.build(config.parallel)
        except ConfigError as error:
            if jax.process_count() > 1:
                raise
            warn(f"on one device: {error}")
            config = on_one_device(config)
    return config


def for_all(run: Callable[[str], bool], program: str) -> bool:
    """What `run` says of a program, which the first process runs."""
    return json.loads(exchange(json.dumps(is_first() and run(program)))[0])


def show(text: str) -> None:
    """Print what stdout's encoding can say of `text`, '?' for the rest."""
    if is_first():
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), flush=True)


def warn(message: str) -> None:
    if is_first():
        print(message, file=sys.stderr)


def write(path: Path, content: bytes | str) -> None:
    if is_first():
        write_atomically(path, content)


def work(options: argparse.Namespace) -> None:
    asked = {f"--{name}": str(v) for name, v in vars(options).items() if name not in OF_A_PROCESS}
    require_same(asked | {binding.path: binding.value for binding in options.set})
    options.check(options)
    trained, config = load(options)
    jax.config.update(
        "jax_compilation_cache_dir", str(Path(config.data.cache).expanduser() / "xla")
    )
    options.run(trained, config, options)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    options = parser().parse_args(arguments)
    place = launch.place_of(options.coordinator, options.processes, options.process)
    launch.run(place, options.join_seconds, functools.partial(work, options))


if __name__ == "__main__":
    main()
