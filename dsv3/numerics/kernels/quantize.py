"""Quantisation for the tensor cores in one pass: read once, written once, as products want it.

A tile of 128 x 128 is read, its groups' largest magnitudes found in registers, divided, rounded and
written, one CTA a tile; several share an SM and hide each other's copies. `fp8.quantize` is the
oracle, equal bit for bit: XLA reads the input twice for 1x128 tiles, and needs four kernels where
the result is transposed.

The result always has the contraction last, as wgmma wants it, and scales have it first:

    TILE     x [M, K] contracted over K    values [M, K]    scales [k, M]       activations
    COLUMN   x [K, M] contracted over K    values [M, K]    scales [k, M]       operands of Wgrad
    BLOCK    x [N, K] or, transposed, [K, N]    [N, K]             [k, n, 4]    weights

so that COLUMN is TILE of the transpose, and turning a tile happens on its way to registers. A
gradient is wanted both ways, by Dgrad and by Wgrad, and is read once for the two. FP8 input (a
cached activation) comes with its own scales, and is multiplied out in FP32 first. SwiGLU of two
inputs is computed in registers, by the very function that is its oracle, and never written.
"""

from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from dsv3.numerics.fp8 import FORMATS, GROUP, FormatName, scales_of
from dsv3.numerics.kernels.gemm import aligned
from dsv3.numerics.kernels.persistent import round_up, swizzle
from dsv3.numerics.operand import Swiglu, swiglu

TMA_SCALES = 4  # copies of a block's scale: TMA moves 16 bytes at least
ROW, COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Tiles(NamedTuple):
    """[M, K] with a scale for each 128 of the contraction K; K padded to a multiple of 128."""

    values_MK: Array
    scales_kM: Array  # M padded to a multiple of 4


class Squares(NamedTuple):
    """A stack of [N, K] with a scale for each 128 x 128, stored four times; K padded to 128."""

    values_ENK: Array
    scales_Ekn4: Array


def tiles(
    x: Array, transposed: bool, form: FormatName = "e4m3", power_of_two: bool = False,
    scales: Array | None = None,
) -> Tiles:  # fmt: skip
    """x [M, K], or [K, M] if `transposed`, in groups of 128 along K.

    x is BF16 or FP32; or FP8 with the FP32 `scales` of its tiles, [last dimension / 128, first].
    """
    [(values, scales)] = _quantized(x[None], scales, (transposed,), False, form, power_of_two)
    return Tiles(values[0], scales[0])


def both_ways(
    x: Array, form: FormatName = "e4m3", power_of_two: bool = False
) -> tuple[Tiles, Tiles]:  # fmt: skip
    """`tiles` of a matrix in BF16 or FP32, straight and transposed."""
    straight, turned = _quantized(x[None], None, (False, True), False, form, power_of_two)
    return Tiles(*(leaf[0] for leaf in straight)), Tiles(*(leaf[0] for leaf in turned))


def squares(
    w_E: Array, transposed: bool, form: FormatName = "e4m3", power_of_two: bool = False
) -> Squares:
    """w [E, N, K], or [E, K, N] if `transposed`, BF16 or FP32, in blocks of 128 x 128."""
    [found] = _quantized(w_E, None, (transposed,), True, form, power_of_two)
    return Squares(*found)


