"""Completing prompts: prompts in, completions out (the loop between them is `decode`).

Prompts of unequal length are left-aligned in one buffer [B, S] with room for what they may become;
S is a power of two, and so is the length that prompts are padded to, so that few programs are
compiled. A step costs one token's pass through the model and a reading of the latents that are
cached so far; `rerun` does the same without a cache, and is what this is tested against.

Every prompt begins with an eos token: in training a document follows the eos of the one before
it, and none begins with bos. An empty prompt is that eos alone, so the model writes a document.
Fill-in-the-middle prompts have the layout of §4.1 (prefix, suffix, middle), after the same eos.

A completion ends at a stop token, or where its text holds a stop string. Strings are looked for
between portions of PORTION steps, in text: they may begin and end within tokens.

A model that lies on a mesh (`training.state.on_mesh`) completes on all its devices, by the same
calls and to the same tokens. Its batch is filled up to a multiple of their number with rows that
have ended before they begin. Where several processes have the devices, all make the same calls and
get the same answers.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import Config
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, ConfigError, UserError, nearest
from dsv3.inference import decode
from dsv3.inference.cache import FORMS as FORMS
from dsv3.inference.cache import FormName
from dsv3.inference.decode import Plan, State
from dsv3.inference.sampling import Sampler
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import on_host

SHORTEST = 64  # tokens in the smallest buffer
PORTION = 16  # steps between two searches for a stop string


class PromptError(UserError):
    """A prompt that the model has no room for."""


class Completion(NamedTuple):
    """New tokens of one prompt; a stop token ends it and is not among them."""

    tokens: list[int]
    stopped: bool  # by a stop token or `ends`; else it ran to max_tokens or the end of the context
    steps: int = 0  # passes of the main model, each of one token or of one and the drafts
    kept: int = 0  # drafts that it kept in them


class Completions(list[Completion]):
    """One for each prompt, in their order, and what reading and writing them asked of experts.

    `counts_LE` int64 counts tokens of each expert, in rows as of `Stats`: of prompts and
    completions, less the last token of each, that was chosen but not read; of drafts only those
    that were kept. Rows of MTP modules that did not draft are zero.
    """

    def __init__(self, completions: Iterable[Completion], counts_LE: np.ndarray):
        super().__init__(completions)
        self.counts_LE = counts_LE


Ends = Callable[[list[int]], int | None]  # of a completion's tokens: how many it has, if it ends


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


def drafts_of(model: Transformer) -> int:
    """Tokens that the model can draft: one for each MTP module. Raises ConfigError for none."""
    if not model.mtp:
        raise ConfigError("the model has no MTP module to draft with: model.mtp_depths = 0")
    return len(model.mtp)


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
    ends: Ends | None = None,
    cache: FormName = "compute",
    drafts: int = 0,
) -> Completions:
    """Complete every prompt by at most `max_tokens`, until a `stop` id or `context` tokens in all.

    Only ids below `vocab` are chosen: rows of the embedding beyond the tokenizer's are padding.
    The same seed gives prompt i the same completion, whatever stands beside it. `dtype` is that
    of the blocks; the head computes in FP32. `ends` cuts a completion otherwise than by its last
    token: see `at_text`. `cache` says how latents are stored. The first `drafts` MTP modules
    propose tokens ahead (`speculative`), which changes no greedy completion, nor the distribution
    of others.

    Raises PromptError for a prompt that is empty, leaves no room or holds what is no id of the
    model, ConfigError for a number or a cache that cannot be, CheckpointError for a model whose
    logits are no numbers.
    """
    _require_ids(prompts, model.config.vocab)
    length_B, limit_B = _room(prompts, max_tokens, context)
    if not 0 <= seed < 2**31:
        raise ConfigError(f"seed = {seed} must lie in [0, 2^31)")
    if not 1 <= vocab <= model.config.vocab:
        raise ConfigError(f"vocab = {vocab}, but the model has {model.config.vocab} ids")
    if cache not in FORMS:
        raise ConfigError(f"cache = {cache!r} is no form{nearest(str(cache), FORMS)}")
    if not 0 <= drafts <= len(model.mtp):
        raise ConfigError(f"drafts = {drafts}, but the model has {len(model.mtp)} MTP modules")
    plan = Plan(sampler, vocab, jnp.dtype(dtype or model.embedding.table.dtype), drafts, cache)
    buffer_BS = np.zeros((model.shard.even(len(prompts)), _size(limit_B.max())), np.int32)
    for row, prompt in zip(buffer_BS, prompts, strict=False):
        row[: len(prompt)] = prompt
    length_B, limit_B = (
        np.pad(x_B, (0, len(buffer_BS) - len(prompts)), constant_values=1)
        for x_B in (length_B, limit_B)
    )
    state = decode.begin(plan, model, buffer_BS, length_B, seed, _size(length_B.max() - 1))
    arguments = limit_B, np.array(stop, np.int32), seed
    if ends is None:
        state = decode.advance(plan, model, state, *arguments, min(max_tokens, context))
        return _completions(_seen(state), prompts, [None] * len(prompts))
    found: list[int | None] = [None] * len(prompts)
    seen = _seen(state)
    while not _all_ended(seen, limit_B):
        state = decode.advance(plan, model, state, *arguments, PORTION)
        seen = _seen(state)
        so_far = _completions(seen, prompts, found)
        found = [ends(c.tokens) if n is None else n for c, n in zip(so_far, found, strict=True)]
        stopped_B = np.array(seen.stopped_B)
        stopped_B[: len(prompts)] |= [n is not None for n in found]
        state = state._replace(stopped_B=jax.device_put(stopped_B, state.stopped_B.sharding))
        seen = seen._replace(stopped_B=stopped_B)
    return _completions(seen, prompts, found)


def _require_ids(prompts: Sequence[Sequence[int]], vocab: int) -> None:
    for row, prompt in enumerate(prompts):
        for token in prompt:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
                raise PromptError(f"prompt {row} holds {token!r}, no id from 0 to {vocab - 1}")


def _room(
    prompts: Sequence[Sequence[int]], max_tokens: int, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B]: the tokens of each prompt, and how many it may become."""
    if max_tokens < 1:
        raise ConfigError(f"max_tokens = {max_tokens} must be at least 1")
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if not length_B.size or not length_B.all():
        raise PromptError("there is no prompt, or one of no tokens; begin with eos")
    if (longest := length_B.max()) >= context:
        raise PromptError(
            f"a prompt of {longest} tokens leaves no room in the context of {context} tokens"
        )
    return length_B, np.minimum(length_B + min(max_tokens, context), context)


