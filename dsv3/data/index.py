"""The index of a folder of prepared data: the SHA-256 of every file in it, and the facts.

It is written last and carries a checksum of itself, so a folder that has a sound index is a folder
as it was made, or a file in it is named as damaged.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from dsv3.errors import DataError
from dsv3.files import write_atomically

NAME = "index.json"


def write_index(folder: Path, facts: dict[str, Any]) -> None:
    """Index every file now in `folder`."""
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    content = {"files": files, "facts": facts}
    write_atomically(folder / NAME, json.dumps({"sha256": _digest(content)} | content, indent=1))


def read_index(folder: Path) -> dict[str, Any]:
    """The facts of `folder`, every file of it checked.

    Raises DataError naming the file that is missing or damaged.
    """
    try:
        content = json.loads((folder / NAME).read_bytes())
        checksum = content.pop("sha256")
    except FileNotFoundError as error:
        raise damage(folder / NAME, "missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damage(folder / NAME, "not what was written") from error
    if checksum != _digest(content):
        raise damage(folder / NAME, "not what was written")
    for name, digest in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise damage(path, "missing")
        if file_digest(path) != digest:
            raise damage(path, "not what was written")
    return content["facts"]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(path: Path, what: str) -> DataError:
    """The error for a damaged file of prepared data."""
    return DataError(f"{path} is damaged: {what}; delete the folder {path.parent} to make it anew")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
