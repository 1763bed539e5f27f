"""The dot rules against plain products: values, gradients and the precision of each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3.config import Bf16Dot
from dsv3.numerics.dot import PlainDot, build, grouped_loop
from dsv3.numerics.rule import LINEAR

RULE = PlainDot()
EXPERTS = 4
LAYOUTS = {
    "sorted": [0, 0, 1, 2, 3, 3],
    "empty experts": [1, 1, 3, 3, 3, 3],
    "all to one": [2] * 6,
    "any order": [3, 0, 2, 0, 1, 3],
    "unused at the end": [0, 2, 3, EXPERTS, EXPERTS, EXPERTS],
    "none used": [EXPERTS] * 6,
    "fewer than experts": [1, 3, EXPERTS],
    "fewer, one of them twice": [2, 2, 3],
}


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dims(x):
    return (((x.ndim - 1,), (0,)), ((), ()))


def test_the_configuration_names_the_rule():
    assert build(Bf16Dot()) == RULE and hash(build(Bf16Dot())) == hash(RULE)


@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 3, 4)])
def test_dot_general_is_a_matrix_product(leading):
    x, w = random(0, *leading, 6), random(1, 6, 5)
    y = RULE.dot_general(x, w, dims(x))
    np.testing.assert_allclose(y, x.astype(float) @ w, atol=1e-5)  # FP32 rounding of 6 terms


@pytest.mark.parametrize(
    "bad",
    [
        (((0,), (0,)), ((), ())),
        (((1,), (1,)), ((), ())),
        (((1,), (0,)), ((0,), (1,))),
        (((0, 1), (0, 1)), ((), ())),
    ],
)
def test_other_contractions_are_refused(bad):
    with pytest.raises(ValueError, match="a dot rule computes"):
        RULE.dot_general(random(0, 5, 5), random(1, 5, 5), bad)


def test_a_wish_for_a_sharding_is_refused():
    with pytest.raises(ValueError, match="sharding"):
        RULE.dot_general(random(0, 5, 5), random(1, 5, 5), LINEAR, out_sharding="x")


def test_gradients_are_those_of_the_product():
    x, w, dy = random(0, 2, 3, 6), random(1, 6, 5), random(2, 2, 3, 5)

    def gradients(product):
        return jax.grad(lambda x, w: jnp.vdot(product(x, w), dy), argnums=(0, 1))(x, w)

    ours = gradients(lambda x, w: RULE.dot_general(x, w, dims(x)))
    theirs = gradients(lambda x, w: x @ w)
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-5)  # the same FP32 sums in another order


def bf16(x):
    return jnp.asarray(x, jnp.bfloat16)


def test_bf16_compute_keeps_an_fp32_weight_gradient():
    x, w, dy = bf16(random(0, 64, 6)), random(1, 6, 5), bf16(random(2, 64, 5))
    y, pullback = jax.vjp(lambda x, w: RULE.dot_general(x, w, dims(x)), x, jnp.asarray(w))
    dx, dw = pullback(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.asarray(x, float).T @ np.asarray(dy, float)
    np.testing.assert_allclose(dw, exact, rtol=1e-5, atol=1e-5)  # BF16 would be off by 2^-9
    exact_y = np.asarray(x, float) @ np.asarray(bf16(w), float)
    np.testing.assert_allclose(np.asarray(y, float), exact_y, rtol=2**-8, atol=1e-6)


def test_weight_gradient_comes_in_the_dtype_of_the_weight():
    x, w = bf16(random(0, 8, 6)), bf16(random(1, 6, 5))
    dw = jax.grad(lambda w: RULE.dot_general(x, w, LINEAR).astype(jnp.float32).sum())(w)
    assert dw.dtype == jnp.bfloat16


def test_drops_into_flax_linear():
    x = random(0, 2, 3, 6)
    layer: Any = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0), dot_general=RULE.dot_general)
    np.testing.assert_allclose(layer(x), x @ np.asarray(layer.kernel[...]), atol=1e-5)

    # nnx would cast the kernel itself, and its gradient with it; the rule wants the master copy.
    layer.promote_dtype = lambda arrays, dtype: arrays
    dw = jax.grad(lambda m: m(bf16(x)).astype(jnp.float32).sum())(layer)
    exact = np.asarray(bf16(x), float).sum((0, 1))[:, None].repeat(5, axis=1)
    assert dw.kernel[...].dtype == jnp.float32
    np.testing.assert_allclose(dw.kernel[...], exact, atol=1e-5)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_grouped_is_the_loop_over_experts(layout, block):
    expert_Z = jnp.array(layout)
    x_PI, w_EIO = random(0, len(layout) * block, 6), random(1, EXPERTS, 6, 5)
    dy_PO = random(2, len(layout) * block, 5)
    fast, slow = forward_and_gradients(x_PI, w_EIO, expert_Z, dy_PO, block)
    for mine, wanted in zip(fast, slow, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-5)  # FP32 sums of at most 48 terms
    y_PO, dx_PI, dw_EIO = fast
    idle = [e for e in range(EXPERTS) if e not in layout]
    unused_P = np.repeat(np.array(layout) == EXPERTS, block)
    assert not np.any(dw_EIO[np.array(idle, int)])
    assert not np.any(y_PO[unused_P]) and not np.any(dx_PI[unused_P])


@functools.partial(jax.jit, static_argnames="block")
def forward_and_gradients(x_PI, w_EIO, expert_Z, dy_PO, block):
    def three(product):
        y_PO, pullback = jax.vjp(product, x_PI, w_EIO)
        return y_PO, *pullback(dy_PO)

    fast = three(lambda x, w: RULE.grouped(x, [w], expert_Z)[0])
    slow = three(lambda x, w: grouped_loop(x, w, expert_Z, block))
    return fast, slow


def test_grouped_in_bf16_accumulates_weight_gradients_in_fp32():
    blocks, block = 40, 4  # expert 0 sums 160 rows over 40 blocks: BF16 partial sums would show
    expert_Z = jnp.zeros(blocks, jnp.int32)
    x_PI, dy_PO = bf16(random(0, blocks * block, 6)), bf16(random(2, blocks * block, 5))
    w_EIO = jnp.asarray(random(1, 2, 6, 5))
    y_PO, pullback = jax.vjp(lambda x, w: RULE.grouped(x, [w], expert_Z)[0], x_PI, w_EIO)
    dx_PI, dw_EIO = pullback(dy_PO)
    assert (y_PO.dtype, dx_PI.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert dw_EIO.dtype == jnp.float32
    exact = np.asarray(x_PI, float).T @ np.asarray(dy_PO, float)
    np.testing.assert_allclose(dw_EIO[0], exact, rtol=1e-5, atol=1e-5)


def test_several_weights_share_their_input():
    expert_Z = jnp.array([0, 2, 3, EXPERTS], jnp.int32)
    shapes = (8, 6), (EXPERTS, 6, 5), (EXPERTS, 6, 3)
    x, a, b = (jnp.asarray(random(i, *shape)) for i, shape in enumerate(shapes))

    def together(x, a, b):
        return RULE.grouped(x, [a, b], expert_Z)

    def apart(x, a, b):
        return tuple(RULE.grouped(x, [w], expert_Z)[0] for w in (a, b))

    dys = jnp.asarray(random(3, 8, 5)), jnp.asarray(random(4, 8, 3))
    (ys, vjp), (wanted, vjp_apart) = jax.vjp(together, x, a, b), jax.vjp(apart, x, a, b)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (ys, vjp(dys)), (wanted, vjp_apart(dys)))
