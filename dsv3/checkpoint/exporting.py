"""A model in the hub's layout, tensor by tensor: for transformers, vLLM, SGLang or another import.

It comes from a run's workdir, its live parameters or their average, from a model in memory or from
another folder of the hub. MTP layers follow the main ones, with copies of embedding and head. What
is written besides weights: config.json, and what a tokenizer comes with (`beside`).

In FP8 (§3.3, spec §2.6) a block of a projection becomes

    s = max|W| / 448,   E4M3(W / s)

but what is in the wanted form already, in a folder of the hub or an import that was not trained, is
written as it is, whatever made its scales. To make them again would not do: of dequantised values
max|W| / 448 is another FP32 number than the scale for one block in ten. What was imported in FP8
and then trained has the origin's `quantization_config`: which tensors are in FP8, the size of
blocks, and whether scales are powers of two.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsv3.bindings import apply, read_bindings
from dsv3.checkpoint import beside, hub, hub_config
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.hub_config import Quantization
from dsv3.checkpoint.importing import imported
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.safetensors_file import DTYPES as DTYPE_OF
from dsv3.checkpoint.safetensors_file import METADATA, Entry, file_bytes
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.unfinished import Progress, unfinished
from dsv3.checkpoint.weights import FP8, INDEX, SINGLE, Weights, usable
from dsv3.config import Config, Model
from dsv3.errors import CheckpointError, nearest
from dsv3.model.transformer import Transformer
from dsv3.numerics import fp8

DTYPES = {"bfloat16": "BF16", "float32": "F32"}
SHARD_BYTES = 5 * 10**9
CHUNK = 1 << 22  # elements converted at once
TILE = 128
EXPONENT = {"BF16": np.uint16(0x7F80), "F32": np.uint32(0x7F800000)}  # full: NaN or infinite


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    read: the part of a parameter that a tensor is made of, as ours, [inputs, outputs]
    identity: of the weights, JSON that others do not have; None of what has none on the disk
    quantization, quantized: of the checkpoint that they are or once were, if it is in FP8, and its
        tensors that are
    weights: the tensors as they are stored, where they still are the hub's
    folder: where the tokenizer's files are, if anywhere
    ids: of special tokens, as the checkpoint of the hub names them
    """

    config: Config
    read: Callable[[hub.Piece], np.ndarray]
    identity: Any = None
    quantization: Quantization | None = None
    quantized: Collection[str] = ()
    weights: Weights | None = None
    folder: Path | None = None
    ids: Mapping[str, Any] = field(default_factory=dict)


def of_model(config: Config, model: Transformer) -> Source:
    """A model in memory, sharded in whatever way over devices of this process."""
    leaves = name_leaves(model)
    return Source(config, lambda piece: _gathered(leaves[piece.parameter], piece.index))