class Seen(NamedTuple):
    """What the host reads of a state, in numpy."""

    tokens_BS: np.ndarray
    length_B: np.ndarray
    stopped_B: np.ndarray
    steps_B: np.ndarray
    kept_B: np.ndarray
    finite_B: np.ndarray
    counts_1LE: np.ndarray


def _seen(state: State) -> Seen:
    return on_host(Seen(*(getattr(state, name) for name in Seen._fields)))


def _all_ended(seen: Seen, limit_B: np.ndarray) -> bool:
    return bool(np.all(seen.stopped_B | (seen.length_B >= limit_B)))


def _completions(
    seen: Seen, prompts: Sequence[Sequence[int]], found: Sequence[int | None]
) -> Completions:
    """What the rows hold behind their prompts; of a row that `found` ended, so many tokens."""
    tokens_BS, length_B, stopped_B, steps_B, kept_B, finite_B, counts_1LE = seen
    if not finite_B.all():
        raise CheckpointError("the model's logits are not finite: its weights are damaged")
    completions = []
    for row, (prompt, count) in enumerate(zip(prompts, found, strict=True)):
        if count is None:
            count = length_B[row] - len(prompt) - stopped_B[row]
        tokens = tokens_BS[row, len(prompt) :][:count].tolist()
        numbers = int(steps_B[row]), int(kept_B[row])
        completions.append(Completion(tokens, bool(stopped_B[row]), *numbers))
    return Completions(completions, counts_1LE.sum(0, np.int64))


def _size(tokens: int) -> int:
    return max(SHORTEST, 1 << (int(tokens) - 1).bit_length())


def at_text(tokenizer: Tokenizer, strings: Sequence[str]) -> Ends:
    """Ends a completion with the first token by which its text holds one of `strings`."""

    def ends(tokens: list[int]) -> int | None:
        def held(count: int) -> bool:
            return _cut(tokenizer.decode(tokens[:count]), strings) is not None

        if not held(len(tokens)):
            return None
        return bisect.bisect_left(range(len(tokens)), True, key=held)

    return ends


def _cut(text: str, strings: Sequence[str]) -> int | None:
    """Where the first of `strings` begins in `text`."""
    return min((at for s in strings if (at := text.find(s)) >= 0), default=None)


def acceptance(completions: Sequence[Completion], drafts: int) -> str:
    """In words: how many drafts were kept, and the tokens that a pass of the main model gave."""
    steps, kept = sum(c.steps for c in completions), sum(c.kept for c in completions)
    return (
        f"speculative: {kept:,} of {steps * drafts:,} drafts accepted "
        f"({kept / (steps * drafts):.1%}), {1 + kept / steps:.2f} tokens a step of the main model"
    )


def completion_text(
    tokenizer: Tokenizer, completion: Completion, strings: Sequence[str] = ()
) -> str:
    """The text of a completion up to the first of `strings`; a character that its end cut in two
    is left out."""
    text = tokenizer.decode(completion.tokens)
    if (end := _cut(text, strings)) is not None:
        return text[:end]
    return text if completion.stopped else text.removesuffix("\ufffd")
