"""Routing tokens to experts, and keeping the experts' loads even (§2.1.2, §4.5.2).

    s_i  = sigmoid(u · e_i)                                                  affinity       (15)
    g'_i = s_i if (s_i + b_i) among the K best, else 0                       selection      (16)
    g_i  = gate_scale · g'_i / sum_j g'_j                                    gate           (13)

The bias b decides who is chosen and nothing else: gates come from the unbiased scores, and no
gradient reaches b. Selection is group-limited: a group scores the sum of its best
`group_score_experts` biased scores, the best groups are kept, all other experts are masked with
-inf (not 0: a kept biased score may be negative). Logits and scores are FP32 whatever the compute
dtype. Ties go to the lower index.

Balancing is one of three (`config.Moe.balance`):
- `AuxFree`: after each optimizer step `b_i += speed · sign(mean load - load_i)` from the loads of
  the whole batch (`updated_bias`), plus the sequence-wise loss with a very small weight.
- `AuxLoss`: that loss alone, with a weight that matters, over each sequence or over the batch.
- `NoBalance`.

The loss (Eq. 17-20) is L = alpha · sum_i f_i P_i with f_i = E/(K·T) · #{t: s_it in TopK(s_t)} from
the scores as they are, without bias or groups, and P_i the mean of s_it / sum_j s_jt. Perfect
balance gives alpha. The report leaves the reduction open: here it is the mean over sequences, and
the sum over layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from dsv3.config import AuxFree, AuxLoss, Model, Moe, NoBalance
from dsv3.model.layers import normal, save_as
from dsv3.parallel.dispatch import count
from dsv3.parallel.shard import ALONE, Shard


class RouterBias(nnx.Variable):
    """The selection bias: not a Param, so neither gradient, optimizer nor weight decay sees it."""


class Routing(NamedTuple):
    """What the router decides for X = B·T tokens."""

    experts_XK: Array  # int32 [X, K], best first
    gates_XK: Array  # float32 [X, K]
    counts_E: Array  # int32 [E]: valid tokens sent to each expert
    balance_loss: Array  # float32 scalar, already weighted by its alpha


class Router(nnx.Module):
    """Routes u_BTD; tokens where valid_BT is False are routed but neither counted nor balanced."""

    def __init__(self, key: Array, config: Model, shard: Shard = ALONE):
        moe = config.moe
        self.w = nnx.Param(normal(key, (config.width, moe.routed_experts), config.init_std))
        self.bias = RouterBias(jnp.zeros(moe.routed_experts))
        self.config = moe
        self.shard = shard

    def __call__(self, u_BTD: Array, valid_BT: Array) -> Routing:
        scores_BTE = self.scores(u_BTD)
        scores_XE = scores_BTE.reshape(-1, self.config.routed_experts)
        experts_XK = choose(lax.stop_gradient(scores_XE), self.bias[...], self.config)
        experts_XK = save_as("routing", experts_XK)
        counts_E = count(experts_XK, self.config.routed_experts, valid_BT.reshape(-1))
        loss = balance_loss(scores_BTE, valid_BT, self.config, self.shard)
        return Routing(experts_XK, gates(scores_XE, experts_XK, self.config), counts_E, loss)

    def scores(self, u_BTD: Array) -> Array:
        """Affinities s_BTE in (0, 1), float32 (Eq. 15)."""
        u32_BTD = u_BTD.astype(jnp.float32)
        w32_DE = self.w[...].astype(jnp.float32)
        logits_BTE = jnp.einsum("btd,de->bte", u32_BTD, w32_DE, precision=lax.Precision.HIGHEST)
        return jax.nn.sigmoid(save_as("routing", logits_BTE))


def choose(scores_XE: Array, bias_E: Array, config: Moe) -> Array:
    """The experts of every token, int32 [X, K]: top-K of biased scores within the best groups."""
    biased_XE = scores_XE + bias_E[None, :].astype(jnp.float32)
    in_group = config.routed_experts // config.groups
    by_group = biased_XE.reshape(-1, config.groups, in_group)
    best_in_group, _ = lax.top_k(by_group, config.group_score_experts)
    _, groups_XG = lax.top_k(best_in_group.sum(-1), config.groups_per_token)
    kept_XG = jnp.any(jax.nn.one_hot(groups_XG, config.groups, dtype=bool), axis=1)
    masked = jnp.where(kept_XG[:, :, None], by_group, -jnp.inf).reshape(biased_XE.shape)
    _, experts_XK = lax.top_k(masked, config.experts_per_token)
    return experts_XK


def gates(scores_XE: Array, experts_XK: Array, config: Moe) -> Array:
    """Gate of each chosen expert, float32 [X, K], from the unbiased scores (Eq. 13, 16)."""
    chosen_XKE = jax.nn.one_hot(experts_XK, config.routed_experts, dtype=bool)
    gates_XK = jnp.sum(jnp.where(chosen_XKE, scores_XE[:, None, :], 0.0), axis=-1)
    if config.normalize_gates:
        gates_XK /= gates_XK.sum(-1, keepdims=True) + 1e-20
    return gates_XK * config.gate_scale


def balance_loss(scores_BTE: Array, valid_BT: Array, config: Moe, shard: Shard = ALONE) -> Array:
    """The auxiliary loss that `config.balance` asks for; float32 scalar.

    On several devices the mean of all of theirs is the loss, also where f is the whole batch's.
    """
    match config.balance:
        case AuxFree(sequence_alpha=alpha) if alpha > 0:
            return alpha * imbalance(scores_BTE, valid_BT, config)
        case AuxLoss(alpha=alpha, scope="sequence") if alpha > 0:
            return alpha * imbalance(scores_BTE, valid_BT, config)
        case AuxLoss(alpha=alpha, scope="batch") if alpha > 0:
            one_sequence = (1, -1, config.routed_experts)
            return alpha * imbalance(
                scores_BTE.reshape(one_sequence), valid_BT.reshape(1, -1), config, shard
            )
        case AuxFree() | AuxLoss() | NoBalance():
            return jnp.zeros((), jnp.float32)


def imbalance(scores_BTE: Array, valid_BT: Array, config: Moe, shard: Shard = ALONE) -> Array:
    """Mean over sequences of sum_i f_i P_i (Eq. 17-20 without alpha); 1 when perfectly balanced.

    A `shard` of several devices says that each has a part of the same sequences.
    """
    experts, chosen = config.routed_experts, config.experts_per_token
    weight_BT1 = valid_BT[:, :, None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT1.sum(axis=1), 1.0)
    _, best_BTK = lax.top_k(lax.stop_gradient(scores_BTE), chosen)
    is_best_BTE = jnp.any(jax.nn.one_hot(best_BTK, experts, dtype=bool), axis=2)
    f_BE = (is_best_BTE * weight_BT1).sum(axis=1) * (experts / chosen) / tokens_B1
    f_BE = shard.mean(f_BE)
    share_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    p_BE = (share_BTE * weight_BT1).sum(axis=1) / tokens_B1
    return jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))


def updated_bias(bias_LE: Array, counts_LE: Array, speed: Array | float) -> Array:
    """b_i += speed · sign(mean load - load_i) from one optimizer step's whole-batch counts.

    `counts_LE` is int32; the comparison is exact, with no dead zone, and does not overflow at the
    report's 63M tokens a step, as E · load against the sum would.
    """
    mean_L1, rest_L1 = jnp.divmod(counts_LE.sum(axis=-1, keepdims=True), counts_LE.shape[-1])
    above_LE = 2 * (counts_LE - mean_L1) - (rest_L1 > 0)
    return bias_LE - speed * jnp.sign(above_LE).astype(bias_LE.dtype)