def _gathered(array: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """`array[index]` on the host, from the shards that have some of it."""
    lead = len(index)
    out = np.empty(array.shape[lead:], array.dtype)
    for shard in array.addressable_shards:
        bounds = [s.indices(n) for s, n in zip(shard.index, array.shape, strict=True)]
        holds = all(start <= i < stop for i, (start, stop, _) in zip(index, bounds, strict=False))
        if shard.replica_id == 0 and holds:
            at = tuple(i - start for i, (start, *_) in zip(index, bounds, strict=False))
            out[shard.index[lead:]] = np.asarray(shard.data[at])
    return out


def of_folder(folder: str | os.PathLike) -> Source:
    """A checkpoint of the hub. Raises CheckpointError for whatever is wrong with it."""
    return _of(Folder(folder))


def _of(found: Folder) -> Source:
    read = functools.partial(found.read_piece, dtype=np.dtype(np.float32))
    weights = found.weights
    return Source(
        found.config, read, weights.identity, *_quantization(found), weights, found.path, found.ids
    )


def _quantization(found: Folder) -> tuple[Quantization | None, Collection[str]]:
    scales = found.weights.scales
    return (found.weights.quantization, scales.keys()) if scales else (None, ())


def of_workdir(
    workdir: str | os.PathLike, warn: Callable[[str], None], *, ema: bool = False
) -> Source:
    """A run at its newest sound checkpoint, before the first one what was imported: the live
    parameters, or their average.

    Arrays are read one by one. Raises CheckpointError where there is no run, no checkpoint or no
    average.
    """
    folder = Path(workdir)
    if not (folder / "config.gin").exists():
        raise CheckpointError(f"{folder} is no run: it has no config.gin")
    config = apply(Config(), read_bindings(folder / "config.gin"))
    reader = Store(folder / "checkpoints", config.checkpoint.keep, warn).open()
    if ema and not any(name.startswith("ema.") for name in (reader.shapes if reader else ())):
        raise CheckpointError(f"{folder} keeps no average: training.ema_decay = None, or step 0")
    if reader is None:
        if (found := imported(folder)) is None:
            raise CheckpointError(f"no checkpoint in {folder / 'checkpoints'} yet")
        return dataclasses.replace(_of(found), folder=folder)

    def read(piece: hub.Piece) -> np.ndarray:
        part = "router_bias" if piece.parameter.endswith("router.bias") else "params"
        part = "ema" if ema and part == "params" else part
        name = f"{part}.{piece.parameter}"
        if name not in reader.shapes:
            raise CheckpointError(f"{folder}: the checkpoint does not fit config.gin: no {name}")
        return reader.read(name, piece.index)

    identity = [reader.identity, ema]
    if (origin := imported(folder, weights=False)) is None:
        return Source(config, read, identity, folder=folder)
    return Source(config, read, identity, *_quantization(origin), None, folder, origin.ids)


# --- what will be written ----------------------------------------------------------------------


def export(
    source: Source,
    out: str | os.PathLike,
    *,
    fp8: bool = False,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write the folder `out` in the hub's layout; it appears whole or not at all. What was
    interrupted goes on, where the same is asked for of the same weights on the disk.

    `dtype` ('bfloat16', 'float32') is that of all tensors but the selection bias, which is FP32,
    and, with `fp8`, the projections, which are E4M3 with scales. Files hold at most `shard_bytes`.
    Raises CheckpointError where `out` holds something already, the disk is too small, or the layout
    has no word for something in the configuration.
    """
    out = Path(out).absolute()
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not written{nearest(dtype, DTYPES)}")
    quantization = None
    if fp8:
        quantization = source.quantization or Quantization(hub_config.DEEPSEEK_FP8)
    fields = hub_config.fields_of(source.config, dtype, quantization)
    pieces = in_file_order(source.config.model)
    quantized = projections(pieces) if source.quantization is None else source.quantized
    entries = plan(pieces, DTYPES[dtype], quantization, quantized)
    size = sum(entry.nbytes for entry in entries.values())
    files = in_files(entries, shard_bytes)
    made_of = source.identity and [source.identity, fields, files]

    def content(part: Mapping[str, Entry]) -> Iterator[np.ndarray]:
        within = {name: pieces[name] for name in part if name in pieces}
        yield from file_bytes(part, METADATA, _chunks(source, within, part, quantization))
        if source.weights is not None:
            source.weights.require_unchanged()

    with unfinished(out, size, made_of, progress) as making:
        path = making.path
        ids = beside.write(source.folder, source.ids, source.config.model.vocab, path)
        (path / "config.json").write_text(json.dumps(fields | ids, indent=2) + "\n")
        places = {name: file for file, part in files.items() for name in part}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        making.write("exporting weights", {file: content(part) for file, part in files.items()})


def in_file_order(model: Model) -> dict[str, hub.Piece]:
    """Every tensor of the layout: the embedding, layer by layer, norm and head. A copy has the
    piece of its main tensor, so it is read, and written, as that is."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    shapes = {name: leaf.shape for name, leaf in name_leaves(abstract).items()}
    pieces = {piece.tensor: piece for piece in hub.pieces(model, shapes)}
    pieces |= {copy: pieces[main] for copy, main in hub.copies(model).items()}
    return {name: pieces[name] for name in sorted(pieces, key=hub.layer_of)}


def projections(tensors: Iterable[str]) -> set[str]:
    """The tensors that the released checkpoint has in FP8."""
    return {name for name in tensors if hub.QUANTIZED.fullmatch(name)}


def plan(
    pieces: Mapping[str, hub.Piece],
    dtype: str,
    quantization: Quantization | None,
    quantized: Collection[str],
) -> dict[str, Entry]:
    """What each tensor is on disk; scales follow their weight."""
    entries = {}
    for name, (tensor, shape, *_) in pieces.items():
        if quantization is not None and tensor in quantized:
            grid = tuple(-(-n // b) for n, b in zip(shape, quantization.block, strict=True))
            entries |= {name: Entry(FP8, shape), hub.scale_of(name): Entry("F32", grid)}
        else:
            always = hub.released_dtype(name) == "F32"
            entries[name] = Entry("F32" if always else dtype, shape)
    return entries


def in_files(entries: Mapping[str, Entry], limit: int) -> dict[str, dict[str, Entry]]:
    """`entries` in their order by file, each of at most `limit` bytes of tensors; one beyond that
    has a file of its own. Scales are in the file of their weight."""
    parts: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if not name.endswith(hub.SCALES):
            scales = entries.get(hub.scale_of(name))
            nbytes = entry.nbytes + (scales.nbytes if scales else 0)
            if parts[-1] and size + nbytes > limit:
                parts.append({})
                size = 0
            size += nbytes
        parts[-1][name] = entry
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    total = len(parts)
    return {f"model-{i:05}-of-{total:05}.safetensors": part for i, part in enumerate(parts, 1)}


# --- weights -----------------------------------------------------------------------------------


def _chunks(
    source: Source,
    pieces: Mapping[str, hub.Piece],
    entries: Mapping[str, Entry],
    quantization: Quantization | None,
) -> Iterator[np.ndarray]:
    """The bytes of all `entries` in their order, in arrays of some rows of a tensor."""
    for name, piece in pieces.items():
        form, weights = entries[name].dtype, source.weights
        if weights is not None and weights.headers[piece.tensor].dtype == form:
            yield from _stored(name, weights, piece.tensor)
        elif quantization is not None and form == FP8:
            yield from _quantized(name, _read(source, piece), quantization)
        else:
            tensor = _read(source, piece)
            for rows in _rows(tensor, 1):
                part = _turned(tensor[rows])
                _require_finite(name, part, form)
                yield _narrowed(part, form)


def _stored(name: str, weights: Weights, tensor: str) -> Iterator[np.ndarray]:
    """A tensor as it is, then its scales where it has some."""
    for part in weights.stored(tensor):
        if (exponent := EXPONENT.get(weights.headers[tensor].dtype)) is not None:
            if np.any((part.view(exponent.dtype) & exponent) == exponent):
                raise CheckpointError(f"{name} holds a number that is not finite")
        yield part
    if tensor in weights.scales:
        yield from weights.stored(hub.scale_of(tensor))


def _read(source: Source, piece: hub.Piece) -> np.ndarray:
    """A tensor as the hub has it: a view of ours, where that is the other way."""
    ours = source.read(piece)
    tensor = ours.T if piece.transposed else ours
    if tensor.shape != piece.shape:
        raise CheckpointError(f"{piece.parameter} does not fit config.gin: {ours.shape}")
    return tensor


def _quantized(name: str, tensor: np.ndarray, quantization: Quantization) -> Iterator[np.ndarray]:
    """E4M3 in some rows at a time, then all scales."""
    scales = []
    for rows in _rows(tensor, quantization.block[0]):
        part = _turned(tensor[rows])
        _require_finite(name, part, "F32")
        found = _quantize(part, quantization.block, quantization.power_of_two)
        scales.append(np.asarray(found.scales))
        if not np.all(usable(scales[-1])):
            raise CheckpointError(f"{name} is too large for FP8: its scale is no FP32 number")
        yield np.asarray(found.values)
    yield np.concatenate(scales)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(w: jax.Array, block: tuple[int, int], power_of_two: bool) -> fp8.Quantized:
    return fp8.quantize(w, block, power_of_two=power_of_two)


def _rows(tensor: np.ndarray, multiple: int) -> Iterator[slice]:
    """Slices of the first dimension, of about CHUNK elements and whole multiples."""
    length = tensor.shape[0]
    step = max(CHUNK // max(tensor.size // max(length, 1), 1) // multiple, 1) * multiple
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _turned(part: np.ndarray) -> np.ndarray:
    """A contiguous copy; of a transposed view in tiles, which is several times faster."""
    if part.flags.c_contiguous:
        return part
    out = np.empty(part.shape, part.dtype)
    for begin in range(0, part.shape[1], TILE):
        out[:, begin : begin + TILE] = part[:, begin : begin + TILE]
    return out


def _require_finite(name: str, part: np.ndarray, dtype: str) -> None:
    """CheckpointError unless `part` holds numbers, and does so in `dtype`; extremes keep NaN."""
    if part.size:
        for extreme in part.min(), part.max():
            with np.errstate(over="ignore"):
                if not np.isfinite(np.float32(np.asarray(extreme).astype(DTYPE_OF[dtype]))):
                    raise CheckpointError(f"{name} holds {extreme}, which {dtype} cannot hold")


def _narrowed(part: np.ndarray, dtype: str) -> np.ndarray:
    """In FP32, or rounded to the nearest BF16, ties to even; of finite numbers."""
    if dtype == "F32":
        return part.astype(np.float32, copy=False)
    if part.dtype != np.float32:  # the library's cast, 4 times slower
        return part.astype(ml_dtypes.bfloat16)
    bits = part.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)
