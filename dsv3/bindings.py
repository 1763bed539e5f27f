"""Gin-style bindings: one line of text replaces one leaf of the configuration tree.

    include 'base.gin'                  # relative to the file that includes it
    model.moe.experts_per_token = 4     # a.b.c = a Python literal, also inf and -inf
    model.moe.balance = 'aux_loss'      # a sum type is chosen by its tag ...
    model.moe.balance.alpha = 0.01      # ... then its fields are bound
    model.mla.yarn = None               # an absent part
    training.decay = [('linear', 0.5, 1.0),     # brackets may span lines
                      ('cosine', 1.0, 0.1)]

`--set` and files share this grammar. Nothing is evaluated, called or referenced. Since a shell eats
quotes, a bare word or path that is no literal stands for a string (`--set model.dot=bf16`).

Bindings are assignments, made in order onto a draft of the tree; each is checked against its
field's type at once, but sections are validated when the whole tree is built, so that fields which
depend on one another can be bound in any order. A mapping `{path: value}`, as sweeps use it, has
no order: sections are chosen before their fields are bound.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.errors import ConfigError, nearest
from dsv3.schema import Section, conform, field_types, variants


class Binding(NamedTuple):
    """`path = value`, and where it was written (`file:line`, or '' for Python)."""

    path: str
    value: Any
    origin: str = ""


# --- reading -----------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<string>'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")|(?P<comment>\#[^\n]*)
      |(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<newline>\n)|(?P<other>.)""",
    re.VERBOSE,
)
_INCLUDE = re.compile(r"include\b\s*(?!=)(?P<file>.*)", re.DOTALL)
_BARE_WORD = re.compile(r"[A-Za-z_./~][\w./~*?:@%+-]*")


def parse(text: str, origin: str = "--set") -> list[Binding]:
    """Bindings written in `text`; includes are relative to the working directory.

    Raises ConfigError naming `origin` (and the line, where there are several) for what is no
    binding. Whether paths exist and values fit is seen when they are applied.
    """
    several = "\n" in text.strip()
    return _parse(text, lambda line: f"{origin}:{line}" if several else origin, Path(), ())


def read_bindings(path: str | Path) -> list[Binding]:
    """Bindings of a file, includes expanded in place. Raises ConfigError naming file and line."""
    return _read(Path(path), ())


