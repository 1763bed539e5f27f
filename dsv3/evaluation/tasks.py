"""Tasks that a model is evaluated on: one JSON object a line, all of a file of one kind.

    choices    {"context": "2 + 2 =", "choices": [" 3", " 4"], "gold": 1}
    contexts   {"contexts": ["The ball", "The box"], "continuation": " is round.", "gold": 0}
    answer     {"context": "Q: 2 + 2?\\nA:", "answer": " 4"}
    answers    {"prompt": "Q: 2 + 2?\\nA:", "answers": ["4", "four"], "stop": ["\\n"]}
    middle     {"prefix": "def f(", "suffix": "):\\n    return x", "middle": "x", "stop": ["\\n"]}

The field in front names the kind; of those shown, `stop` (default none) and `max_tokens` (64) may
be left out. `"id"` is free; `"shot": true` makes a line a demonstration: it stands solved in front
of every prompt, is not scored itself, and the file has as many shots as such lines. Figures:

    accuracy             the option of highest likelihood is `gold`; ties go to the first
    accuracy_token, _byte, _char    likelihood to the power of 1 / (scored tokens, UTF-8 bytes,
                         characters of the option): perplexity per unit decides
    bits_per_byte        -log2 p of the gold text over its UTF-8 bytes, summed over items before
                         they are divided: moves at sizes where accuracy is at chance
    exact_match          the completion, greedy, cut before the first of `stop`, is one of
                         `answers`; without the white space around (of `middle`: behind)
    passed               with `run` only: prefix + completion + suffix + "check" runs to its end

Every figure is a ratio of sums over items and has the standard error of that ratio. What does not
fit the context loses its beginning, shots first (where there is a suffix, also its end), and is
counted in `cut`; what is scored, and room for `max_tokens` of completion, must fit.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from dsv3.data.corpus import well_formed
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError, nearest
from dsv3.evaluation.scoring import Score, Span, behind, options
from dsv3.inference.generate import fim_tokens, prompt_tokens
from dsv3.schema import conform, field_types

BETWEEN_SHOTS = "\n\n"
Run = Callable[[str], bool]  # whether a program runs to its end


class Ratio(NamedTuple):
    """What one item adds to a figure."""

    amount: float
    of: float = 1


class Completed(NamedTuple):
    """What the model wrote, cut before a stop string, and how programs are run, if they are."""

    text: str
    run: Run | None


class Item(ABC):
    """One line of a task. It is scored, and a `Written` one is completed."""

    @property
    @abstractmethod
    def solved(self) -> str:
        """The item as a demonstration."""

    @abstractmethod
    def with_shots(self, shots: str) -> "Item":
        """The item with solved ones in front."""

    def spans(self, tokenizer: Tokenizer, context: int) -> list[Span]:
        """What is scored; of any length, where losing the beginning makes it fit."""
        return []

    @abstractmethod
    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        """The item's share of each figure, given the scores of its spans and its completion."""


@dataclass(frozen=True, kw_only=True)
class Written(Item):
    """An item that the model completes."""

    stop: tuple[str, ...] = ()
    max_tokens: int = 64

    def __post_init__(self):
        _require(self.max_tokens > 0, "max_tokens", f"= {self.max_tokens} must be positive")
        _require(all(self.stop), "stop", "holds an empty text")

    @abstractmethod
    def question(self, tokenizer: Tokenizer, room: int) -> tuple[list[int], bool]:
        """At most `room` tokens to be completed, and whether some were cut for that."""


