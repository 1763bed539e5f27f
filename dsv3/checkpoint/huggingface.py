"""Checkpoints of the hub: DeepSeek-V3 in the released layout, read into our model and written.

    config, model = huggingface.load("DIR")
    huggingface.export(exporting.of_model(config, model), "OUT", fp8=True)

    python -m dsv3.checkpoint.huggingface import --hf DIR --workdir DIR
    python -m dsv3.checkpoint.huggingface export --workdir DIR --out DIR [--fp8] [--ema]
    python -m dsv3.checkpoint.huggingface export --hf DIR --out DIR [--fp8]

DIR holds config.json and model.safetensors, or shards of it with an index. `export --hf` converts
one folder of the hub into another, from FP8 to BF16 for instance. What is written appears whole or
not at all; what was interrupted goes on with the same command.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from dsv3 import counts
from dsv3.checkpoint import exporting
from dsv3.checkpoint.exporting import export
from dsv3.checkpoint.folder import Folder, Place
from dsv3.checkpoint.importing import import_checkpoint
from dsv3.cli import Parser
from dsv3.config import Config
from dsv3.data.progress import progress_bars
from dsv3.errors import UserError, exits_cleanly
from dsv3.model.transformer import Transformer

__all__ = ["export", "import_checkpoint", "load"]


def load(
    folder: str | os.PathLike, dtype: Any = None, place: Place | None = None
) -> tuple[Config, Transformer]:
    """The configuration and model of a checkpoint folder.

    Parameters have the precision of the files, the wider one where tensors stacked into one
    parameter differ; or `dtype`. A checkpoint with FP8 blocks becomes FP32 throughout, each weight
    the E4M3 number times its scale. The router's selection bias is FP32 always.

    `place(path, shape)` says where a parameter goes, None meaning the default device; of one that
    is sharded each process reads what its devices hold. Raises CheckpointError, one line naming the
    file, field or tensor, for whatever is wrong in the folder.
    """
    found = Folder(folder)
    return found.config, found.model(dtype, place)


# --- the commands ------------------------------------------------------------------------------


def run_import(options: argparse.Namespace) -> None:
    with progress_bars() as progress:
        config = import_checkpoint(options.hf, options.workdir, progress)
    print(f"{options.workdir}: {described(config)}")


def run_export(options: argparse.Namespace) -> None:
    if options.ema and options.hf:
        raise UserError("--ema belongs to --workdir: a Hugging Face folder holds no average")
    if not 0 < options.shard_gb < 1e9:
        raise UserError(f"--shard-gb {options.shard_gb} must lie between 0 and 1e9")
    if options.hf:
        source = exporting.of_folder(options.hf)
    else:
        source = exporting.of_workdir(options.workdir, print, ema=options.ema)
    with progress_bars() as progress:
        export(
            source,
            options.out,
            fp8=options.fp8,
            dtype=options.dtype,
            shard_bytes=int(options.shard_gb * 1e9),
            progress=progress,
        )
    print(f"{options.out}: {described(source.config)}")


def described(config: Config) -> str:
    model = config.model
    return (
        f"{model.layers} layers, {model.dense_layers} of them dense, {model.mtp_depths} MTP, "
        f"{counts.parameters(model).total:,} parameters"
    )


def parser() -> Parser:
    top = Parser(__doc__, prog="python -m dsv3.checkpoint.huggingface")
    commands = top.add_subparsers(required=True, metavar="import | export")

    command = commands.add_parser("import", help="make a workdir from a checkpoint of the hub")
    command.add_argument("--hf", required=True, metavar="DIR", help="config.json, *.safetensors")
    command.add_argument("--workdir", required=True, metavar="DIR", help="new, or an empty folder")
    command.set_defaults(run=run_import)

    command = commands.add_parser("export", help="write a checkpoint of the hub")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="of a run")
    source.add_argument("--hf", metavar="DIR", help="config.json, *.safetensors: to be converted")
    command.add_argument("--out", required=True, metavar="DIR", help="new, or an empty folder")
    command.add_argument("--fp8", action="store_true", help="projections in E4M3 with scales")
    command.add_argument("--dtype", choices=exporting.DTYPES, default="bfloat16",
                         help="of what is not in FP8; default bfloat16")  # fmt: skip
    command.add_argument("--ema", action="store_true", help="of a run: the averaged parameters")
    command.add_argument("--shard-gb", type=float, default=exporting.SHARD_BYTES / 1e9,
                         metavar="GB", help="of a file at most; default 5")  # fmt: skip
    command.set_defaults(run=run_export)
    return top


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    for name in ("hf", "workdir", "out"):
        if getattr(options, name, None) == "":
            raise UserError(f"--{name} is empty")
    options.run(options)


if __name__ == "__main__":
    main()
