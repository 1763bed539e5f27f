"""What lies beside the weights: the tokenizer, how to generate, and the ids of special tokens.

Files are taken along as they are, with a tokenizer or without. An export says the ids that the
config.json names of which its weights came; without any, those of the tokenizer's tokens; without
a tokenizer, none.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3.checkpoint.weights import inside
from dsv3.data.tokenizer import SPECIAL_TOKENS
from dsv3.errors import CheckpointError

FILES = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    "special_tokens_map.json",
)  # fmt: skip
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy(folder: Path, out: Path) -> None:
    """Copy what `folder` has of FILES. CheckpointError for a link out of it and for no file."""
    for name in FILES:
        if (folder / name).exists(follow_symlinks=False):
            shutil.copyfile(inside(folder, name), out / name)


def ids_of(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The ids that a config.json names: each a number, or several."""
    ids = {name: fields[name] for name in IDS if fields.get(name) is not None}
    for name, value in ids.items():
        if not all(type(i) is int for i in (value if isinstance(value, list) else [value])):
            raise CheckpointError(f"{origin}: {name} = {value!r} is no id")
    return ids


def write(folder: Path | None, ids: Mapping[str, Any], vocab: int, out: Path) -> dict[str, Any]:
    """Write what `folder` has, and for a tokenizer what servers want; the ids for config.json.

    `ids` are those that are known. Raises CheckpointError where a tokenizer has more than `vocab`.
    """
    if folder is None:
        return dict(ids)
    copy(folder, out)
    path = folder / "tokenizer.json"
    if not path.exists():
        return dict(ids)
    added, size = _read_tokenizer(path)
    if size > vocab:
        raise CheckpointError(f"{path} has {size} ids, more than model.vocab = {vocab}")
    tokens = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos", "pad")}
    tokens = {name: token for name, token in tokens.items() if token in added}
    ids = {f"{name}_id": added[token]["id"] for name, token in tokens.items()} | dict(ids)
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: t[k] for k in keys if k in t} for t in added.values()
        },
    }
    for name, content in (("tokenizer_config.json", described), ("generation_config.json", ids)):
        if not (out / name).exists():
            (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return ids


def _read_tokenizer(path: Path) -> tuple[dict[str, dict], int]:
    """Added tokens by content, and the number that all ids are below."""
    try:
        content = json.loads(path.read_text("utf-8"))
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        vocab = (content.get("model") or {}).get("vocab") or {}
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
        return added, max([*ids, *(token["id"] for token in added.values())], default=-1) + 1
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no tokenizer.json: {error}") from None
