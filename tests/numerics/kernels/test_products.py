"""The kernels' products in interpret mode against exact ones: odd shapes, empty experts, races."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.numerics.fp8 import BLOCK, TILE, Quantized, dequantize, quantize
from dsv3.numerics.kernels import bf16_gemm, fp8_gemm
from dsv3.numerics.kernels.gemm import Tuning, every_128
from dsv3.numerics.products import exact_product

EXPERTS = 3
EXPERT_Z = jnp.array([0, 2, EXPERTS], jnp.int32)  # expert 1 has no tokens, block 2 no expert
ROWS = {0: slice(0, 128), 2: slice(128, 256)}
SMALL = functools.partial(Tuning, sms=2, stages=2)
MULTICAST = [SMALL(multicast=which) for which in ("none", "rows", "columns")]
FLAT = SMALL(rows=64, columns=32)


def random(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def fourfold(scales):
    return jnp.broadcast_to(scales[..., None], (*scales.shape, 4))


@pytest.mark.parametrize(
    ("shape", "tuning"),
    [*(((132, 136, 272), tuning) for tuning in MULTICAST), ((20, 72, 144), FLAT)],
    ids=["one CTA", "rows shared", "columns shared", "flat"],
)
def test_nt_is_the_product_of_what_was_quantised(interpret, shape, tuning):
    M, N, K = shape
    x, w = quantize(random(0, M, K), TILE), quantize(random(1, N, K), BLOCK)
    operands = x.values, x.scales.T, w.values[None], fourfold(w.scales.T[None])
    with interpret():
        y = fp8_gemm.nt(*operands, dtype=jnp.float32, tuning=tuning)
    assert error(y, exact_product(x, w, (1, 1))) < 1e-6  # three FP32 additions


def test_nt_multiplies_each_block_by_its_expert(interpret):
    x = quantize(random(0, 384, 144), TILE)
    w = quantize(random(1, EXPERTS, 72, 144), BLOCK)
    operands = x.values, x.scales.T, w.values, fourfold(w.scales.swapaxes(1, 2))
    with interpret():
        y = fp8_gemm.nt(*operands, EXPERT_Z, jnp.bfloat16, SMALL())
    for expert, rows in ROWS.items():
        mine = Quantized(x.values[rows], x.scales[rows])
        theirs = Quantized(w.values[expert], w.scales[expert])
        assert error(y[rows], exact_product(mine, theirs, (1, 1))) < 2**-8  # BF16
    assert not y[256:].any()


def test_wgrad_sums_each_experts_tokens(interpret):
    a, b = quantize(random(0, 72, 384), TILE), quantize(random(1, 40, 384), TILE, "e5m2")
    with interpret():
        g = fp8_gemm.wgrad(
            a.values, a.scales.T, b.values, b.scales.T, EXPERT_Z, EXPERTS, SMALL(columns=64)
        )
    for expert, rows in ROWS.items():
        wanted = dequantize(a)[:, rows] @ dequantize(b)[:, rows].T
        assert error(g[expert], wanted) < 1e-6
    assert not g[1].any()


def test_wgrad_of_all_tokens(interpret):
    a, b = quantize(random(0, 72, 272), TILE), quantize(random(1, 40, 272), TILE)
    with interpret():
        [g] = fp8_gemm.wgrad(a.values, a.scales.T, b.values, b.scales.T, tuning=SMALL(columns=64))
    assert error(g, exact_product(a, b, (1, 1))) < 1e-6


def test_bf16_products_of_experts(interpret):
    x, dy = random(0, 384, 72, dtype=jnp.bfloat16), random(2, 384, 40, dtype=jnp.bfloat16)
    w, tuning = random(1, EXPERTS, 72, 40, dtype=jnp.bfloat16), SMALL(columns=64)
    with interpret():
        y = bf16_gemm.times_experts(x, w, EXPERT_Z, tuning=tuning)
        dx = bf16_gemm.times_experts(dy, w, EXPERT_Z, transposed=True, tuning=tuning)
        dw = bf16_gemm.expert_gradients(x, dy, EXPERT_Z, EXPERTS, tuning)
    x, dy, w = (a.astype(jnp.float32) for a in (x, dy, w))
    for expert, rows in ROWS.items():
        assert error(y[rows], x[rows] @ w[expert]) < 2**-8
        assert error(dx[rows], dy[rows] @ w[expert].T) < 2**-8
        assert error(dw[expert], x[rows].T @ dy[rows]) < 1e-6
    assert not y[256:].any() and not dx[256:].any() and not dw[1].any()


# --- what is refused, and how ------------------------------------------------------------------


def nt_of(M=128, K=128, N=128, k=1, w_K=128, expert_Z=None, tuning=None):
    x, w = jnp.zeros((M, K), jnp.float8_e4m3fn), jnp.zeros((1, N, w_K), jnp.float8_e4m3fn)
    return fp8_gemm.nt(x, jnp.ones((k, M)), w, jnp.ones((1, k, 1, 4)), expert_Z, tuning=tuning)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nt_of(w_K=256), "w_ENK has K = 256, x_MK wants 128"),
        (lambda: nt_of(k=2), "sx_kM has k = 2"),
        (lambda: nt_of(expert_Z=EXPERT_Z), "x_MK has M = 128, 3 blocks of 128 wants 384"),
        (lambda: nt_of(tuning=Tuning(columns=256)), "tuning.columns = 256 spans"),
        (lambda: nt_of(tuning=Tuning(stages=9)), "tuning.stages = 9"),
        (lambda: Tuning(rows=96), "tuning.rows = 96"),
        (lambda: Tuning(columns=96), "tuning.columns = 96"),
        (lambda: Tuning(slots=0), "tuning.slots = 0"),
        (lambda: every_128(EXPERT_Z, 192), "blocks of 64 rows"),
        (
            lambda: bf16_gemm.times_experts(jnp.zeros((384, 8)), EXPERT_Z, EXPERT_Z),
            "x_PK is float32",
        ),
    ],
)
def test_a_refusal_names_the_dimension(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_longer_blocks_are_cut_in_blocks_of_128():
    np.testing.assert_array_equal(every_128(EXPERT_Z, 768), [0, 0, 2, 2, 3, 3])


def test_few_rows_get_flat_tiles_and_few_tiles_narrow_ones():
    assert fp8_gemm.nt_tuning(4096, 7168) == Tuning()
    assert fp8_gemm.nt_tuning(64, 7168) == Tuning(rows=64, columns=64)
    assert fp8_gemm.nt_tuning(64, 2112).columns == 32
