"""Cross-entropy of next tokens, without ever holding all logits (Eq. 23-25).

The head's product with the loss behind it is one function with its own derivative. It walks over
chunks of positions; for each it forms the logits, the loss and, since softmax minus one-hot is
already known there, the gradients with respect to the hidden states and the head's weight. So a
step holds one chunk of [chunk, V] logits instead of [X, V], and computes each logit once, not again
in the backward pass. The price is a head gradient in FP32 that is carried from the forward pass.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.model.mtp import valid_at
from dsv3.model.transformer import Stats, Transformer
from dsv3.numerics.rows import contract_rows
from dsv3.numerics.rule import LINEAR

CHUNK = 512  # positions whose logits are held at once


class Losses(NamedTuple):
    """Float32 scalars; `total` is what is minimised."""

    total: Array
    main: Array
    mtp: Array  # mean over depths, before its weight
    balance: Array  # weighted by its alpha, summed over layers


def training_loss(
    model: Transformer, tokens_BS: Array, mtp_weight: Array, dtype: jnp.dtype
) -> tuple[Array, tuple[Losses, Stats]]:
    """Loss of windows of S = T + 1 tokens: L_main + mtp_weight · mean_k L_k + L_balance (Eq. 25).

    Depth k sums over its T - k positions and divides by T (Eq. 24), so that it weighs as much per
    token as the main loss.
    """
    inputs_BT = tokens_BS[:, :-1]
    hidden = model.hidden(inputs_BT, dtype=dtype)
    main = _depth_loss(hidden.main_BTD, model.head.w[...], tokens_BS, 0)
    per_depth = [
        _depth_loss(h_BTD, model.head.w[...], tokens_BS, k)
        for k, h_BTD in enumerate(hidden.mtp, start=1)
    ]
    mtp = jnp.mean(jnp.stack(per_depth)) if per_depth else jnp.zeros(())
    balance = hidden.stats.balance_loss
    total = main + mtp_weight * mtp + balance
    return total, (Losses(total, main, mtp, balance), hidden.stats)


def _depth_loss(h_BTD: Array, w_DV: Array, tokens_BS: Array, depth: int) -> Array:
    """Mean over B·T of -log P(t_{i+depth+1}), the positions without such a token counting zero."""
    label_BT = jnp.pad(tokens_BS[:, depth + 1 :], ((0, 0), (0, depth)))
    known_BT = valid_at(jnp.ones(label_BT.shape, bool), depth)
    weight_BT = known_BT.astype(jnp.float32) / label_BT.size
    h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
    return head_loss(h_XD, w_DV, label_BT.reshape(-1), weight_BT.reshape(-1))


@jax.custom_vjp
def head_loss(h_XD: Array, w_DV: Array, label_X: Array, weight_X: Array) -> Array:
    """sum_x weight_x · (-log softmax(h_x · w)[label_x]), float32; no gradient reaches weight_X."""

    def chunk_loss(total, chunk):
        nll_c, _ = negative_log_likelihood(chunk[0], w_DV, chunk[1])
        return total + jnp.sum(nll_c * chunk[2]), None

    total, _ = lax.scan(chunk_loss, jnp.zeros(()), _chunks(h_XD, label_X, weight_X))
    return total


def negative_log_likelihood(h_cD: Array, w_DV: Array, label_c: Array) -> tuple[Array, Array]:
    """NLL [c] and log-probabilities [c, V] of one chunk, float32."""
    logits_cV = lax.dot_general(
        h_cD, w_DV.astype(h_cD.dtype), LINEAR, preferred_element_type=jnp.float32
    )
    log_p_cV = jax.nn.log_softmax(logits_cV, axis=-1)
    return -jnp.take_along_axis(log_p_cV, label_c[:, None], axis=1)[:, 0], log_p_cV


def _chunks(h_XD: Array, label_X: Array, weight_X: Array) -> tuple[Array, Array, Array]:
    """The operands in chunks [X / c, c, ...], padded with rows of weight zero."""
    rows = h_XD.shape[0]
    size = min(CHUNK, rows)
    padding = -rows % size

    def cut(x):
        padded = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    return cut(h_XD), cut(label_X), cut(weight_X)


def _head_loss_forward(h_XD, w_DV, label_X, weight_X):
    w = w_DV.astype(h_XD.dtype)

    def chunk_gradients(carry, chunk):
        total, dw_DV = carry
        h_cD, label_c, weight_c = chunk
        nll_c, log_p_cV = negative_log_likelihood(h_cD, w, label_c)
        is_label_cV = jax.nn.one_hot(label_c, w.shape[1], dtype=bool)
        dlogits_cV = (jnp.exp(log_p_cV) - is_label_cV) * weight_c[:, None]
        dlogits_cV = dlogits_cV.astype(h_cD.dtype)
        dh_cD = lax.dot_general(
            dlogits_cV, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        dw_DV += contract_rows(h_cD, dlogits_cV)
        return (total + jnp.sum(nll_c * weight_c), dw_DV), dh_cD.astype(h_cD.dtype)

    start = (jnp.zeros(()), jnp.zeros(w_DV.shape, jnp.float32))
    (total, dw_DV), dh_ZcD = lax.scan(chunk_gradients, start, _chunks(h_XD, label_X, weight_X))
    dh_XD = dh_ZcD.reshape(-1, h_XD.shape[1])[: h_XD.shape[0]]
    return total, (dh_XD, dw_DV.astype(w_DV.dtype))


def _head_loss_backward(residuals, dtotal):
    dh_XD, dw_DV = residuals
    return dh_XD * dtotal.astype(dh_XD.dtype), dw_DV * dtotal.astype(dw_DV.dtype), None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)