def swiglu_tiles(
    x: Swiglu, dtype: DTypeLike, form: FormatName = "e4m3", power_of_two: bool = False
) -> Tiles:
    """`tiles` of SwiGLU, straight: gate and up [M, K] in `dtype`, BF16 or FP32, or both cached in
    FP8 `Tiles` and meant in `dtype`; weight [M, 1] or None."""
    cached = isinstance(x.up, Tiles)
    matrices = [matrix.values_MK if cached else matrix for matrix in (x.gate, x.up)]
    vectors = [matrix.scales_kM for matrix in (x.gate, x.up) if cached]
    _require_alike(matrices, x.weight, jnp.float8_e4m3fn if cached else dtype)
    if x.weight is not None:
        vectors.append(round_up(x.weight.astype(jnp.float32).T, 1, 4))
    (M, K), tile, kind = matrices[0].shape, (GROUP, GROUP), matrices[0].dtype
    k, limit = -(-K // GROUP), float(jnp.finfo(FORMATS[form]).max)

    def kernel(*refs, inputs, rows, out, out_scales, arrived):
        *refs, values, scales = refs
        across, down = lax.axis_index("across"), lax.axis_index("down")
        here = pl.ds(down * GROUP, GROUP), pl.ds(across * GROUP, GROUP)
        for i, ref in enumerate(refs[:2]):
            plgpu.copy_gmem_to_smem(ref.at[here], inputs.at[i], arrived)
        for i, ref in enumerate(refs[2:]):
            group = across if cached and i < 2 else 0  # the weight has but one
            plgpu.copy_gmem_to_smem(ref.at[group, here[0]], rows.at[i], arrived)
        plgpu.barrier_wait(arrived)

        def spread(i):
            return lax.broadcast_in_dim(plgpu.load(rows.at[i], layout=ROW), tile, [0])

        def read(i):
            y = plgpu.load(inputs.at[i], layout=plgpu.Layout.WGMMA)
            return (y.astype(jnp.float32) * spread(i)).astype(dtype) if cached else y

        weight = None if x.weight is None else spread(len(vectors) - 1)
        y = swiglu(read(0), read(1), weight).astype(jnp.float32)
        out[...], out_scales[...] = _divided(y, False, limit, power_of_two, form)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, values.at[here])
        plgpu.copy_smem_to_gmem(out_scales, scales.at[across, here[0]])
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        "inputs": plgpu.SMEM((2, *tile), kind, transforms=swizzle(GROUP, kind)),
        "rows": plgpu.SMEM((3, GROUP), jnp.float32),
        "out": plgpu.SMEM(tile, FORMATS[form], transforms=swizzle(GROUP, FORMATS[form])),
        "out_scales": plgpu.SMEM((GROUP,), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=2 + len(vectors)),
    }
    values = jax.ShapeDtypeStruct((-(-M // 8) * 8, k * GROUP), FORMATS[form])
    scales = jax.ShapeDtypeStruct((k, -(-M // 4) * 4), jnp.float32)
    values, scales = plgpu.kernel(
        kernel, out_type=[values, scales], grid=(k, -(-M // GROUP)),
        grid_names=("across", "down"), scratch_types=scratch, kernel_name="fp8_swiglu",
    )(*map(aligned, matrices), *vectors)  # fmt: skip
    return Tiles(values[:M], scales)


def _quantized(
    x, scales, ways: tuple[bool, ...], square: bool, form: FormatName, powers: bool
) -> list[tuple[Array, Array]]:
    """Values and scales for each of `ways`: straight (False) or transposed."""
    _require(x, scales)
    E, rows, columns = x.shape
    x = aligned(x)
    sizes = [(columns, rows) if transposed else (rows, columns) for transposed in ways]  # M, K
    out, tile = [], (GROUP, GROUP)
    for M, K in sizes:
        k, m = -(-K // GROUP), -(-M // GROUP)
        shape = (E, k, m, TMA_SCALES) if square else (E, k, -(-M // 4) * 4)
        out.append(jax.ShapeDtypeStruct((E, -(-M // 8) * 8, k * GROUP), FORMATS[form]))
        out.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    inputs = (x,) if scales is None else (x, scales)
    scratch = {
        "x": plgpu.SMEM(tile, x.dtype, transforms=swizzle(GROUP, x.dtype)),
        "out": plgpu.SMEM(
            (len(ways), *tile), FORMATS[form], transforms=swizzle(GROUP, FORMATS[form])
        ),
        "out_scales": plgpu.SMEM((len(ways), GROUP), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=len(inputs)),
    }
    if scales is not None:
        scratch["x_scales"] = plgpu.SMEM((GROUP,), jnp.float32)
        scratch["turned"] = plgpu.SMEM(tile, jnp.float16, transforms=swizzle(GROUP, jnp.float16))
    limit = float(jnp.finfo(FORMATS[form]).max)

    def kernel(*refs, **scratch):
        results = refs[len(inputs) :]
        e, across, down = (lax.axis_index(name) for name in ("matrix", "across", "down"))
        here = (pl.ds(down * GROUP, GROUP), pl.ds(across * GROUP, GROUP))
        _fetch(refs[: len(inputs)], e, here, scratch)
        for i, transposed in enumerate(ways):
            values, groups = results[2 * i : 2 * i + 2]
            k, m = (down, across) if transposed else (across, down)
            y = _loaded(scratch, transposed)
            scratch["out"][i], scratch["out_scales"][i] = _divided(y, square, limit, powers, form)
            plgpu.commit_smem()
            there = here[::-1] if transposed else here
            plgpu.copy_smem_to_gmem(scratch["out"].at[i], values.at[e].at[there])
            if square:
                copies = scratch["out_scales"].at[i, pl.ds(0, TMA_SCALES)]
                plgpu.copy_smem_to_gmem(copies, groups.at[e, k, m])
            else:
                plgpu.copy_smem_to_gmem(scratch["out_scales"].at[i], groups.at[e, k, there[0]])
        plgpu.wait_smem_to_gmem(0)

    found = plgpu.kernel(
        kernel, out_type=out, grid=(E, -(-columns // GROUP), -(-rows // GROUP)),
        grid_names=("matrix", "across", "down"), scratch_types=scratch,
        kernel_name="fp8_quantize" + "_both" * (len(ways) == 2),
    )(*inputs)  # fmt: skip
    return [(found[2 * i][:, :M], found[2 * i + 1]) for i, (M, _) in enumerate(sizes)]


def _divided(y: Array, square: bool, limit: float, powers: bool, form: FormatName):
    """A tile in registers in FP8, and the scale of each row."""
    largest = jnp.max(jnp.abs(y), axis=1)
    if square:
        largest = plgpu.layout_cast(jnp.full((GROUP,), jnp.max(largest)), ROW)
    scale = scales_of(largest, limit, powers)
    scaled = y / lax.broadcast_in_dim(scale, y.shape, [0])
    return jnp.clip(scaled, -limit, limit).astype(FORMATS[form]), scale


def _fetch(inputs, e, window, scratch) -> None:
    """Bring the tile to shared memory, and its scales where it has some."""
    plgpu.copy_gmem_to_smem(inputs[0].at[e].at[window], scratch["x"], scratch["arrived"])
    if len(inputs) == 2:
        tile = lax.div(window[1].start, GROUP)
        plgpu.copy_gmem_to_smem(
            inputs[1].at[tile, window[0]], scratch["x_scales"], scratch["arrived"]
        )
    plgpu.barrier_wait(scratch["arrived"])


def _loaded(scratch, transposed: bool) -> Array:
    """The tile in FP32 registers, the contraction along its second dimension."""
    x = scratch["x"]
    if "x_scales" in scratch:  # FP8 is exact in FP16, which can be turned
        scratch["turned"][...] = plgpu.load(x, layout=plgpu.Layout.WGMMA).astype(jnp.float16)
        plgpu.commit_smem()
        x = scratch["turned"]
    if not transposed:
        y = plgpu.load(x, layout=plgpu.Layout.WGMMA)
    elif x.dtype.itemsize == 2:
        turned = plgpu.load(x.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED)
        y = plgpu.layout_cast(turned, plgpu.Layout.WGMMA)
    else:  # no fast way for 32 bits: bank conflicts
        y = plgpu.load(x.transpose((1, 0)), layout=plgpu.Layout.WGMMA, optimized=False)
    y = y.astype(jnp.float32)
    if "x_scales" in scratch:
        axis = 1 if transposed else 0
        scale = plgpu.load(scratch["x_scales"], layout=COLUMN if transposed else ROW)
        y *= lax.broadcast_in_dim(scale, y.shape, [axis])
    return y


def _require(x: Array, scales: Array | None) -> None:
    if x.dtype in FORMATS.values():
        rows, columns = x.shape[1:]
        if scales is None:
            raise ValueError(f"x is {x.dtype}: it needs the scales of its tiles")
        if scales.shape[0] != -(-columns // GROUP) or scales.shape[1] < rows:
            raise ValueError(
                f"scales are {scales.shape}, x {x.shape[1:]} wants "
                f"[{-(-columns // GROUP)}, at least {rows}]"
            )
    elif scales is not None or x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x is {x.dtype}, not bfloat16 or float32, nor float8 with scales")


def _require_alike(matrices: list[Array], weight: Array | None, dtype: DTypeLike) -> None:
    gate, up = matrices
    if gate.shape != up.shape or {gate.dtype, up.dtype} != {jnp.dtype(dtype)}:
        raise ValueError(f"gate is {gate.dtype}{list(gate.shape)}, up {up.dtype}{list(up.shape)}: "
                         f"both must be {jnp.dtype(dtype)} and of one shape")  # fmt: skip
    if weight is not None and weight.shape != (len(up), 1):
        raise ValueError(f"weight is {list(weight.shape)}, not [{len(up)}, 1]")
