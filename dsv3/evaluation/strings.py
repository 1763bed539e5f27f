"""Log-likelihoods and completions of strings: the three questions of lm-evaluation-harness.

- A context and its continuations are tokenised jointly; requests that share a context are scored
  from the same token on. Every text stands behind eos, and so does an empty context.
- A document (`rolling`) has every token scored once, in the windows of `bits_per_byte`.
- Contexts too long lose their beginning. A continuation longer than the context is an error.
- A completion gets at most half of the context: `max_gen_toks` (256 unless the task says) beyond
  that is lowered. It is greedy unless `do_sample` is set.
"""

from collections.abc import Sequence
from typing import Any

from dsv3.data.corpus import well_formed
from dsv3.errors import DataError
from dsv3.evaluation.bits_per_byte import windows
from dsv3.evaluation.harness import Reader, before_stop, completed
from dsv3.evaluation.scoring import Score, Span, options, score
from dsv3.inference.generate import prompt_tokens
from dsv3.inference.sampling import Greedy, Sampler, sampler_of

MOST_TOKENS = 256  # of a completion where the task does not say


def loglikelihoods(reader: Reader, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log p of each continuation behind its context, and whether greedy decoding writes it."""
    of_context: dict[str, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not continuation:
            raise DataError(f"request {index} scores an empty continuation")
        of_context.setdefault(context, []).append(index)
    spans: list[Span] = [Span([], 1)] * len(pairs)
    for context, indices in of_context.items():
        choices = [well_formed(pairs[index][1]) for index in indices]
        found = options(reader.tokenizer, well_formed(context), choices)
        for index, span in zip(indices, found, strict=True):
            spans[index] = span
    return [(-found.nats, found.greedy) for found in _scored(reader, spans)]


def rolling(reader: Reader, texts: Sequence[str]) -> list[float]:
    """log p of each text as a document."""
    spans, owner = [], []
    for index, ids in enumerate(reader.tokenizer.encode_batch([*map(well_formed, texts)])):
        for window in windows(ids, reader.tokenizer.eos, reader.context):
            spans.append(Span(window.tokens_S[: window.end].tolist(), window.first))
            owner.append(index)
    totals = [0.0] * len(texts)
    for index, found in zip(owner, _scored(reader, spans), strict=True):
        totals[index] -= found.nats
    return totals


def _scored(reader: Reader, spans: Sequence[Span]) -> list[Score]:
    vocab = reader.tokenizer.vocab_size
    return score(reader.model, spans, reader.context, vocab, reader.dtype) if spans else []


def completions(reader: Reader, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The text behind each context by its keywords, cut before the first stop string."""
    texts = [""] * len(asked)
    alike: dict[tuple[Sampler, int], list[int]] = {}
    for index, (_, keywords) in enumerate(asked):
        most = int(keywords.get("max_gen_toks", keywords.get("max_tokens", MOST_TOKENS)))
        most = max(1, min(most, reader.context // 2))
        alike.setdefault((_sampler(keywords), most), []).append(index)
    for (sampler, most), indices in alike.items():
        room = reader.context - most
        prompts = [prompt_tokens(reader.tokenizer, asked[index][0])[-room:] for index in indices]
        written = completed(reader, prompts, most, sampler)
        for index, text in zip(indices, written, strict=True):
            texts[index] = before_stop(text, _stop(asked[index][1]))
    return texts


def _sampler(keywords: dict[str, Any]) -> Sampler:
    if not keywords.get("do_sample", False):
        return Greedy()
    cuts = {name: keywords[name] for name in ("top_k", "top_p") if keywords.get(name)}
    return sampler_of(float(keywords.get("temperature", 1.0)), **cuts)


def _stop(keywords: dict[str, Any]) -> list[str]:
    until = keywords.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]
