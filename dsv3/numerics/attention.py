"""Core attention: the seam between the projections of MLA and what multiplies queries and keys.

    core(q_BTNW, k_BTNW, v_BTNU, scale) -> o_BTNU      o_i = sum_{j<=i} softmax_j(scale q_i·k_j) v_j

(Eq. 10). Contract: everything in one dtype, softmax and sums in FP32, differentiable; what a
rematerialisation policy may keep of it is named "attention". One is chosen from `model.mla` before
the model is built (`placed`), like the dot rule:

    xla      the oracle: jnp, on any platform; holds one strip of the square of scores at a time
    cudnn    NVIDIA's flash attention: GPUs of compute capability 9.0, from cuDNN 9.10
    mosaic   `kernels.attention`, the same algorithm in Pallas; the same GPUs

Neither takes anything but BF16; in another dtype both leave it to the oracle. cuDNN comes first: it
is made for these widths, forward and backward, and runs on GPUs elsewhere; the other has not yet.
jax's public function refuses values that are not as wide as keys, so the one behind it is called.
Its backward pass runs the forward one again where 'mosaic' kept o and L, but sums with atomics
where 'mosaic' multiplies twice more: as many products. The bits of its gradients are the same every
time under --xla_gpu_deterministic_ops=true, which XLA's own scatters want as well. Considered and
left: tokamax, whose backward kernel for these widths spills until it is tuned on a GPU, and jax's
`pallas.ops.gpu.attention_mgpu`, which wants equal widths and has no causal backward pass.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dsv3.config import Mla
from dsv3.numerics.rows import matrix_product

KEPT = "attention"
QUERY_BLOCKS, MIN_QUERY_BLOCK = 8, 128  # of the oracle: at most so many, at least so long
CUDNN = 91_000  # 9.10, the first whose attention has values of another width than keys
WIDTHS = {"cudnn": (8, (256, 256)), "mosaic": (64, (192, 128))}  # of keys, values: unit and most

Core = Callable[[Array, Array, Array, float], Array]


def causal_attention(q_BTNW: Array, k_BSNW: Array, v_BSNU: Array, scale: float) -> Array:
    """The oracle; T = S.

    A block of queries meets only the keys up to its own end: n blocks compute (n + 1) / 2n of the
    square of scores, and hold one strip of it at a time.
    """
    q_BNTW, k_BNSW, v_BNSU = (x.swapaxes(1, 2) for x in (q_BTNW, k_BSNW, v_BSNU))
    length = q_BNTW.shape[2]
    block = max(MIN_QUERY_BLOCK, -(-length // QUERY_BLOCKS))
    o_BNtU = []
    for start in range(0, length, block):
        end = min(start + block, length)
        visible_ts = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        keys_BNWs = k_BNSW[:, :, :end].swapaxes(2, 3)
        s_BNts = matrix_product(q_BNTW[:, :, start:end], keys_BNWs)
        s_BNts = jnp.where(visible_ts[None, None], s_BNts * scale, -jnp.inf)
        p_BNts = jax.nn.softmax(s_BNts, axis=-1).astype(v_BNSU.dtype)
        o_BNtU.append(matrix_product(p_BNts, v_BNSU[:, :, :end]).astype(v_BNSU.dtype))
    return checkpoint_name(jnp.concatenate(o_BNtU, axis=2).swapaxes(1, 2), KEPT)


def cudnn_attention(q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, scale: float) -> Array:
    """XLA's call of cuDNN's."""
    if q_BTNW.dtype != jnp.bfloat16:
        return causal_attention(q_BTNW, k_BTNW, v_BTNU, scale)
    attend, masks = _behind_jax_nn()
    o_BTNU = attend(q_BTNW, k_BTNW, v_BTNU, scale=scale, mask_type=masks.CAUSAL)
    return checkpoint_name(o_BTNU, KEPT)


def mosaic_attention(q_BTNW: Array, k_BTNW: Array, v_BTNU: Array, scale: float) -> Array:
    """The kernel of ours."""
    if q_BTNW.dtype != jnp.bfloat16:
        return causal_attention(q_BTNW, k_BTNW, v_BTNU, scale)
    from dsv3.numerics.kernels.attention import attention  # a second to import

    return attention(q_BTNW, k_BTNW, v_BTNU, scale, KEPT)


CORES: dict[str, Core] = {
    "auto": causal_attention,  # where nobody chose
    "xla": causal_attention,
    "cudnn": cudnn_attention,
    "mosaic": mosaic_attention,
}


def _behind_jax_nn() -> tuple[Any, Any]:
    """What `jax.nn.dot_product_attention` calls, and its kinds of mask."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    return cudnn.dot_product_attention, cudnn.MaskType


# --- the choice --------------------------------------------------------------------------------

PREFERRED = "cudnn", "mosaic", "xla"
PREFERRED_DECODING = "mosaic", "xla"


class Machine(NamedTuple):
    """What a choice depends on: 'cpu', 'tpu', 'gpu', or 'hopper' for one of compute capability 9.0;
    the compute dtype; and the version of cuDNN, as 91000 for 9.10, where there is one."""

    platform: str
    dtype: str
    cudnn: int | None = None


def obstacle(name: str, mla: Mla, machine: Machine) -> str | None:
    """What keeps a core from running there; None if nothing does."""
    if name == "xla":
        return None
    if reason := _elsewhere(machine):
        return reason
    widths = mla.nope_dim + mla.rope_dim, mla.value_dim
    unit, most = WIDTHS[name]
    if any(width % unit or width > limit for width, limit in zip(widths, most, strict=True)):
        return (
            f"needs model.mla's nope_dim + rope_dim and value_dim to be multiples of {unit} up to "
            f"{most[0]} and {most[1]}, not {widths[0]} and {widths[1]}"
        )
    if name == "cudnn" and (machine.cudnn or 0) < CUDNN:
        return f"needs cuDNN {CUDNN}, not {machine.cudnn}"
    return None


def decoding_obstacle(name: str, mla: Mla, machine: Machine) -> str | None:
    """The same of what decodes over the latent cache (`inference.absorbed`)."""
    if name == "xla":
        return None
    if reason := _elsewhere(machine):
        return reason
    latent, rope = mla.kv_latent, mla.rope_dim
    if latent % 128 or rope % 64 or latent + rope > 576:
        return (
            "needs model.mla's kv_latent a multiple of 128 and rope_dim of 64, together at most "
            f"576, not {latent} and {rope}"
        )
    return None


def _elsewhere(machine: Machine) -> str | None:
    if machine.platform != "hopper":
        return f"needs a GPU of compute capability 9.0, not {machine.platform!r}"
    if machine.dtype != "bfloat16":
        return f"needs training.compute_dtype = 'bfloat16', not {machine.dtype!r}"
    return None


def placed(mla: Mla, machine: Machine) -> Mla:
    """`mla` with its core attention and what decodes chosen, where it leaves the choice: the first
    of those preferred that run there. Raises ConfigError where one was asked for that does not."""
    chosen: dict[str, Any] = {}
    for name, value, better, obstacle_of in (
        ("attention", mla.attention, PREFERRED, obstacle),
        ("decoding", mla.decoding, PREFERRED_DECODING, decoding_obstacle),
    ):
        if value == "auto":
            chosen[name] = next(x for x in better if obstacle_of(x, mla, machine) is None)
        else:
            reason = obstacle_of(value, mla, machine)
            mla.require(reason is None, name, f"{reason}; 'auto' chooses what runs here")
    return replace(mla, **chosen)
