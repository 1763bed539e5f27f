"""What a run says of itself at its end: bits per byte beside a compressor's, and two completions.

The held-out text scored is the documents in their order up to `evaluation.held_out_bytes`; the
compressor gets the same bytes. The completions continue the first line of a held-out document, and
fill a hole in it (§4.1).
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from dsv3.config import Config
from dsv3.data.prepare import Prepared
from dsv3.data.tokenizer import Tokenizer
from dsv3.evaluation.bits_per_byte import bits_per_byte, compressor_bits_per_byte, held_out_texts
from dsv3.inference.generate import completion_text, fim_tokens, generate, prompt_tokens
from dsv3.inference.sampling import Greedy
from dsv3.model.transformer import Transformer

CONTEXT_LINES = 12


def closing_report(
    config: Config, model: Transformer, prepared: Prepared
) -> tuple[dict[str, Any], list[str]]:
    """Figures for `results.json`, and lines to print; both empty without held-out text."""
    if prepared.tokenizer is None:
        return {}, []
    figures, lines = {}, []
    if config.evaluation.held_out_bytes:
        texts = held_out_texts(prepared.held_out, config.evaluation.held_out_bytes)
        length, dtype = config.training.sequence_length, jnp.dtype(config.training.compute_dtype)
        score = bits_per_byte(model, prepared.tokenizer, texts, length, dtype)
        xz = compressor_bits_per_byte(texts)
        figures = {"held_out_bpb": score.value, "held_out_bytes": score.bytes, "xz_bpb": xz}
        lines.append(
            f"held-out: {score.value:.3f} bits per byte on {score.bytes:,} bytes; "
            f"xz -9 on the same text {xz:.3f}"
        )
    if config.evaluation.sample_tokens:
        lines += _samples(config, model, prepared.tokenizer, prepared.held_out[0].text)
    return figures, lines


def _samples(config: Config, model: Transformer, tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """A greedy completion of a document's beginning, and of a hole in it."""
    opening = text.splitlines(keepends=True)[:CONTEXT_LINES]
    half = max(len(opening) // 2, 1)
    before, hole, after = "".join(opening[:half]), opening[half:][:1], "".join(opening[half + 1 :])
    prompts = [prompt_tokens(tokenizer, before), fim_tokens(tokenizer, before, after)]
    length = config.training.sequence_length
    room = max(length - config.evaluation.sample_tokens, 1)
    completions = generate(
        model, [prompt[-room:] for prompt in prompts], Greedy(), config.evaluation.sample_tokens,
        stop=[tokenizer.eos], vocab=tokenizer.vocab_size, context=length,
        dtype=jnp.dtype(config.training.compute_dtype),
    )  # fmt: skip
    written, filled = (completion_text(tokenizer, c) for c in completions)
    yield f"completion after a held-out beginning:\n{_indented(before)}\n  >>>{_indented(written)}"
    yield f"fill in the middle, {hole[0].strip() if hole else ''!r} cut out:\n{_indented(filled)}"


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
