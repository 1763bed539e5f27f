"""Running tasks: every span of every item scored in one go, every prompt completed in batches."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from typing import Any, NamedTuple

import jax.numpy as jnp

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError
from dsv3.evaluation.scoring import Score, Span, SpanError, kept, score
from dsv3.evaluation.tasks import Completed, Ratio, Run, Task, Written
from dsv3.inference.generate import completion_text, generate
from dsv3.inference.sampling import Greedy, Sampler
from dsv3.model.transformer import Transformer

ROWS = 16  # prompts completed together
GREEDY = Greedy()


class Reader(NamedTuple):
    """A model with what it takes to read and write text; `context` is its length in tokens."""

    model: Transformer
    tokenizer: Tokenizer
    context: int
    dtype: jnp.dtype | None = None


class Figure(NamedTuple):
    value: float
    error: float  # standard error; nan for a single item
    items: int

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.value:.4f}{error}"


class Result(NamedTuple):
    """`cut` counts the items that lost a beginning which did not fit."""

    figures: dict[str, Figure]
    items: int
    shots: int
    cut: int

    def as_json(self) -> dict[str, Any]:
        figures = {
            name: {
                "value": figure.value,
                "standard_error": None if math.isnan(figure.error) else figure.error,
                "items": figure.items,
            }
            for name, figure in self.figures.items()
        }
        return {"items": self.items, "shots": self.shots, "cut": self.cut, "figures": figures}

    def line(self) -> str:
        parts = [f"{name} {figure}" for name, figure in self.figures.items()]
        cut = [f"{self.cut} cut to the context"] if self.cut else []
        shots = [f"{self.shots} shots"] if self.shots else []
        return " · ".join([f"{self.items:,} items", *shots, *parts, *cut])


def evaluate(reader: Reader, task: Task, run: Run | None = None) -> Result:
    """The figures of a task; `run` decides whether programs pass, and nothing runs without it.

    Raises DataError naming the file and line of an item that does not fit the context.
    """
    spans = [item.spans(reader.tokenizer, reader.context) for item in task.items]
    prompts, cut_prompts = _prompts(reader, task)
    scores = _scores(reader, task, spans)
    texts = _completions(reader, task, prompts)
    shares: dict[str, list[Ratio]] = {}
    for item, own, text in zip(task.items, scores, texts, strict=True):
        for name, ratio in item.figures(own, Completed(text, run)).items():
            shares.setdefault(name, []).append(ratio)
    cut = [any(s.cut for s in own) or c for own, c in zip(scores, cut_prompts, strict=True)]
    figures = {name: figure(ratios) for name, ratios in shares.items()}
    return Result(figures, len(task.items), task.shots, sum(cut))


def require_fit(reader: Reader, task: Task) -> None:
    """Raise the DataError of `evaluate` for an item that does not fit, with nothing computed."""
    spans = [item.spans(reader.tokenizer, reader.context) for item in task.items]
    with _named(task, spans):
        kept([span for own in spans for span in own], reader.context)
    _prompts(reader, task)


def figure(ratios: Sequence[Ratio]) -> Figure:
    """The ratio of sums and its standard error: of a mean, where every item counts 1."""
    n, of = len(ratios), math.fsum(ratio.of for ratio in ratios)
    value = math.fsum(ratio.amount for ratio in ratios) / of
    squares = math.fsum((ratio.amount - value * ratio.of) ** 2 for ratio in ratios)
    return Figure(value, math.sqrt(squares * n / (n - 1)) / of if n > 1 else math.nan, n)


def _scores(reader: Reader, task: Task, spans: list[list[Span]]) -> list[list[Score]]:
    flat = [span for own in spans for span in own]
    vocab = reader.tokenizer.vocab_size
    with _named(task, spans):
        found = iter(score(reader.model, flat, reader.context, vocab, reader.dtype))
    return [[next(found) for _ in own] for own in spans]


@contextmanager
def _named(task: Task, spans: list[list[Span]]) -> Iterator[None]:
    """A SpanError within names file and line of the item that the span belongs to."""
    try:
        yield
    except SpanError as error:
        owner = [index for index, own in enumerate(spans) for _ in own]
        raise DataError(f"{task.where[owner[error.index]]}: {error}") from error


Prompts = dict[int, dict[int, list[int]]]  # max_tokens → an item's number → its prompt


def _prompts(reader: Reader, task: Task) -> tuple[Prompts, list[bool]]:
    """What is to be completed, and whose prompts were cut."""
    by_limit, cut = {}, [False] * len(task.items)
    for index, item in enumerate(task.items):
        if not isinstance(item, Written):
            continue
        most = item.max_tokens
        prompt, cut[index] = item.question(reader.tokenizer, reader.context - most)
        if len(prompt) + most > reader.context or not prompt:
            raise DataError(f"{task.where[index]}: max_tokens = {most} leaves no room for a "
                            f"prompt in the context of {reader.context} tokens")  # fmt: skip
        by_limit.setdefault(most, {})[index] = prompt
    return by_limit, cut


def _completions(reader: Reader, task: Task, by_limit: Prompts) -> list[str]:
    """The text that the model writes for each item, '' where none is asked for."""
    texts = [""] * len(task.items)
    for most, prompts in by_limit.items():
        written = completed(reader, list(prompts.values()), most)
        for index, text in zip(prompts, written, strict=True):
            item = task.items[index]
            assert isinstance(item, Written)
            texts[index] = before_stop(text, item.stop)
    return texts


def completed(
    reader: Reader, prompts: Sequence[list[int]], most: int, sampler: Sampler = GREEDY
) -> list[str]:
    """At most `most` tokens of text behind each prompt, those of like length together."""
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for seed, group in enumerate(batched(by_length, ROWS)):
        written = generate(
            reader.model, [prompts[index] for index in group], sampler, most, seed=seed,
            stop=[reader.tokenizer.eos], vocab=reader.tokenizer.vocab_size,
            context=reader.context, dtype=reader.dtype,
        )  # fmt: skip
        for index, completion in zip(group, written, strict=True):
            texts[index] = completion_text(reader.tokenizer, completion)
    return texts


def before_stop(text: str, stop: Sequence[str]) -> str:
    """`text` in front of the first of `stop` in it."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]
