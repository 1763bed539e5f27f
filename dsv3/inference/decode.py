"""The decoding loop: tokens of a batch, one or several a step, over a latent cache.

Prompts of unequal length lie left-aligned in one buffer [B, S]. With n tokens in a row, the cache
holds positions 0 to n - 2: the last token always goes through the model first. A step is

    1  the main model on the last token and the J drafts behind it (`forward.extend`)
    2  how many drafts are kept, and the token after them (`speculative.verify`)
    3  the rows grow by so much, each up to its stop token and its limit
    4  the MTP modules draft the next J (`forward.propose`)

and without drafts, J = 0, it is plain decoding. Rows of a batch keep different numbers; nothing is
undone, since what lies behind a row's end in buffer and caches is masked and then overwritten.
Rows that ended go through the motions and do not grow.

A draw's key comes from the seed, the row, the position and its purpose. So a row gets the same
tokens whatever stands beside it, and in whatever portions `advance` is called.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.inference import forward
from dsv3.inference.cache import FormName, LatentCache, empty
from dsv3.inference.sampling import Sampler
from dsv3.inference.speculative import verify, window
from dsv3.model.transformer import Transformer

TOKEN, DRAFT, ACCEPT = range(3)  # purposes of a draw


@dataclass(frozen=True)
class Plan:
    """What is decided before compiling: `drafts` is J, at most the model's MTP depths; `dtype` that
    of the blocks and of a cache in compute form; ids from `vocab` on are never chosen."""

    sampler: Sampler
    vocab: int
    dtype: jnp.dtype
    drafts: int = 0
    form: FormName = "compute"


class State(NamedTuple):
    """Of every row; `tokens_BS` holds J drafts behind the `length_B` tokens."""

    tokens_BS: Array  # int32
    length_B: Array  # int32
    stopped_B: Array  # bool: the last token is a stop token
    steps_B: Array  # int32: passes of the main model so far, the prompt's aside
    kept_B: Array  # int32: drafts kept in them
    finite_B: Array  # bool: whether all logits that it grew by were
    draft_BJV: Array  # float32: the probabilities that the drafts were drawn from
    hidden_BWD: Array  # of the main model, at the W = 2 J positions up to length - 2
    cache: LatentCache


@functools.partial(jax.jit, static_argnames=("plan", "prompt"))
def begin(
    plan: Plan, model: Transformer, tokens_BS: Array, length_B: Array, seed: Array, prompt: int
) -> State:
    """The state in which every row has its prompt: all but its last token, at most `prompt`, is in
    the cache."""
    sequences, size = tokens_BS.shape
    mla, layers = model.config.mla, model.config.layers + plan.drafts
    cache = empty(plan.form, mla, layers, sequences, size, plan.dtype)
    h_BPD, cache = forward.begin(model, cache, tokens_BS[:, :prompt], plan.drafts)
    none_B = jnp.zeros(sequences, jnp.int32)
    return _draft(plan, model, seed, State(
        tokens_BS, length_B, none_B > 0, none_B, none_B, none_B == 0,
        jnp.zeros((sequences, plan.drafts, plan.vocab), jnp.float32),
        _take(h_BPD, _window_BW(plan, length_B)), cache,
    ))  # fmt: skip


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def advance(
    plan: Plan, model: Transformer, state: State, limit_B: Array, stop: Array, seed: Array,
    steps: Array,
) -> State:  # fmt: skip
    """The state at most `steps` steps later, or when every row has stopped or has `limit_B`
    tokens."""

    def running_B(state: State) -> Array:
        return ~state.stopped_B & (state.length_B < limit_B)

    def step(count_state: tuple[Array, State]) -> tuple[Array, State]:
        count, state = count_state
        n_B = state.length_B
        place_BT = _from(n_B, plan.drafts + 1)
        position_BT = jnp.minimum(place_BT, state.cache.length) - 1
        tokens_BT = _take(state.tokens_BS, position_BT)
        h_BTD, cache = forward.extend(model, state.cache, tokens_BT, position_BT)
        logits_BTV = forward.logits(model, h_BTD, plan.vocab)
        finite_B = jnp.isfinite(logits_BTV).all(axis=(1, 2))
        kept_B, token_B = verify(
            plan.sampler,
            keys(seed, place_BT[:, :-1], ACCEPT), keys(seed, place_BT, TOKEN),
            _probabilities(plan, logits_BTV), state.draft_BJV, tokens_BT[:, 1:],
        )  # fmt: skip
        tokens_BS = _put(state.tokens_BS, n_B + kept_B, token_B)
        new_BT = _take(tokens_BS, place_BT)
        grown_B, stopped_B = _growth(new_BT, kept_B + 1, limit_B - n_B, stop)
        on_B = running_B(state)
        hidden_BD = jnp.concatenate([state.hidden_BWD, h_BTD], axis=1)
        following_BW = _from(kept_B + 1, window(plan.drafts))
        return count + 1, _draft(plan, model, seed, State(
            tokens_BS, n_B + jnp.where(on_B, grown_B, 0), state.stopped_B | on_B & stopped_B,
            state.steps_B + on_B, state.kept_B + jnp.where(on_B, kept_B, 0),
            state.finite_B & (finite_B | ~on_B),
            state.draft_BJV, _take(hidden_BD, following_BW), cache,
        ))  # fmt: skip

    def more(count_state: tuple[Array, State]) -> Array:
        count, state = count_state
        return (count < steps) & jnp.any(running_B(state))

    return lax.while_loop(more, step, (jnp.int32(0), state))[1]


def _growth(new_BT: Array, made_B: Array, room_B: Array, stop: Array) -> tuple[Array, Array]:
    """How many of the `made_B` new tokens a row takes: up to its first stop token, if room is left
    for it; and whether it took one."""
    place_T = jnp.arange(new_BT.shape[1])
    first_stop_B = jnp.where(jnp.isin(new_BT, stop), place_T[None], place_T.size).min(axis=1)
    grown_B = jnp.minimum(jnp.minimum(made_B, first_stop_B + 1), room_B)
    return grown_B, first_stop_B < grown_B


def _draft(plan: Plan, model: Transformer, seed: Array, state: State) -> State:
    """`state` with J drafts behind every row's tokens and the probabilities that they come from."""
    n_B, tokens_BS, cache, h_BWD = state.length_B, state.tokens_BS, state.cache, state.hidden_BWD
    position_BW, draft_BJV = _window_BW(plan, n_B), state.draft_BJV
    for depth in range(1, plan.drafts + 1):
        ahead_BW = _take(tokens_BS, position_BW + depth)
        h_BWD, cache = forward.propose(model, depth, cache, h_BWD, ahead_BW, position_BW)
        h_B1D = model.mtp[depth - 1].norm(h_BWD[:, -1:])
        q_BV = _probabilities(plan, forward.logits(model, h_B1D, plan.vocab))[:, 0]
        place_B = n_B + depth - 1
        token_B = plan.sampler.draw(keys(seed, place_B[:, None], DRAFT)[:, 0], q_BV)
        tokens_BS = _put(tokens_BS, place_B, token_B)
        draft_BJV = draft_BJV.at[:, depth - 1].set(q_BV)
    return state._replace(tokens_BS=tokens_BS, cache=cache, draft_BJV=draft_BJV)


