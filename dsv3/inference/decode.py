"""The decoding loop: tokens of a batch, one or several a step, over a latent cache.

Prompts of unequal length lie left-aligned in one buffer [B, S]. With n tokens in a row, the cache
holds positions 0 to n - 2: the last token always goes through the model first. A step is

    1  the main model on the last token and the J drafts behind it (`forward.extend`)
    2  how many drafts are kept, and the token after them (`speculative.verify`)
    3  the rows grow by so much, each up to its stop token and its limit
    4  the MTP modules draft the next J (`forward.propose`)

and without drafts, J = 0, it is plain decoding. Rows of a batch keep different numbers; nothing is
undone, since what lies behind a row's end in buffer and caches is masked and then overwritten.
Rows that ended go through the motions, past the experts, and do not grow.

XLA may leave out the rounding of an intermediate result to BF16 where it fuses what follows, so two
programs that do the same would differ. Not here: drafts must change no token (`forward`).

A draw's key comes from the seed, the row, the position and its purpose. So a row gets the same
tokens whatever stands beside it, and in whatever portions `advance` is called.

**On a mesh** every device runs this loop on its rows of the batch, inside one `jax.shard_map`.
Tokens meet their experts as in training (`parallel.exchange`), parameters are gathered as there:
all but others' experts once a call, or a layer when it is its turn. As layers exchange tokens, no
device may leave the loop before the others: it ends when no row of any of them is running.

**Loads.** Each step counts the experts of what became text: of the last token and the kept drafts,
once a row took them; of module k's position i, once token i + k is there. Rejected drafts, rows
that ended and padding count nothing. So when n tokens are in a row, the main model's counts are
those of a forward pass over n - 1 tokens, and the modules', where they draft, over n.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv3.inference import forward
from dsv3.inference.cache import FormName, LatentCache, empty
from dsv3.inference.sampling import Sampler
from dsv3.inference.speculative import verify, window
from dsv3.model.transformer import Transformer
from dsv3.parallel.dispatch import count
from dsv3.parallel.shard import Shard

TOKEN, DRAFT, ACCEPT = range(3)  # purposes of a draw
AS_WRITTEN = {"xla_allow_excess_precision": False}


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
    counts_1LE: Array  # int32: tokens of each expert so far; of each device, one after the other
    cache: LatentCache


def _lies(shard: Shard) -> State:
    """The partition specs of a state."""
    rows: dict[str, Any] = dict.fromkeys(State._fields, shard.rows)
    return State(**rows | {"cache": jax.P(None, *shard.rows)})


@functools.partial(jax.jit, static_argnames=("plan", "prompt"), compiler_options=AS_WRITTEN)
def begin(
    plan: Plan, model: Transformer, tokens_BS: Array, length_B: Array, seed: Array, prompt: int
) -> State:
    """The state in which every row has its prompt: all but its last token, at most `prompt`, is in
    the cache. On a mesh the rows divide evenly over `model.shard.data_ranks`."""
    shard = model.shard
    arguments = shard.specs(model), shard.rows, shard.rows, jax.P()
    here = shard.each(functools.partial(_begin, plan, prompt), arguments, _lies(shard))
    return here(model, tokens_BS, length_B, seed)


@functools.partial(
    jax.jit, static_argnames="plan", donate_argnames="state", compiler_options=AS_WRITTEN
)
def advance(
    plan: Plan, model: Transformer, state: State, limit_B: Array, stop: Array, seed: Array,
    steps: Array,
) -> State:  # fmt: skip
    """The state at most `steps` steps later, or when every row has stopped or has `limit_B`
    tokens."""
    shard = model.shard
    lies, all_of_it = _lies(shard), jax.P()
    arguments = shard.specs(model), lies, shard.rows, all_of_it, all_of_it, all_of_it
    here = shard.each(functools.partial(_advance, plan), arguments, lies)
    return here(model, state, limit_B, stop, seed, steps)


def _begin(
    plan: Plan, prompt: int, cuts: Transformer, tokens_BS: Array, length_B: Array, seed: Array
) -> State:
    model = cuts.shard.params(cuts)
    config, (sequences, size) = model.config, tokens_BS.shape
    cache = empty(plan.form, config.mla, config.layers + plan.drafts, sequences, size, plan.dtype)
    place_1P = jnp.arange(min(prompt, size))[None]
    read_B1 = length_B[:, None] - 1
    passed = forward.begin(model, cache, tokens_BS[:, :prompt], place_1P < read_B1, plan.drafts)
    counts_1LE = jnp.zeros(
        (1, config.moe_layers + config.mtp_depths, config.moe.routed_experts), jnp.int32
    )
    main_LBTK, modules_JBTK = jnp.split(passed.experts_LBTK, [config.moe_layers])
    counts_1LE = _counted(counts_1LE, 0, main_LBTK, place_1P < read_B1)
    for depth, experts_BTK in enumerate(modules_JBTK, start=1):
        row = config.moe_layers + depth - 1
        counts_1LE = _counted(counts_1LE, row, experts_BTK[None], place_1P + depth < read_B1)
    none_B = jnp.zeros(sequences, jnp.int32)
    state = State(
        tokens_BS, length_B, none_B > 0, none_B, none_B, none_B == 0,
        jnp.zeros((sequences, plan.drafts, plan.vocab), jnp.float32),
        _take(passed.h_BTD, jnp.maximum(_window_BW(plan, length_B), 0)), counts_1LE, passed.cache,
    )  # fmt: skip
    return _draft(plan, model, row_keys(seed, model.shard, sequences), length_B - 1, state)


def _advance(
    plan: Plan, cuts: Transformer, state: State, limit_B: Array, stop: Array, seed: Array,
    steps: Array,
) -> State:  # fmt: skip
    model = cuts.shard.params(cuts)
    key_B = row_keys(seed, model.shard, limit_B.size)

    def running_B(state: State) -> Array:
        return ~state.stopped_B & (state.length_B < limit_B)

    def running(state: State) -> Array:
        return model.shard.sum(jnp.sum(running_B(state), dtype=jnp.int32))

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        done, _, state = carry
        n_B, on_B = state.length_B, running_B(state)
        place_BT = _from(n_B, plan.drafts + 1)
        position_BT = jnp.minimum(place_BT, state.cache.length) - 1
        tokens_BT = _take(state.tokens_BS, position_BT)
        live_BT = jnp.broadcast_to(on_B[:, None], tokens_BT.shape)
        h_BTD, cache, experts_LBTK = forward.extend(
            model, state.cache, tokens_BT, position_BT, live_BT
        )
        logits_BTV = forward.logits(model, h_BTD, plan.vocab)
        finite_B = jnp.isfinite(logits_BTV).all(axis=(1, 2))
        kept_B, token_B = verify(
            plan.sampler, keys(key_B, place_BT[:, :-1], ACCEPT), keys(key_B, place_BT, TOKEN),
            _probabilities(plan, logits_BTV), state.draft_BJV, tokens_BT[:, 1:],
        )  # fmt: skip
        tokens_BS = _put(state.tokens_BS, n_B + kept_B, token_B)
        new_BT = _take(tokens_BS, place_BT)
        grown_B, stopped_B = _growth(new_BT, kept_B + 1, limit_B - n_B, stop)
        grown_B = jnp.where(on_B, grown_B, 0)
        text_BT = jnp.arange(plan.drafts + 1)[None] < grown_B[:, None]
        hidden_BD = jnp.concatenate([state.hidden_BWD, h_BTD], axis=1)
        following_BW = _from(kept_B + 1, window(plan.drafts))
        state = _draft(plan, model, key_B, n_B, State(
            tokens_BS, n_B + grown_B, state.stopped_B | on_B & stopped_B,
            state.steps_B + on_B, state.kept_B + jnp.where(on_B, kept_B, 0),
            state.finite_B & (finite_B | ~on_B), state.draft_BJV, _take(hidden_BD, following_BW),
            _counted(state.counts_1LE, 0, experts_LBTK, text_BT), cache,
        ))  # fmt: skip
        return done + 1, running(state), state

    def more(carry: tuple[Array, Array, State]) -> Array:
        done, left, _ = carry
        return (done < steps) & (left > 0)

    return lax.while_loop(more, step, (jnp.int32(0), running(state), state))[2]


def _growth(new_BT: Array, made_B: Array, room_B: Array, stop: Array) -> tuple[Array, Array]:
    """How many of the `made_B` new tokens a row takes: up to its first stop token, if room is left
    for it; and whether it took one."""
    place_T = jnp.arange(new_BT.shape[1])
    first_stop_B = jnp.where(jnp.isin(new_BT, stop), place_T[None], place_T.size).min(axis=1)
    grown_B = jnp.minimum(jnp.minimum(made_B, first_stop_B + 1), room_B)
    return grown_B, first_stop_B < grown_B


def _draft(plan: Plan, model: Transformer, key_B: Array, before_B: Array, state: State) -> State:
    """`state` with J drafts behind every row's tokens and the probabilities that they come from.

    The modules have read tokens ahead up to `before_B`; rows with no more of them are not live.
    """
    n_B, tokens_BS, cache, h_BWD = state.length_B, state.tokens_BS, state.cache, state.hidden_BWD
    draft_BJV, counts_1LE = state.draft_BJV, state.counts_1LE
    place_BW = _window_BW(plan, n_B)
    position_BW = jnp.maximum(place_BW, 0)  # in front of a short row, its first over again
    live_BW = jnp.broadcast_to((before_B < n_B)[:, None], place_BW.shape)
    for depth in range(1, plan.drafts + 1):
        ahead_BW = _take(tokens_BS, position_BW + depth)
        h_BWD, cache, experts_1BWK = forward.propose(
            model, depth, cache, h_BWD, ahead_BW, position_BW, live_BW
        )
        h_B1D = model.mtp[depth - 1].norm(h_BWD[:, -1:])
        q_BV = _probabilities(plan, forward.logits(model, h_B1D, plan.vocab))[:, 0]
        place_B = n_B + depth - 1
        token_B = plan.sampler.draw(keys(key_B, place_B[:, None], DRAFT)[:, 0], q_BV)
        tokens_BS = _put(tokens_BS, place_B, token_B)
        draft_BJV = draft_BJV.at[:, depth - 1].set(q_BV)
        read_BW = place_BW + depth
        new_BW = (before_B[:, None] <= read_BW) & (read_BW < n_B[:, None]) & (place_BW >= 0)
        row = model.config.moe_layers + depth - 1
        counts_1LE = _counted(counts_1LE, row, experts_1BWK, new_BW)
    return state._replace(
        tokens_BS=tokens_BS, cache=cache, draft_BJV=draft_BJV, counts_1LE=counts_1LE
    )


def _counted(counts_1LE: Array, row: int, experts_LBTK: Array, which_BT: Array) -> Array:
    """With the tokens `which_BT` of layers from `row` on added."""
    layers, *_, chosen = experts_LBTK.shape
    experts_LXK = experts_LBTK.reshape(layers, which_BT.size, chosen)
    of_layer = functools.partial(
        count, routed_experts=counts_1LE.shape[2], valid_X=which_BT.reshape(-1)
    )
    return counts_1LE.at[0, row : row + layers].add(jax.vmap(of_layer)(experts_LXK))


def _window_BW(plan: Plan, length_B: Array) -> Array:
    """Where the MTP modules run; below zero in front of a short row."""
    width = window(plan.drafts)
    return _from(length_B - 1 - width, width)


def _probabilities(plan: Plan, logits_BTV: Array) -> Array:
    p_XV = plan.sampler.probabilities(logits_BTV.reshape(-1, plan.vocab))
    return p_XV.reshape(logits_BTV.shape)


def row_keys(seed: Array | int, shard: Shard, rows: int) -> Array:
    """A key for each of this device's rows, by their numbers in the batch."""
    number_B = shard.first(rows) + jnp.arange(rows)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number_B)


def keys(key_B: Array, position_BT: Array, purpose: int) -> Array:
    """A key for every row, position and purpose."""
    number_BT = position_BT * 3 + purpose
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(key_B, number_BT)


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