def _read(path: Path, including: tuple[Path, ...]) -> list[Binding]:
    require_file(path, "bindings file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"bindings file {path} is no UTF-8 text: {error}") from None
    return _parse(text, lambda line: f"{path}:{line}", path.parent, (*including, path.resolve()))


def _parse(
    text: str, place: Callable[[int], str], folder: Path, including: tuple[Path, ...]
) -> list[Binding]:
    bindings = []
    for line, statement in _statements(text):
        try:
            if include := _INCLUDE.fullmatch(statement):
                bindings += _include(include["file"], folder, including)
                continue
            path, equals, value = (part.strip() for part in statement.partition("="))
            if not equals:
                raise ConfigError(f"{statement!r} is neither path = literal nor include 'file'")
            bindings.append(Binding(path, _value(value, path), place(line)))
        except ConfigError as error:
            raise ConfigError(f"{place(line)}: {error}") from None
    return bindings


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line number, statement) without comments; open brackets carry a statement over lines."""
    line, start, depth, parts = 1, 1, 0, []
    for token in _TOKEN.finditer(text + "\n"):
        kind = token.lastgroup
        depth += (kind == "open") - (kind == "close")
        if kind == "newline":
            line += 1
        if kind == "newline" and depth <= 0:
            if statement := "".join(parts).strip():
                yield start, statement
            start, depth, parts = line, 0, []
        elif kind != "comment":
            parts.append(token[0])
    if parts:  # a bracket is never closed, so this is no literal
        yield start, "".join(parts).strip()


def _include(operand: str, folder: Path, including: tuple[Path, ...]) -> list[Binding]:
    name = _value(operand, "include")
    if not isinstance(name, str):
        raise ConfigError(f"include wants a file name in quotes, got {operand}")
    path = folder / Path(name).expanduser()
    if path.resolve() in including:
        circle = [*including[including.index(path.resolve()) :], path]
        raise ConfigError(f"include makes a circle: {' → '.join(p.name for p in circle)}")
    return _read(path, including)


def _value(text: str, path: str) -> Any:
    """The Python literal in `text`, or the bare word itself."""
    try:
        return ast.literal_eval(_Infinity().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        if _BARE_WORD.fullmatch(text):
            return text
        first, *more = text.split("\n")
        raise ConfigError(
            f"{path} = {first}{' …' if more else ''} is no Python literal; a string wants quotes"
        ) from None


class _Infinity(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float("inf")) if node.id == "inf" else node


def require_file(path: Path, kind: str) -> None:
    """Raise ConfigError naming `path`, and the nearest such file beside it, unless it exists."""
    if not path.is_file():
        beside = [p.name for p in path.parent.glob(f"*{path.suffix or '.py'}")]
        raise ConfigError(f"no {kind} {path}{nearest(path.name, beside) if beside else ''}")


# --- applying ----------------------------------------------------------------------------------


def apply[S: Section](config: S, bindings: list[Binding] | Mapping[str, Any]) -> S:
    """A new configuration with `bindings` made; later ones override earlier ones.

    Raises ConfigError, with the binding's file and line, for a path that does not exist (and the
    nearest that does), a value of the wrong type, and fields that contradict each other.
    """
    if isinstance(bindings, Mapping):
        sections_first = sorted(bindings.items(), key=lambda item: item[0].count("."))
        bindings = [Binding(path, value) for path, value in sections_first]
    draft = _Draft(config)
    for binding in bindings:
        try:
            draft.bind(binding.path, binding.value)
        except ConfigError as error:
            raise _placed(error, [binding]) from None
    try:
        return draft.build()
    except ConfigError as error:
        raise _placed(error, _blamed(str(error), bindings)) from None


def _placed(error: ConfigError, bindings: list[Binding]) -> ConfigError:
    origins = dict.fromkeys(b.origin for b in bindings if b.origin)
    return ConfigError(f"{', '.join(origins)}: {error}") if origins else error


def _blamed(message: str, bindings: list[Binding]) -> list[Binding]:
    """Bindings whose path the message names, else those beside the field that it begins with."""
    last = {b.path: b for b in bindings}.values()
    section = message.split(" ")[0].rpartition(".")[0]
    named = [b for b in last if re.search(rf"(?<![\w.]){re.escape(b.path)}(?![\w.])", message)]
    return named or [b for b in last if b.path.rpartition(".")[0] == section]


class _Draft:
    """A Section taken apart into raw values and drafts of its sections, to be built once."""

    def __init__(self, section: Section):
        self.kind = type(section)
        self.types = field_types(self.kind)
        self.values = {name: _drafted(getattr(section, name)) for name in self.types}

    def build(self) -> Any:
        built = {n: v.build() if isinstance(v, _Draft) else v for n, v in self.values.items()}
        return self.kind(**built)

    def bind(self, path: str, value: Any) -> None:
        *above, name = path.split(".")
        section, at, choices = self, "", {}
        for parent in above:
            section._require(parent, at, choices, path, self)
            choices, at = variants(section.types[parent]), f"{at}.{parent}".lstrip(".")
            below = section.values[parent]
            if not isinstance(below, _Draft):
                remedy = f"set {at} = {_either(choices)} first" if choices else "it has no fields"
                raise ConfigError(f"{path}: {at} is {below!r}, {remedy}")
            section = below
        section._require(name, at, choices, path, self)
        section.values[name] = _drafted(conform(value, section.types[name], path))

    def _require(
        self, name: str, at: str, choices: dict[str, type[Section]], path: str, root: "_Draft"
    ) -> None:
        """Raise unless this section, at path `at`, has field `name`; hint at another of `choices`
        that has it, at the same name elsewhere below `root`, or at the nearest name here."""
        if name in self.values:
            return
        if holders := [tag for tag, kind in choices.items() if name in field_types(kind)]:
            remedy = f"set {at} = {_either(holders)} first"
            raise ConfigError(f"{path}: {at} is {self.kind.tag!r}, {remedy}")
        last = path.rpartition(".")[2]
        if elsewhere := [p for p in root.paths() if p.rpartition(".")[2] == last]:
            raise ConfigError(f"unknown path {path}; did you mean {_either(elsewhere)}?")
        where = at or "the configuration"
        hint = nearest(name, self.values) if self.values else "; it has no fields"
        raise ConfigError(f"unknown path {path}: {where} has no {name!r}{hint}")

    def paths(self, prefix: str = "") -> Iterator[str]:
        for name, value in self.values.items():
            yield prefix + name
            if isinstance(value, _Draft):
                yield from value.paths(f"{prefix}{name}.")


def _drafted(value: Any) -> Any:
    return _Draft(value) if isinstance(value, Section) else value


def _either(names: Iterable[str]) -> str:
    return " or ".join(map(repr, names))


# --- writing -----------------------------------------------------------------------------------

HEADER = "# Every field as this run used it; replay with --bindings."


def operative(config: Section) -> str:
    """The whole configuration as text: `apply(Config(), parse(operative(config))) == config`."""
    blocks = [_written(block) for block in blocks_of(config) if block]
    return "\n\n".join([HEADER, *blocks]) + "\n"


def _written(block: Mapping[str, Any]) -> str:
    return "\n".join(f"{path} = {literal(value)}" for path, value in block.items())


def literal(value: Any) -> str:
    """`value` as a bindings file writes it; NamedTuples and lists become plain tuples."""
    if isinstance(value, tuple | list):
        entries = [literal(v) for v in value]
        return f"({entries[0]},)" if len(entries) == 1 else f"({', '.join(entries)})"
    return repr(value)


def blocks_of(section: Section, path: str = "") -> Iterator[dict[str, Any]]:
    """Per section, parents first, {path: value}: its tag where it has one, and its plain fields."""
    fields = {name: getattr(section, name) for name in field_types(type(section))}
    at = {name: f"{path}.{name}" if path else name for name in fields}
    tag = {path: section.tag} if section.tag else {}
    yield tag | {at[n]: v for n, v in fields.items() if not isinstance(v, Section)}
    for name, value in fields.items():
        if isinstance(value, Section):
            yield from blocks_of(value, at[name])


def difference(config: Section, base: Section) -> dict[str, Any]:
    """The fewest bindings with `apply(base, difference(config, base)) == config`."""
    return dict(_differences(config, base, ""))


def _differences(new: Section, old: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in field_types(type(new)):
        path, value, before = prefix + name, getattr(new, name), getattr(old, name)
        if value == before:
            continue
        if not isinstance(value, Section):
            yield path, value
            continue
        if type(value) is not type(before):
            yield path, value.tag
            before = type(value)()
        yield from _differences(value, before, f"{path}.")
