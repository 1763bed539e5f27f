"""Drafting with the MTP modules and verifying with the main model (§5.4.3; spec §4.5).

The main model is run on the last token and J drafts at once, which is little dearer than on one:
it reads its weights once. It gives the probabilities p_0 ... p_J of the tokens that follow each.
Draft d_j was drawn from the drafter's q_j and is kept with probability min(1, p_j(d_j) / q_j(d_j));
at the first that is not, the token is drawn from max(p_j - q_j, 0) instead, and behind J kept ones
from p_J, there being no q. Every token is then distributed as p says (Leviathan et al. 2211.17192),
whatever the drafter proposes. p and q are the sampler's, cuts included. For a greedy sampler both
are certain of one token, and the same rule keeps a draft where it is the main model's own.

J is the number of MTP modules: module k reads h^{k-1} and the token k ahead, so drafts come in a
chain, each module's state feeding the next, as in training. A module caches latents of its own.
Those of its last positions stand on drafts; when a draft falls they are wrong, so each time the
modules run over a window of the last 2 J positions, which reaches back to whatever is not settled
yet. Behind a prompt of one token there is nothing to draft from: its first drafts are mere guesses.
"""

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.inference.sampling import Sampler


def window(drafts: int) -> int:
    """Positions that the MTP modules run over for every drafting.

    After n tokens, module k's entries are settled for i + k < n, and the window ends at n - 2. The
    next one may start up to J + 1 later, and must start no later than n - k <= n - J.
    """
    return 2 * drafts


def verify(
    sampler: Sampler, accept_BJ: Array, draw_BT: Array, p_BTV: Array, q_BJV: Array, draft_BJ: Array
) -> tuple[Array, Array]:
    """How many drafts are kept, int32 [B], and the token behind them, int32 [B]; T = J + 1.

    `accept_BJ` and `draw_BT` are the keys of each decision and of each position's draw.
    """
    drafts = draft_BJ.shape[1]
    u_BJ = jax.vmap(jax.vmap(jax.random.uniform))(accept_BJ)
    kept_BJ = u_BJ * _chance(q_BJV, draft_BJ) < _chance(p_BTV[:, :drafts], draft_BJ)
    kept_B = jnp.sum(jnp.cumprod(kept_BJ, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    each_B = jnp.arange(kept_B.size)
    p_BV = p_BTV[each_B, kept_B]
    q_BV = jnp.pad(q_BJV, ((0, 0), (0, 1), (0, 0)))[each_B, kept_B]
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    rest_BV = jnp.where(rest_BV.sum(axis=-1, keepdims=True) > 0, rest_BV, p_BV)  # p = q, rounded
    return kept_B, sampler.draw(draw_BT[each_B, kept_B], rest_BV)


def _chance(p_BJV: Array, token_BJ: Array) -> Array:
    return jnp.take_along_axis(p_BJV, token_BJ[:, :, None], axis=-1)[:, :, 0]
