"""Completing prompts, by running the whole sequence again for every new token.

Prompts of unequal length are left-aligned in one buffer [B, S]. A step computes the hidden states
of the whole buffer, takes each row's at its last token, applies the head there only, samples and
appends. What lies to the right of a row's last token is not seen, by causality, so rows do not
influence each other. All steps are one `lax.while_loop`; S is a power of two, so that few
programs are compiled. A step costs a forward pass over S tokens: with a cache of the latents
`generate` keeps its signature, and only `_append_all` changes.

Every prompt begins with an eos token: in training a document follows the eos of the one before
it, and none begins with bos. An empty prompt is that eos alone, so the model writes a document.
Fill-in-the-middle prompts have the layout of §4.1 (prefix, suffix, middle), after the same eos.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dsv3.config import Config
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, UserError
from dsv3.inference.sampling import Sampler
from dsv3.model.transformer import Transformer

SHORTEST = 64  # tokens in the smallest buffer


class PromptError(UserError):
    """A prompt that the model has no room for."""


class Completion(NamedTuple):
    """New tokens of one prompt; a stop token ends it and is not among them."""

    tokens: list[int]
    stopped: bool  # by a stop token; else it ran to max_tokens or to the end of the context


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a document that begins with `prompt`; special-token strings in it are plain text."""
    return [tokenizer.eos, *tokenizer.encode(prompt)]


def fim_tokens(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Ids after which the model writes what stands between `prefix` and `suffix` (§4.1, PSM)."""
    t = tokenizer
    before = [t.eos, t.fim_begin, *t.encode(prefix)]
    return [*before, t.fim_hole, *t.encode(suffix), t.fim_end]


def context_length(config: Config) -> int:
    """Tokens that prompt and completion may have together: the length that the model was trained
    on, or that YaRN stretches it to."""
    yarn = config.model.mla.yarn
    stretched = int(yarn.factor * yarn.original_length) if yarn else 0
    return max(config.training.sequence_length, stretched)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    max_tokens: int,
    *,
    stop: Sequence[int],
    vocab: int,
    context: int,
    seed: int = 0,
    dtype: jnp.dtype | None = None,
) -> list[Completion]:
    """Complete every prompt by at most `max_tokens`, until a `stop` id or `context` tokens in all.

    Only ids below `vocab` are chosen: rows of the embedding beyond the tokenizer's are padding.
    The same seed gives prompt i the same completion, whatever stands beside it. `dtype` is that
    of the blocks; the head computes in FP32. Raises PromptError for a prompt that is empty or
    leaves no room, ConfigError for a number that cannot be.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens} must be at least 1")
    if not 0 <= seed < 2**31:
        raise ConfigError(f"seed = {seed} must lie in [0, 2^31)")
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not length_B.size or not length_B.all():
        raise PromptError("there is no prompt, or one of no tokens; begin with eos")
    if (longest := length_B.max()) >= context:
        raise PromptError(
            f"a prompt of {longest} tokens leaves no room in the context of {context} tokens"
        )
    limit_B = np.minimum(length_B + min(max_tokens, context), context)
    buffer_BS = np.zeros((len(prompts), _size(limit_B.max())), np.int32)
    for row, prompt in zip(buffer_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    rows = _Rows(jnp.asarray(buffer_BS), jnp.asarray(length_B), jnp.zeros(len(prompts), bool))
    rows = _append_all(model, rows, limit_B, np.array(stop, np.int32), seed, sampler, vocab, dtype)
    return [
        Completion(tokens[start : end - stopped].tolist(), bool(stopped))
        for tokens, start, end, stopped in zip(
            np.asarray(rows.tokens_BS), length_B, np.asarray(rows.length_B),
            np.asarray(rows.stopped_B), strict=True,
        )
    ]  # fmt: skip


def _size(tokens: int) -> int:
    return max(SHORTEST, 1 << (int(tokens) - 1).bit_length())


class _Rows(NamedTuple):
    tokens_BS: Array  # int32, prompt and completion from the left
    length_B: Array  # int32, how many of them
    stopped_B: Array  # bool, the last one is a stop token


@functools.partial(jax.jit, static_argnames=("sampler", "vocab", "dtype"))
def _append_all(model, rows: _Rows, limit_B, stop, seed, sampler: Sampler, vocab: int, dtype):
    """Rows after tokens were appended until each has stopped or reached its limit."""
    each_B = jnp.arange(rows.length_B.size)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), each_B)

    def running_B(rows: _Rows) -> Array:
        return ~rows.stopped_B & (rows.length_B < limit_B)

    def append(rows: _Rows) -> _Rows:
        last_BD = model.hidden(rows.tokens_BS, dtype=dtype).main_BTD[each_B, rows.length_B - 1]
        logits_BV = model.head(last_BD.astype(jnp.float32))[:, :vocab]
        token_B = sampler(jax.vmap(jax.random.fold_in)(keys_B, rows.length_B), logits_BV)
        on_B = running_B(rows)
        kept_B = rows.tokens_BS.at[each_B, rows.length_B].get(mode="clip")
        written_BS = rows.tokens_BS.at[each_B, rows.length_B].set(
            jnp.where(on_B, token_B, kept_B), mode="drop"
        )
        stopped_B = rows.stopped_B | on_B & jnp.isin(token_B, stop)
        return _Rows(written_BS, rows.length_B + on_B, stopped_B)

    return lax.while_loop(lambda rows: jnp.any(running_B(rows)), append, rows)


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """The text of a completion; a character that its end cut in two is left out."""
    text = tokenizer.decode(completion.tokens)
    return text if completion.stopped else text.removesuffix("\ufffd")