@dataclass(frozen=True)
class Choices(Item):
    context: str
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self):
        _require(len(self.choices) > 1 and all(self.choices), "choices", "wants two or more texts")
        _require_index(self.gold, self.choices)

    @property
    def solved(self) -> str:
        return self.context + self.choices[self.gold]

    def with_shots(self, shots: str) -> Item:
        return replace(self, context=shots + self.context)

    def spans(self, tokenizer: Tokenizer, context: int) -> list[Span]:
        return options(tokenizer, self.context, self.choices)

    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        units = {
            "accuracy": [1] * len(scores),
            "accuracy_token": [score.tokens for score in scores],
            "accuracy_byte": [len(choice.encode()) for choice in self.choices],
            "accuracy_char": [len(choice) for choice in self.choices],
        }
        right = {name: Ratio(_best(scores, per) == self.gold) for name, per in units.items()}
        return right | _bits_per_byte(scores[self.gold], self.choices[self.gold])


@dataclass(frozen=True)
class Contexts(Item):
    contexts: tuple[str, ...]
    continuation: str
    gold: int

    def __post_init__(self):
        _require(len(self.contexts) > 1, "contexts", "wants two or more texts")
        _require(bool(self.continuation), "continuation", "is empty")
        _require_index(self.gold, self.contexts)

    @property
    def solved(self) -> str:
        return self.contexts[self.gold] + self.continuation

    def with_shots(self, shots: str) -> Item:
        return replace(self, contexts=tuple(shots + context for context in self.contexts))

    def spans(self, tokenizer: Tokenizer, context: int) -> list[Span]:
        return behind(tokenizer, self.contexts, self.continuation)

    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        right = Ratio(_best(scores, [1] * len(scores)) == self.gold)
        return {"accuracy": right} | _bits_per_byte(scores[self.gold], self.continuation)


@dataclass(frozen=True)
class Answer(Item):
    context: str
    answer: str

    def __post_init__(self):
        _require(bool(self.answer), "answer", "is empty")

    @property
    def solved(self) -> str:
        return self.context + self.answer

    def with_shots(self, shots: str) -> Item:
        return replace(self, context=shots + self.context)

    def spans(self, tokenizer: Tokenizer, context: int) -> list[Span]:
        return options(tokenizer, self.context, [self.answer])

    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        return _bits_per_byte(scores[0], self.answer)


@dataclass(frozen=True)
class Answers(Written):
    prompt: str
    answers: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        _require(bool(self.answers), "answers", "is empty")

    @property
    def solved(self) -> str:
        return self.prompt + self.answers[0]

    def with_shots(self, shots: str) -> Item:
        return replace(self, prompt=shots + self.prompt)

    def question(self, tokenizer: Tokenizer, room: int) -> tuple[list[int], bool]:
        tokens = prompt_tokens(tokenizer, self.prompt)
        return tokens[-room:], len(tokens) > room

    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        right = done.text.strip() in {answer.strip() for answer in self.answers}
        return {"exact_match": Ratio(right)}


