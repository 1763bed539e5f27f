"""A checkpoint of the hub as the parameters of our model: which tensors each is made of.

All is checked on the files' headers before the first weight is read: every tensor of the model is
there, no other is, and shapes fit. MTP layers come along; where config.json announces some that the
files do not hold (transformers writes it so), there are none.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.checkpoint import beside, hub, hub_config
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.safetensors_file import DTYPES
from dsv3.checkpoint.weights import Target, Weights, read_json
from dsv3.config import Model
from dsv3.errors import CheckpointError
from dsv3.model.transformer import Transformer

ALIGNMENT = 64  # bytes, of XLA:CPU
Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


class Folder:
    """A checkpoint of the hub, found sound by its headers: `config`, parameters by dotted path,
    and the `ids` of special tokens. `copied` says that it was one before, and is as it was: its
    MTP layers' copies are not read to be compared then.

    Raises CheckpointError, one line naming the file, field or tensor, for whatever is wrong.
    """

    def __init__(self, folder: str | os.PathLike, *, copied: bool = False):
        self.path = Path(folder)
        origin = str(self.path / "config.json")
        fields = read_json(self.path / "config.json")
        config = hub_config.config_of(fields, origin)
        self.ids = beside.ids_of(fields, origin)
        self.weights = Weights(self.path, hub_config.quantization_of(fields, origin))
        if not any(hub.in_mtp_layer(config.model, name) for name in self.weights.headers):
            model = dataclasses.replace(config.model, mtp_depths=0)
            config = dataclasses.replace(config, model=model)
        self.config = config
        require_plausible(self.weights, config.model)
        self.abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config.model))
        self.shapes = {name: leaf.shape for name, leaf in name_leaves(self.abstract).items()}
        self.pieces: dict[str, list[hub.Piece]] = {name: [] for name in self.shapes}
        for piece in hub.pieces(config.model, self.shapes):
            self.pieces[piece.parameter].append(piece)
        wanted = {p.tensor: p for pieces in self.pieces.values() for p in pieces}
        copies = {copy: wanted[main] for copy, main in hub.copies(config.model).items()}
        require_fit(self.weights, wanted, copies)
        for copy, main in () if copied else copies.items():
            if copy in self.weights.headers and not self.weights.same(copy, main.tensor):
                raise CheckpointError(
                    f"{self.path}: {copy} is no copy of {main.tensor}, which MTP shares"
                )

    def dtype(self, parameter: str, asked: Any = None) -> np.dtype:
        """The precision `asked` for, or that of the files: the widest of the stacked tensors, FP32
        in a checkpoint that holds any FP8. The router's selection bias is FP32 always."""
        if parameter.endswith("router.bias") or (asked is None and self.weights.scales):
            return np.dtype(np.float32)
        stored = {DTYPES[self.weights.headers[p.tensor].dtype] for p in self.pieces[parameter]}
        return np.dtype(jnp.result_type(*stored) if asked is None else asked)

    def model(self, dtype: Any = None, place: Place | None = None) -> Transformer:
        """The model, its parameters in `dtype` or as `dtype()` has it, each where `place(path,
        shape)` says, None meaning the default device: a process reads what its devices hold."""
        leaves = self.parameters(dtype, place)
        return jax.tree.unflatten(jax.tree.structure(self.abstract), list(leaves))

    def parameters(self, dtype: Any = None, place: Place | None = None) -> Iterator[jax.Array]:
        """Those of `model`, one by one."""
        for name, shape in self.shapes.items():
            read = functools.cache(  # what several devices hold is read once
                functools.partial(self.read, name, dtype=self.dtype(name, dtype))
            )
            sharding = place(name, shape) if place else None
            if sharding is None:
                yield jax.device_put(read(tuple(slice(0, n) for n in shape)))
            else:
                yield jax.make_array_from_callback(shape, sharding, read)
        self.weights.require_unchanged()

    def read(self, parameter: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`parameter[index]`, from the tensors and rows of them that it is made of."""
        bounds = [i.indices(n) for i, n in zip(index, self.shapes[parameter], strict=True)]
        out = _aligned([stop - start for start, stop, _ in bounds], np.dtype(dtype))
        self.weights.read_into(self._targets(parameter, bounds, out))
        return out

    def read_piece(self, piece: hub.Piece, dtype: np.dtype) -> np.ndarray:
        """What `piece` is of its parameter: `parameter[piece.index]`."""
        out = np.empty(piece.shape[::-1] if piece.transposed else piece.shape, dtype)
        self.weights.read_into([Target(piece.tensor, out.T if piece.transposed else out)])
        return out

    def _targets(
        self, parameter: str, bounds: Sequence[tuple[int, int, int]], out: np.ndarray
    ) -> Iterator[Target]:
        for piece in self.pieces[parameter]:
            lead = len(piece.index)
            at = tuple(i - start for i, (start, _, _) in zip(piece.index, bounds, strict=False))
            if all(0 <= i < n for i, n in zip(at, out.shape, strict=False)):
                part, rest = out[at], [slice(start, stop) for start, stop, _ in bounds[lead:]]
                yield Target(
                    piece.tensor,
                    part.T if piece.transposed else part,
                    *(rest[::-1] if piece.transposed else rest),
                )


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a place from which jax, on CPUs, takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def require_plausible(weights: Weights, model: Model) -> None:
    """Raise CheckpointError where the model has so many tensors that to list those that the files
    lack would take for ever."""
    moe_layers = model.layers - model.dense_layers + model.mtp_depths
    wanted = model.layers + moe_layers * (1 + 3 * model.moe.routed_experts)
    if wanted > 10 * len(weights.headers) + 10_000:
        raise CheckpointError(
            f"{weights.folder / 'config.json'}: num_hidden_layers = {model.layers}, "
            f"num_nextn_predict_layers = {model.mtp_depths} and n_routed_experts = "
            f"{model.moe.routed_experts} make {wanted} tensors and more, the files have "
            f"{len(weights.headers)}"
        )


def require_fit(
    weights: Weights, wanted: Mapping[str, hub.Piece], optional: Mapping[str, hub.Piece]
) -> None:
    """Raise CheckpointError, naming the first few, unless the tensors are the `wanted` ones, and
    some of the `optional`, all with their shapes and in dtypes that are read."""
    folder, found = weights.folder, weights.headers.keys()
    surplus = {name for name in found - wanted.keys() - optional.keys()}
    surplus = {name for name in surplus if not hub.IGNORED.fullmatch(name)}
    faults = []
    for verb, names in (("lacks", wanted.keys() - found), ("has surplus", surplus)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            faults.append(f"{verb} {len(names)} tensor{'s' * (len(names) > 1)}: {first}")
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json: it {'; it '.join(faults)}")
    for name, piece in {**wanted, **optional}.items():
        if (tensor := weights.headers.get(name)) is None:
            continue
        where = f"{folder}: {name} in {tensor.file.name} has"
        if tensor.shape != piece.shape:
            raise CheckpointError(f"{where} shape {list(tensor.shape)}, not {list(piece.shape)}")
        if tensor.dtype not in DTYPES:
            readable = ", ".join(DTYPES)
            raise CheckpointError(f"{where} dtype {tensor.dtype}: read are {readable}")
