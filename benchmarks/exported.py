"""Do checkpoints that are exported here say the same in transformers?

    python -m benchmarks.exported --torch-python PATH [FOLDER ...]

PATH is the interpreter of an environment that has torch and transformers
(`exported_transformers.py` says which). Each FOLDER, a checkpoint of the hub (by default the golden
ones), becomes a workdir and is exported from it in FP32 and in BF16; transformers reads the result
and computes in FP32. Printed are the largest differences of logits, the main model's and MTP's,
between it and this program on what was exported, and whether transformers speculates with the MTP
layer. About three minutes on two cores.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsv3.checkpoint import exporting, huggingface
from dsv3.cli import Parser
from dsv3.errors import exits_cleanly
from dsv3.evaluation.logits import logits

ROOT = Path(__file__).parents[1]
BATCH, LENGTH = 2, 24


def compare(folder: Path, dtype: str, torch_python: str, scratch: Path) -> str:
    """A row of the table."""
    workdir, out = scratch / "workdir", scratch / "exported"
    huggingface.import_checkpoint(folder, workdir)
    huggingface.export(exporting.of_workdir(workdir, print), out, dtype=dtype)
    config, model = huggingface.load(out, "float32")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab, (BATCH, LENGTH), np.int32)
    np.save(scratch / "tokens.npy", tokens)
    script = ROOT / "benchmarks" / "exported_transformers.py"
    command = [torch_python, script, out, scratch / "tokens.npy", scratch / "theirs.npz"]
    said = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    info = json.loads(said.splitlines()[-1])
    ours, theirs = logits(model, tokens), dict(np.load(scratch / "theirs.npz"))
    main = np.abs(ours["logits"] - theirs["logits"]).max()
    cells = [folder.name, dtype, f"{np.abs(theirs['logits']).max():.1f}", f"{main:.1e}"]
    if "mtp_logits" in theirs:
        cells.append(f"{np.abs(ours['mtp_logits'][:, :-1] - theirs['mtp_logits']).max():.1e}")
        cells.append(str(np.array_equal(theirs["plain"], theirs["speculated"])))
    else:
        cells += ["–", "–"]
    faults = len(info["missing_keys"]) + len(info["mismatched_keys"])
    unused = {name.split(".")[2] for name in info["unexpected_keys"]}
    assert unused <= {str(config.model.layers)}, unused  # transformers' own forward skips MTP
    return f"| {' | '.join(cells)} | {faults} |"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--torch-python", required=True, metavar="PATH")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    golden = sorted(path.parent for path in (ROOT / "tests" / "golden").glob("*/config.json"))
    print(
        "| checkpoint | exported in | largest logit | difference | of MTP | speculates | faults |"
    )
    print("|---|---|---|---|---|---|---|")
    for folder in options.folders or golden:
        for dtype in exporting.DTYPES:
            with tempfile.TemporaryDirectory() as scratch:
                row = compare(folder, dtype, options.torch_python, Path(scratch))
            print(row, flush=True)


if __name__ == "__main__":
    main()