@dataclass(frozen=True)
class Middle(Written):
    prefix: str
    suffix: str
    middle: str
    check: str = ""

    def __post_init__(self):
        super().__post_init__()
        _require(bool(self.middle), "middle", "is empty")

    @property
    def solved(self) -> str:
        raise ConfigError("shot: a text to be filled in takes no demonstrations")

    def with_shots(self, shots: str) -> Item:
        raise ConfigError("shot: a text to be filled in takes no demonstrations")

    def spans(self, tokenizer: Tokenizer, context: int) -> list[Span]:
        middle = tokenizer.encode(self.middle)
        given, _ = self.question(tokenizer, context - max(self.max_tokens, len(middle)))
        return [Span([*given, *middle], len(given))]

    def question(self, tokenizer: Tokenizer, room: int) -> tuple[list[int], bool]:
        """Prefix and suffix keep what is nearest the hole, half of the room each if need be."""
        tokens = fim_tokens(tokenizer, self.prefix, self.suffix)
        hole = tokens.index(tokenizer.fim_hole)
        before, after = tokens[2:hole], tokens[hole + 1 : -1]
        room = max(room - 4, 0)  # eos, begin, hole, end
        behind_hole = min(len(after), max(room // 2, room - len(before)))
        before_hole = min(len(before), room - behind_hole)
        before = before[len(before) - before_hole :]
        fitted = [*tokens[:2], *before, tokens[hole], *after[:behind_hole], tokens[-1]]
        return fitted, len(fitted) < len(tokens)

    def figures(self, scores: list[Score], done: Completed) -> dict[str, Ratio]:
        figures = {"exact_match": Ratio(done.text.rstrip() == self.middle.rstrip())}
        if done.run is not None and self.check:
            program = f"{self.prefix}{done.text}{self.suffix}\n{self.check}\n"
            figures["passed"] = Ratio(done.run(program))
        return figures | _bits_per_byte(scores[0], self.middle)


KINDS: dict[str, type[Item]] = {
    "choices": Choices,
    "contexts": Contexts,
    "answer": Answer,
    "answers": Answers,
    "middle": Middle,
}


def _best(scores: Sequence[Score], per: Sequence[int]) -> int:
    nats = [score.nats / unit for score, unit in zip(scores, per, strict=True)]
    return nats.index(min(nats))


def _bits_per_byte(score: Score, text: str) -> dict[str, Ratio]:
    return {"bits_per_byte": Ratio(score.nats / math.log(2), len(text.encode()))}


def _require(condition: bool, name: str, because: str) -> None:
    if not condition:
        raise ConfigError(f"{name} {because}")


def _require_index(gold: int, texts: Sequence[str]) -> None:
    _require(0 <= gold < len(texts), "gold", f"= {gold} is none of 0 to {len(texts) - 1}")


# --- files -------------------------------------------------------------------------------------


class Task(NamedTuple):
    """`items` with their shots in front; `where` names each one's file and line."""

    name: str
    items: list[Item]
    where: list[str]
    shots: int


def read_task(path: str | Path, limit: int | None = None, shots: int | None = None) -> Task:
    """The task of a JSONL file: its first `limit` items, behind its first `shots` demonstrations.

    Raises DataError naming file and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"task {path} cannot be read: {error.strerror}") from error
    solved, items, where, kinds = [], [], [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item, is_shot = _item(line)
            kinds.add(type(item))
            if len(kinds) > 1:
                raise ConfigError("is of another kind than the lines above")
            if is_shot:
                solved.append(item.solved)
            else:
                items.append(item)
                where.append(f"{path}:{number}")
        except ConfigError as error:
            raise DataError(f"{path}:{number}: {error}") from error
    if not items:
        raise DataError(f"task {path} has no item to score")
    solved = solved[:shots]
    front = "".join(text + BETWEEN_SHOTS for text in solved)
    items = [item.with_shots(front) if solved else item for item in items[:limit]]
    return Task(path.stem, items, where[:limit], len(solved))


def _item(line: bytes) -> tuple[Item, bool]:
    """The item of one line, and whether it is a demonstration."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_row)
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
        raise ConfigError(f"is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError("is no JSON object")
    is_shot = conform(row.pop("shot", False), bool, "shot")
    row.pop("id", None)
    kind = next((kind for name, kind in KINDS.items() if name in row), None)
    if kind is None:
        raise ConfigError(f"names no kind: it wants one of the fields {', '.join(KINDS)}")
    return _built(kind, row), is_shot


def _row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"names the field {twice[0]!r} twice")
    return dict(pairs)


def _built(kind: type[Item], row: dict[str, Any]) -> Item:
    types = field_types(kind)
    if unknown := sorted(row.keys() - types.keys()):
        raise ConfigError(f"has an unknown field {unknown[0]!r}{nearest(unknown[0], types)}")
    optional = {"stop", "max_tokens", "check"}
    if missing := sorted(types.keys() - row.keys() - optional):
        raise ConfigError(f"lacks the field {missing[0]!r}")
    for name, value in row.items():
        if get_origin(types[name]) is tuple and not isinstance(value, list):
            raise ConfigError(f"{name} wants a list, got {value!r}")
    values = {name: _text(conform(value, types[name], name)) for name, value in row.items()}
    return kind(**values)


def _text(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_text, value))
    return well_formed(value) if isinstance(value, str) else value
