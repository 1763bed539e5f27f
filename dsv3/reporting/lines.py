"""JSON lines that survive a killed run: one object a line, appended, cut back on resume.

A file is opened for each append, so nothing is held that could fail later. A run killed in
mid-write leaves a torn last line; readers ignore it and the next run removes it. JSON has no NaN:
a value that is not finite is written as null, and named under `non_finite`:

    {"step": 7, "loss": null, "lr": 0.003, "non_finite": {"loss": "nan"}}
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.errors import DataError
from dsv3.files import write_atomically


def append(path: Path, content: bytes) -> None:
    """Raises the OSError of a full or read-only disk with `path` as its filename."""
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def encoded(row: Mapping[str, Any]) -> bytes:
    """The line of `row`, whose numbers at the top level may be NaN or infinite."""
    odd = {key: str(value) for key, value in row.items() if not is_finite(value)}
    if odd:
        row = {**row, **dict.fromkeys(odd), "non_finite": odd}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, NaN and infinities restored. Raises DataError naming a bad line."""
    rows = [row for _, row in _lines(path)]
    for row in rows:
        row.update({key: float(text) for key, text in row.pop("non_finite", {}).items()})
    return rows


def cut_back(path: Path, counters: Mapping[str, int]) -> None:
    """Drop the lines written after a checkpoint: those with any counter beyond `counters`."""
    if not path.exists():
        return
    kept = [
        line for line, row in _lines(path) if all(row.get(k, 0) <= n for k, n in counters.items())
    ]
    content = b"".join(line + b"\n" for line in kept)
    if content != path.read_bytes():
        write_atomically(path, content)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(line, object) of each line; a last line that was torn is left out."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("no object")
        except ValueError:
            if number == len(lines):
                return
            raise DataError(f"{path}:{number} is no line of metrics; remove it") from None
        yield line, row
