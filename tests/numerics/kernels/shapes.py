"""The products of DeepSeek-V3 for which kernels are lowered and compiled, as abstract calls.

    python tests/numerics/kernels/shapes.py CUDA_HOME DUMP      compile them all for an H200

compiles without a GPU, where the wheels jax-cuda13-plugin and jax-cuda13-pjrt and a CUDA 13 toolkit
are, and leaves what the assembler said of each in DUMP.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # before jax is imported
    CUDA, DUMP = sys.argv[1:]
    Path(DUMP).mkdir(exist_ok=True)
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_TO": DUMP,
        "PATH": f"{CUDA}/bin:{os.environ['PATH']}",
        "XLA_FLAGS": f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={CUDA}",
    }
    sys.path.insert(0, str(Path(__file__).parents[3]))

import jax
import jax.numpy as jnp

from dsv3.config import Fp8Dot
from dsv3.numerics.dot import build
from dsv3.numerics.kernels import bf16_gemm, fp8_gemm, quantize
from dsv3.numerics.kernels.attention import attention
from dsv3.numerics.kernels.decode import absorbed_attention
from dsv3.numerics.kernels.gemm import Tuning
from dsv3.numerics.operand import Swiglu

E4M3, E5M2, BF16, F32 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float32

# What the driver reports of an H200 and the compiler asks for.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
"""


