"""The latent cache: what attention keeps of the tokens that it has seen (§2.1.1; spec §1.3).

Of every token and layer it holds the normed latent c^KV and the turned rope key k^R, from which the
absorbed form of attention computes (`model.mla`), and nothing for each head: C + R numbers where
keys and values would be N (H + R + U). A form says how the two are stored:

    compute   c [C], k^R [R]                            in the compute dtype
    fp8       c [C] E4M3, its scales [C / 128] FP32, k^R [R] BF16          656 bytes a token for V3

FP8 latents are scaled in tiles of 128 along C, as the report scales activations. What a token takes
say `counts.cache_bytes` and `counts.fp8_cache_bytes`.

A cache is a pytree of arrays [L, B, S, ...] over layers (the MTP modules that draft behind the
main ones), sequences and positions. `write` and `begin` return a new one, which under `jax.jit` is
the old memory. Positions that were not written, or belong to tokens since rejected, hold something:
whoever reads masks them.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.config import Mla
from dsv3.numerics import fp8

Parts = tuple[Array, ...]
FormName = Literal["compute", "fp8"]


class Form(Protocol):
    """How latents [..., C] and rope keys [..., R] are stored; the parts keep the leading axes."""

    def pack(self, c_BTC: Array, k_rope_BTR: Array) -> Parts: ...

    def unpack(self, parts: Parts, dtype: jnp.dtype) -> tuple[Array, Array]: ...


@dataclass(frozen=True)
class ComputeForm:
    """As they are."""

    def pack(self, c_BTC: Array, k_rope_BTR: Array) -> Parts:
        return c_BTC, k_rope_BTR

    def unpack(self, parts: Parts, dtype: jnp.dtype) -> tuple[Array, Array]:
        c_BTC, k_rope_BTR = parts
        return c_BTC, k_rope_BTR


@dataclass(frozen=True)
class Fp8Form:
    """E4M3 latents in tiles of 128 with FP32 scales; rope keys in BF16.

    Kept as bytes: a platform that does not compute in FP8 converts the whole array to write to it.
    """

    def pack(self, c_BTC: Array, k_rope_BTR: Array) -> Parts:
        q = fp8.quantize(c_BTC, fp8.TILE)
        return (
            lax.bitcast_convert_type(q.values, jnp.uint8),
            q.scales,
            k_rope_BTR.astype(jnp.bfloat16),
        )

    def unpack(self, parts: Parts, dtype: jnp.dtype) -> tuple[Array, Array]:
        codes, scales, k_rope_BTR = parts
        values = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        return fp8.dequantize(fp8.Quantized(values, scales), dtype), k_rope_BTR.astype(dtype)


FORMS: dict[FormName, Form] = {"compute": ComputeForm(), "fp8": Fp8Form()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LatentCache:
    """`parts` [L, B, S, ...] of `form`, read back in `dtype`."""

    parts: Parts
    form: FormName = field(metadata={"static": True})
    dtype: jnp.dtype = field(metadata={"static": True})

    @property
    def length(self) -> int:
        """Positions that there is room for, S."""
        return self.parts[0].shape[2]

    def begin(self, layer: Array | int, c_BPC: Array, k_rope_BPR: Array) -> "LatentCache":
        """With the first P positions of every sequence written."""
        packed = FORMS[self.form].pack(c_BPC, k_rope_BPR)
        return self._with(
            lax.dynamic_update_slice(whole, part[None], (layer, 0, 0, 0))
            for whole, part in zip(self.parts, packed, strict=True)
        )

    def write(
        self, layer: Array | int, row_B: Array, position_BT: Array, c_BTC: Array, k_rope_BTR: Array
    ) -> "LatentCache":
        """With T more of the sequences `row_B` written, each at its own positions within [0, S).

        A single token is written twice: XLA turns a scatter to one place into a selection that
        copies the whole array.
        """
        if position_BT.size == 1:
            row_B, position_BT, c_BTC, k_rope_BTR = (
                jnp.repeat(x, 2, axis=0) for x in (row_B, position_BT, c_BTC, k_rope_BTR)
            )
        packed = FORMS[self.form].pack(c_BTC, k_rope_BTR)
        return self._with(
            whole.at[layer, row_B[:, None], position_BT].set(part, mode="promise_in_bounds")
            for whole, part in zip(self.parts, packed, strict=True)
        )

    def read(self, layer: Array | int, start: Array, size: int) -> tuple[Array, Array]:
        """c_BsC and k_rope_BsR of `size` positions from `start`."""
        _, sequences, *_ = self.parts[0].shape
        parts = tuple(
            lax.dynamic_slice(
                whole, (layer, 0, start, 0), (1, sequences, size, whole.shape[3])
            )[0]
            for whole in self.parts
        )  # fmt: skip
        return FORMS[self.form].unpack(parts, self.dtype)

    def _with(self, parts) -> "LatentCache":
        return replace(self, parts=tuple(parts))


def empty(
    form: FormName, mla: Mla, layers: int, sequences: int, length: int, dtype: jnp.dtype
) -> LatentCache:
    """A cache of zeros for `layers` x `sequences` x `length` tokens, FP8 or in `dtype`."""
    parts = jax.eval_shape(
        FORMS[form].pack,
        jax.ShapeDtypeStruct((sequences, length, mla.kv_latent), dtype),
        jax.ShapeDtypeStruct((sequences, length, mla.rope_dim), dtype),
    )
    zeros = tuple(jnp.zeros((layers, *part.shape), part.dtype) for part in parts)
    return LatentCache(zeros, form, dtype)