def _window_BW(plan: Plan, length_B: Array) -> Array:
    """Where the MTP modules run; in front of a short row, its first position over again."""
    width = window(plan.drafts)
    return jnp.maximum(_from(length_B - 1 - width, width), 0)


def _probabilities(plan: Plan, logits_BTV: Array) -> Array:
    p_XV = plan.sampler.probabilities(logits_BTV.reshape(-1, plan.vocab))
    return p_XV.reshape(logits_BTV.shape)


def keys(seed: Array, position_BT: Array, purpose: int) -> Array:
    """A key for every row, position and purpose."""
    rows_B = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(position_BT.shape[0])
    )
    number_BT = position_BT * 3 + purpose
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(rows_B, number_BT)


def _from(start_B: Array, width: int) -> Array:
    """int32 [B, width]: places start, start + 1, ..."""
    return start_B[:, None] + jnp.arange(width)[None]


def _take(x_BS: Array, place_BT: Array) -> Array:
    """What stands at each of a row's places; at the nearest where there is no such place."""
    each_B1 = jnp.arange(x_BS.shape[0])[:, None]
    return x_BS[each_B1, jnp.clip(place_BT, 0, max(x_BS.shape[1] - 1, 0))]


def _put(x_BS: Array, place_B: Array, value_B: Array) -> Array:
    """With a value written at a place of each row; nothing beyond its end."""
    return x_BS.at[jnp.arange(x_BS.shape[0]), place_B].set(value_B, mode="drop")