def nt(M, N, K, tuning=None):
    k, n = -(-K // 128), -(-N // 128)
    shapes = ((M, K), E4M3), ((k, M), F32), ((1, N, K), E4M3), ((1, k, n, 4), F32)
    return lambda *a: fp8_gemm.nt(*a, tuning=tuning), shapes


def grouped_nt(Z, E, N, K):
    k, n = K // 128, N // 128
    shapes = ((128 * Z, K), E4M3), ((k, 128 * Z), F32), ((E, N, K), E4M3), ((E, k, n, 4), F32)
    return fp8_gemm.nt, (*shapes, ((Z,), jnp.int32))


def wgrad(T, E, M, N, form):
    shapes = ((M, T), E4M3), ((T // 128, M), F32), ((N, T), form), ((T // 128, N), F32)
    if E == 1:
        return fp8_gemm.wgrad, shapes
    return lambda *a: fp8_gemm.wgrad(*a, E), (*shapes, ((T // 128,), jnp.int32))


def linear(M, N, K):
    """All three products of a linear map and its quantisers, odd sizes."""
    rule = build(Fp8Dot(backend="mosaic"))

    def call(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: rule.last_axis(x, w)[0], x, w)
        return y, vjp(dy)

    return call, (((M, K), BF16), ((K, N), F32), ((M, N), BF16))


def bf16_experts(Z, E, I, O, transposed):
    def call(x, w, e):
        return bf16_gemm.times_experts(x, w, e, transposed)

    return call, (((128 * Z, O if transposed else I), BF16), ((E, I, O), BF16), ((Z,), jnp.int32))


def bf16_wgrad(Z, E, I, O):
    def call(x, dy, e):
        return bf16_gemm.expert_gradients(x, dy, e, E)

    return call, (((128 * Z, I), BF16), ((128 * Z, O), BF16), ((Z,), jnp.int32))


def causal(B, T, N, W, U):
    """Attention and its gradients."""

    def call(q, k, v, do):
        o, vjp = jax.vjp(lambda *qkv: attention(*qkv, 0.1), q, k, v)
        return o, vjp(do)

    wide, narrow = ((B, T, N, W), BF16), ((B, T, N, U), BF16)
    return call, (wide, wide, narrow, narrow)


def decoding(B, T, N, S, L=4):
    shapes = ((B, T, N, 512), BF16), ((B, T, N, 64), BF16)
    cache = ((L, B, S, 512), BF16), ((L, B, S, 64), BF16)
    where = ((), jnp.int32), ((B, T), jnp.int32)
    return lambda *a: absorbed_attention(*a, 0.1), (*shapes, *cache, *where)


def tiles(dtype, transposed):
    return lambda x: quantize.tiles(x, transposed), (((4096, 7168), dtype),)


def cached():
    shapes = ((4096, 7168), E4M3), ((56, 4096), F32)
    return lambda x, s: quantize.tiles(x, True, scales=s), shapes


def swiglu(rows, width, dtype=BF16):
    shapes = ((rows, width), dtype), ((rows, width), dtype), ((rows, 1), F32)
    return lambda *x: quantize.swiglu_tiles(Swiglu(*x), dtype), shapes


def swiglu_of_a_cache(rows, width):
    def call(gate, up, gate_scales, up_scales):
        gate, up = quantize.Tiles(gate, gate_scales), quantize.Tiles(up, up_scales)
        return quantize.swiglu_tiles(Swiglu(gate, up), BF16)

    return call, (*[((rows, width), E4M3)] * 2, *[((-(-width // 128), rows), F32)] * 2)


def squares(dtype, transposed):
    return lambda w: quantize.squares(w, transposed, "e4m3", True), (((4, 7168, 2048), dtype),)


WIDTHS = {  # outputs, inputs of the 671B model's products
    "q_a, kv_a": (2112, 7168), "kv_a": (576, 7168), "q_b": (24576, 1536), "kv_b": (32768, 512),
    "o": (7168, 16384), "gate, up": (4096, 7168), "down": (7168, 2048),
}  # fmt: skip
CALLS = {
    **{f"nt {name}, 4096 tokens": nt(4096, *shape) for name, shape in WIDTHS.items()},
    "nt gate, up, 64 tokens": nt(64, 4096, 7168),
    "nt q_a, kv_a, 128 tokens": nt(128, 2112, 7168),
    "nt, 1000 tokens": nt(1000, 7168, 2048),
    "nt, rows shared": nt(4096, 2112, 7168, Tuning(multicast="rows")),
    "nt, columns shared": nt(4096, 7168, 2048, Tuning(multicast="columns")),
    "grouped gate, up": grouped_nt(256, 32, 4096, 7168),
    "grouped down": grouped_nt(256, 32, 7168, 2048),
    "wgrad dense": wgrad(4096, 1, 7168, 2112, E4M3),
    "wgrad grouped": wgrad(32768, 32, 7168, 4096, E4M3),
    "wgrad grouped, e5m2": wgrad(32768, 32, 2048, 7168, E5M2),
    "linear, odd": linear(1003, 576, 300),
    "bf16 experts, odd": bf16_experts(5, 3, 300, 145, True),
    "bf16 experts": bf16_experts(256, 32, 7168, 4096, False),
    "bf16 experts, dgrad": bf16_experts(256, 32, 7168, 4096, True),
    "bf16 experts, wgrad": bf16_wgrad(256, 32, 7168, 4096),
    "attention": causal(1, 4096, 128, 192, 128),
    "attention, odd": causal(2, 1003, 16, 192, 128),
    "attention, narrow": causal(1, 256, 2, 64, 64),
    "decode": decoding(16, 1, 128, 8192),
    "decode, two tokens, few heads": decoding(2, 2, 16, 4096),
    **{f"tiles {dtype.__name__} {transposed}": tiles(dtype, transposed)
       for dtype in (BF16, F32) for transposed in (False, True)},
    "tiles both ways": (quantize.both_ways, (((4096, 7168), BF16),)),
    "tiles of a cache": cached(),
    "swiglu of experts": swiglu(32768, 2048),
    "swiglu, odd": swiglu(1003, 300),
    "swiglu float32": swiglu(4096, 2048, F32),
    "swiglu of a cache, dense": swiglu_of_a_cache(4096, 18432),
    **{f"squares {dtype.__name__} {transposed}": squares(dtype, transposed)
       for dtype in (BF16, F32) for transposed in (False, True)},
}  # fmt: skip


def lowered(name: str, sharding=None):
    """The call lowered for CUDA on whatever machine this is."""
    call, shapes = CALLS[name]
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    jitted = jax.jit(call, out_shardings=sharding)
    return jitted.trace(*arguments).lower(lowering_platforms=("cuda",))


def main() -> None:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name in CALLS:
        print(name, flush=True)
        lowered(name, sharding).compile()


if __name__ == "__main__":
    main()
