"""Multi-token prediction: what each depth may see, and that its tail is masked everywhere."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.model.mtp import MtpModule, tokens_ahead, valid_at
from dsv3.model.rope import rotation
from dsv3.model.transformer import Transformer
from dsv3.training.losses import training_loss

T = 7
TOKENS: Any = np.arange(1, T + 1)[
    None
]  # each token once, so the row of the table tells its position


def random(seed, *shape) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def model(small, fill):
    """A dense layer, then two depths with experts: what is counted and balanced is theirs."""
    config = dataclasses.replace(small, layers=1, dense_layers=1)
    return fill(lambda key: Transformer(key, config))


def test_tokens_ahead():
    tokens_BT = jnp.array([[5, 6, 7, 8]])
    np.testing.assert_array_equal(tokens_ahead(tokens_BT, 1), [[6, 7, 8, 0]])
    np.testing.assert_array_equal(tokens_ahead(tokens_BT, 3), [[8, 0, 0, 0]])


def test_valid_positions_have_a_valid_token_ahead():
    valid_BT = jnp.array([[True, True, True, False]])
    np.testing.assert_array_equal(valid_at(valid_BT, 1), [[True, True, False, False]])
    np.testing.assert_array_equal(
        valid_at(jnp.ones((1, 4), bool), 3), [[True, False, False, False]]
    )


def test_the_projection_is_equation_21_embedding_first(model, small):
    module, h_BTD, ahead_BTD = model.mtp[0], random(0, 1, T, 16), random(1, 1, T, 16)
    joint_BTD = module.join(h_BTD, ahead_BTD)

    def norm(x, gain):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * np.asarray(gain[...])

    parts = norm(ahead_BTD, module.embedding_norm.gain), norm(h_BTD, module.hidden_norm.gain)
    wanted = np.concatenate(parts, -1) @ np.asarray(module.project.w[...])
    np.testing.assert_allclose(joint_BTD, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def reach(model, small):
    """Whether h^k_i depends on a row of the embedding table, bool [J + 1, T, V]; on the first
    depth's projection, [J + 1, T]; and whether the balance loss depends on a row, [V]."""
    weight_D = random(0, small.width)

    def outputs(model):
        hidden = model.hidden(TOKENS)
        seen = jnp.stack([h_BTD[0] @ weight_D for h_BTD in (hidden.main_BTD, *hidden.mtp)])
        return seen, hidden.stats.balance_loss

    @jax.jit
    def gradients(model):
        (seen, balance), pullback = jax.vjp(outputs, model)

        def one(cotangent):
            dmodel = pullback((cotangent, jnp.zeros_like(balance)))[0]
            return touched(dmodel.embedding), jnp.any(dmodel.mtp[0].project.w[...] != 0)

        each = jnp.eye(seen.size).reshape(-1, *seen.shape)
        by_balance = pullback((jnp.zeros_like(seen), jnp.ones_like(balance)))[0]
        return *jax.vmap(one)(each), touched(by_balance.embedding)

    def touched(embedding):
        return jnp.any(embedding.table[...] != 0, axis=-1)

    by_row, by_depth_1, by_balance = map(np.asarray, gradients(model))
    depths = small.mtp_depths + 1
    return by_row.reshape(depths, T, -1), by_depth_1.reshape(depths, T), by_balance


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth_k_sees_k_tokens_ahead_and_no_further(reach, depth):
    by_row, _, _ = reach
    position, token = np.arange(T - depth)[:, None], np.arange(T)[None]
    np.testing.assert_array_equal(by_row[depth, : T - depth, 1 : T + 1], token <= position + depth)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_filler_behind_the_end_reaches_no_valid_position(reach, depth):
    by_row, _, _ = reach
    assert not by_row[depth, : T - depth, 0].any()
    assert by_row[2, T - 2, 0]  # while the masked tail does read it


def test_the_second_depth_stands_on_the_first(reach):
    _, by_depth_1, _ = reach
    np.testing.assert_array_equal(by_depth_1.all(axis=1), [False, True, True])
    assert not by_depth_1[0].any()


def test_the_tail_is_left_out_of_the_balance_loss(reach):
    _, _, by_balance = reach
    np.testing.assert_array_equal(by_balance, np.isin(np.arange(31), TOKENS))


LENGTHS = np.array([7, 4])  # of two sequences, the second padded
TWICE: Any = np.tile(TOKENS, (2, 1))
VALID: Any = np.arange(T)[None] < LENGTHS[:, None]


@pytest.fixture(scope="module")
def hidden(model):
    return jax.jit(Transformer.hidden)(model, TWICE, VALID)


def test_the_tail_is_left_out_of_the_counts(hidden, small):
    """Rows of depth k count K experts for each of T - k positions, fewer where there is padding."""
    positions = [sum(LENGTHS - k) for k in (1, 2)]
    chosen = small.moe.experts_per_token
    np.testing.assert_array_equal(hidden.stats.counts_LE.sum(-1), chosen * np.array(positions))


def test_depths_chain_before_their_own_norm(model, hidden, small):
    """h^0 is normed, the state between depths is not, and each depth norms for the head."""
    turn, h_BTD = rotation(small.mla, jnp.arange(T)), hidden.main_BTD
    for k, module in enumerate(model.mtp, start=1):
        ahead_BTD = model.embedding(tokens_ahead(TWICE, k))
        h_BTD, _ = jax.jit(MtpModule.__call__)(module, h_BTD, ahead_BTD, turn, valid_at(VALID, k))
        np.testing.assert_allclose(hidden.mtp[k - 1], module.norm(h_BTD), atol=1e-4)


def test_the_target_of_depth_k_at_i_is_the_token_k_plus_1_ahead(model):
    """Eq. 23-25 from the logits: the sum over T - k positions divided by T, depths averaged."""
    tokens_BS = jnp.asarray(np.random.default_rng(0).integers(1, 31, (2, T + 1)))

    @jax.jit
    def both(model):
        out = model(tokens_BS[:, :-1])
        _, (losses, _) = training_loss(model, tokens_BS, jnp.float32(0.3), jnp.dtype(jnp.float32))
        return (out.logits_BTV, *out.mtp_logits), losses

    logits, losses = both(model)
    by_depth = []
    for k, logits_BTV in enumerate(logits):
        log_p = np.asarray(jax.nn.log_softmax(logits_BTV), float)
        by_depth.append(-sum(log_p[b, i, tokens_BS[b, i + k + 1]]
                             for b in range(2) for i in range(T - k)) / (2 * T))  # fmt: skip
    np.testing.assert_allclose(losses.main, by_depth[0], rtol=1e-5)
    np.testing.assert_allclose(losses.mtp, np.mean(by_depth[1:]), rtol=1e-5)
    total = losses.main + 0.3 * losses.mtp + losses.balance
    np.testing.assert_allclose(losses.total, total, rtol=1e-6)
