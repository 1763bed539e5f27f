"""Rotary positions and YaRN: the reference's numbers, and that only distances count."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.config import Mla, Yarn
from dsv3.model.rope import ROTATE, frequencies, rotation, softmax_scale

V3 = Mla(heads=128, query_latent=1536, kv_latent=512, nope_dim=128, rope_dim=64, value_dim=128)
EXTENDED = dataclasses.replace(V3, yarn=Yarn())


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_plain_frequencies():
    w = frequencies(V3)
    assert w.shape == (32,)
    np.testing.assert_allclose(w, [10_000 ** (-2 * i / 64) for i in range(32)], rtol=1e-12)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        (10, 0.0562341325), (11, 0.0390069266), (16, 0.0055), (22, 0.0001778279),
        (23, 3.3338e-05), (31, 3.3338e-06),
    ],
)  # fmt: skip
def test_yarn_frequencies_of_the_release(pair, value):
    assert frequencies(EXTENDED)[pair] == pytest.approx(value, rel=2e-5)  # as printed there


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones():
    plain, stretched = frequencies(V3), frequencies(EXTENDED)
    np.testing.assert_array_equal(stretched[:11], plain[:11])
    np.testing.assert_allclose(stretched[23:], plain[23:] / 40, rtol=1e-12)
    assert np.all(np.diff(stretched) < 0)


def test_softmax_scales_of_the_release():
    assert softmax_scale(V3) == pytest.approx(0.0721687836, rel=1e-9)
    assert softmax_scale(EXTENDED) == pytest.approx(0.1352337789, rel=1e-9)
    v2 = dataclasses.replace(V3, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707))
    assert softmax_scale(v2) == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    without = dataclasses.replace(V3, yarn=Yarn(mscale_all_dim=0.0))
    assert softmax_scale(without) == softmax_scale(V3)
    unstretched = dataclasses.replace(V3, yarn=Yarn(factor=1.0))
    assert softmax_scale(unstretched) == softmax_scale(V3)


def test_cos_and_sin_carry_only_the_ratio_of_the_two_mscales():
    positions = jnp.arange(3)
    for yarn, size in [
        (Yarn(), 1.0),
        (Yarn(mscale=1.0, mscale_all_dim=0.0), 0.1 * math.log(40) + 1),
        (Yarn(mscale=0.707, mscale_all_dim=0.707), 1.0),
    ]:
        cos_TR, sin_TR = rotation(dataclasses.replace(V3, yarn=yarn), positions)
        np.testing.assert_allclose(cos_TR[0], size, rtol=1e-6)
        np.testing.assert_allclose(cos_TR**2 + sin_TR**2, size**2, rtol=1e-5)


def test_rotation_multiplies_complex_numbers():
    cos_TR, sin_TR = rotation(Mla(rope_dim=6), jnp.arange(5))
    x_BTNR = random(0, 2, 5, 3, 6)
    angle = np.arange(5)[:, None] * frequencies(Mla(rope_dim=6))
    turned = (x_BTNR[..., 0::2] + 1j * x_BTNR[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    wanted = np.stack([turned.real, turned.imag], -1).reshape(x_BTNR.shape)
    np.testing.assert_allclose(ROTATE["interleaved"](x_BTNR, cos_TR, sin_TR), wanted, atol=1e-5)


def scores(layout, q_R, k_R, turn):
    """q · k at every pair of positions, [T, S]."""
    positions = len(turn[0])
    q, k = (
        np.asarray(ROTATE[layout](jnp.broadcast_to(x, (1, positions, 1, len(x))), *turn))[0, :, 0]
        for x in (q_R, k_R)
    )
    return q @ k.T


def test_interleaved_and_half_layouts_give_the_same_scores():
    q_R, k_R, turn = random(0, 64), random(1, 64), rotation(EXTENDED, jnp.arange(40))
    split = np.r_[0:64:2, 1:64:2]  # real parts, then imaginary parts
    np.testing.assert_allclose(
        scores("interleaved", q_R, k_R, turn),
        scores("half", q_R[split], k_R[split], turn),
        atol=1e-4,  # FP32 sums of 64 terms of order 1
    )


@pytest.mark.parametrize("layout", ROTATE)
def test_scores_depend_on_the_distance_only(layout):
    q_R, k_R, turn = random(0, 64), random(1, 64), rotation(EXTENDED, jnp.arange(40))
    s_TS = scores(layout, q_R, k_R, turn)
    for distance in range(-39, 40):
        diagonal = np.diagonal(s_TS, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.ptp(s_TS[:, 0]) > 1  # and it does count


def test_positions_far_out_are_still_exact():
    cos_TR, sin_TR = rotation(EXTENDED, jnp.array([131_071]))
    angle = 131_071 * frequencies(EXTENDED)
    # an FP32 angle of 1.3e5 radians is off by up to 2^-7; slow pairs are far better
    np.testing.assert_allclose(cos_TR[0], np.cos(angle), atol=2**-6)
    np.testing.assert_allclose(sin_TR[0, 10:], np.sin(angle[10:]), atol=1e-3)
