"""The chunked head loss against all logits at once; the MTP loss against Eq. 24 and 25."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.model.transformer import Transformer
from dsv3.training import losses
from dsv3.training.losses import head_loss, training_loss
from tests.training.small import CONFIG, tokens


def plain_loss(h_XD, w_DV, label_X, weight_X):
    log_p_XV = jax.nn.log_softmax(h_XD.astype(jnp.float32) @ w_DV)
    return -jnp.sum(log_p_XV[jnp.arange(len(label_X)), label_X] * weight_X)


@pytest.mark.parametrize(("rows", "chunk"), [(24, 8), (23, 8), (5, 8), (1, 1)])
def test_head_loss_and_its_gradients_equal_the_plain_form(rows, chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", chunk)
    keys = jax.random.split(jax.random.key(rows), 4)
    h_XD, w_DV = jax.random.normal(keys[0], (rows, 6)), jax.random.normal(keys[1], (6, 11))
    label_X = jax.random.randint(keys[2], (rows,), 0, 11)
    weight_X = jax.random.uniform(keys[3], (rows,))
    chunked, plain = (
        jax.value_and_grad(lambda h, w, f=f: 3 * f(h, w, label_X, weight_X), argnums=(0, 1))(
            h_XD, w_DV
        )
        for f in (head_loss, plain_loss)
    )
    chex.assert_trees_all_close(chunked, plain, rtol=2e-5, atol=1e-6)  # sums in another order


def test_a_label_of_weight_zero_has_no_influence():
    h_XD, w_DV = jax.random.normal(jax.random.key(0), (4, 6)), jnp.ones((6, 11))
    weight_X = jnp.array([1.0, 0.0, 1.0, 0.0])
    one = head_loss(h_XD, w_DV, jnp.array([1, 2, 3, 4]), weight_X)
    other = head_loss(h_XD, w_DV, jnp.array([1, 9, 3, 9]), weight_X)
    assert one == other


def filled(config):
    """A model of random numbers, without compiling an initialisation."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(0, 0.1, s.shape), s.dtype), shapes)


@pytest.mark.parametrize("depths", [0, 2])
def test_training_loss_is_the_sum_of_the_report_s_terms(depths):
    config = dataclasses.replace(CONFIG.model, mtp_depths=depths)
    model = filled(config)
    window_BS = tokens(2, sequences=3)
    length = window_BS.shape[1] - 1
    loss = jax.jit(functools.partial(training_loss, dtype=jnp.dtype("float32")))
    total, (found, stats) = loss(model, window_BS, jnp.float32(0.3))
    out = jax.jit(lambda m, t: m(t))(model, window_BS[:, :-1])

    def depth_loss(logits_BTV, depth):  # Eq. 24: T - k terms divided by T
        log_p = np.asarray(jax.nn.log_softmax(logits_BTV))
        terms = [
            -log_p[b, i, window_BS[b, i + depth + 1]]
            for b in range(3)
            for i in range(length - depth)
        ]
        return sum(terms) / (3 * length)

    main = depth_loss(out.logits_BTV, 0)
    mtp = [depth_loss(logits, k) for k, logits in enumerate(out.mtp_logits, start=1)]
    mean_mtp = np.mean(mtp) if mtp else 0.0
    np.testing.assert_allclose(found.main, main, rtol=1e-5)
    np.testing.assert_allclose(found.mtp, mean_mtp, rtol=1e-5)
    np.testing.assert_allclose(total, main + 0.3 * mean_mtp + stats.balance_loss, rtol=1e-5)
    assert found.balance > 0
