"""Logits of given tokens, for comparing implementations: FP32, every position, every depth.

The arrays of the answer: `logits` [B, T, V], where position i scores token i + 1, and for a model
with MTP `mtp_logits` (depth 1), `mtp_logits_2`, ...: depth k at position i scores token i + k + 1.
Its last k positions, for which there is no token ahead to read, hold nothing of meaning.
"""

import os
import tokenize
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3.errors import DataError
from dsv3.model.transformer import Output, Transformer
from dsv3.parallel.mesh import on_host

POSITIONS = 4096  # of one forward pass: about this many, in whole sequences
DAMAGE = (  # what numpy raises for a header that is none, or for more numbers than follow it
    ValueError, EOFError, MemoryError, OverflowError, TypeError, SyntaxError, RecursionError,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


def read_tokens(path: str | os.PathLike, vocab: int) -> np.ndarray:
    """int32 [B, T] from a .npy file. Raises DataError naming what is wrong, and the first id that
    is not below `vocab`."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            tokens = np.load(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"tokens {path} cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:  # numpy's words would advise to unpickle the file
        raise DataError(f"tokens {path} is no .npy file of integers, or not all of one") from error
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu":
        given = getattr(tokens, "dtype", "an .npz archive")
        raise DataError(f"tokens {path} holds {given}, not integers")
    if tokens.ndim != 2 or not tokens.size:
        raise DataError(f"tokens {path} has shape {list(tokens.shape)}, not [B, T] with tokens")
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(wrong):
        row, position = map(int, wrong[0])
        found = f"{path}[{row}, {position}] = {tokens[row, position]}"
        raise DataError(f"tokens {found} is no id of the vocabulary, 0 to {vocab - 1}")
    return tokens.astype(np.int32)


def logits(model: Transformer, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the module docstring, float32, computed in FP32."""
    answer: dict[str, np.ndarray] = {}
    rows = model.shard.even(max(1, POSITIONS // tokens_BT.shape[1]))
    for start in range(0, len(tokens_BT), rows):
        chunk_BT = tokens_BT[start : start + rows]
        filling = model.shard.even(len(chunk_BT)) - len(chunk_BT)
        parts = on_host(_logits(model, np.pad(chunk_BT, ((0, filling), (0, 0)))))
        for name, part_BTV in parts.items():
            whole = answer.setdefault(name, np.empty((len(tokens_BT), *part_BTV.shape[1:]), "f4"))
            whole[start : start + rows] = part_BTV[: len(chunk_BT)]
    return answer


@jax.jit
def _logits(model: Transformer, tokens_BT: Array) -> dict[str, Array]:
    def here(model: Transformer, tokens_BT: Array) -> dict[str, Array]:
        return _named(model(tokens_BT, dtype=jnp.dtype("float32")))

    return model.shard.evaluate(here, model, (tokens_BT,), model.shard.rows)


def _named(output: Output) -> dict[str, Array]:
    depths = range(1, len(output.mtp_logits) + 1)
    names = ["mtp_logits" if depth == 1 else f"mtp_logits_{depth}" for depth in depths]
    return {"logits": output.logits_BTV} | dict(zip(names, output.mtp_logits, strict=True))
