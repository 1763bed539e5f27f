"""What a run says of itself at its end: bits per byte beside a compressor's, and two completions.

The text scored is `evaluation.held_out_bytes` of held-out documents; the compressor gets the same
bytes. The completions continue the first lines of a held-out document, and fill a line cut out of
them (§4.1).
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

CONTEXT_LINES = (12, 6, 2)  # of the document; the most that leaves room for the completion


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
    length, new = config.training.sequence_length, config.evaluation.sample_tokens
    for lines in CONTEXT_LINES:
        opening = text.splitlines(keepends=True)[:lines]
        half = max(len(opening) // 2, 1)
        before, hole, after = (
            "".join(p) for p in (opening[:half], opening[half:][:1], opening[half + 1 :])
        )
        prompts = [prompt_tokens(tokenizer, before), fim_tokens(tokenizer, before, after)]
        if max(map(len, prompts)) + new <= length:
            break
    else:
        return
    completions = generate(
        model, prompts, Greedy(), new, stop=[tokenizer.eos], vocab=tokenizer.vocab_size,
        context=length, dtype=jnp.dtype(config.training.compute_dtype),
    )  # fmt: skip
    written, filled = (completion_text(tokenizer, c) for c in completions)
    yield f"a held-out document begins\n{_indented(before)}"
    yield f"and the model goes on\n{_indented(written)}"
    yield f"the line {hole.strip()!r} cut out behind that, the model fills in\n{_indented(filled)}"


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
