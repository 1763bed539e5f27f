"""Typed frozen sections: the base class of every configuration dataclass.

A `Section` conforms each field to its annotation when it is built, so a value is checked in one
place whether it came from Python, from a binding or from a sweep. What annotations may hold:
`bool int float str`, `None`, `Literal[...]`, `tuple[X, ...]`, fixed tuples, NamedTuples, other
Sections, and unions of these. A union of Sections is a *sum type*: each variant carries a `tag`,
and the tag as a string stands for that variant with its defaults (`model.dot = 'bf16'`).
"""

import dataclasses
import types
import typing
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from dsv3.errors import ConfigError, nearest

FP32_LIMIT = 3.4e38  # a number beyond it would become infinite where it is computed with


class Section:
    """Base of the frozen configuration dataclasses; `path` is where it hangs in the tree."""

    path: ClassVar[str] = ""
    tag: ClassVar[str] = ""

    def __post_init__(self):
        for name, annotation in field_types(type(self)).items():
            value = conform(getattr(self, name), annotation, self.at(name))
            object.__setattr__(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Raise ConfigError where fields contradict each other; overridden by sections."""

    def at(self, name: str) -> str:
        """The dotted path of a field, as a binding writes it."""
        return f"{self.path}.{name}" if self.path else name

    def require(self, condition: bool, name: str, because: str) -> None:
        """Raise ConfigError naming field `name` and its value unless `condition` holds."""
        if not condition:
            value = getattr(self, name)
            shown = value.tag if isinstance(value, Section) and value.tag else value
            raise ConfigError(f"{self.at(name)} = {shown!r} {because}")

    def require_positive(self, *names: str) -> None:
        """Of each of them, or None where that is allowed."""
        for name in names:
            value = getattr(self, name)
            self.require(value is None or value > 0, name, "must be positive")

    def require_not_negative(self, *names: str) -> None:
        for name in names:
            self.require(getattr(self, name) >= 0, name, "must not be negative")

    def require_range(self, name: str, low: float, high: float) -> None:
        self.require(low <= getattr(self, name) <= high, name, f"must lie in [{low}, {high}]")


def field_types(section: type) -> dict[str, Any]:
    """Field name → resolved annotation."""
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def variants(annotation: Any) -> dict[str, type[Section]]:
    """Tag → class for the tagged Sections in a union annotation; empty for anything else."""
    members = get_args(annotation) if is_union(annotation) else (annotation,)
    return {m.tag: m for m in members if is_section(m) and m.tag}


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def conform(value: Any, annotation: Any, path: str) -> Any:
    """Return `value` as `annotation` wants it (int → float, list → tuple, tag → variant).

    Raises ConfigError naming `path`, what was given and what was wanted.
    """
    if isinstance(value, str) and (tagged := variants(annotation)):
        if value in tagged:
            return tagged[value]()
        raise ConfigError(f"{path} = {value!r} is no known choice{nearest(value, tagged)}")
    if is_union(annotation):
        return _conform_union(value, annotation, path)
    if get_origin(annotation) is Literal:
        return _conform_literal(value, get_args(annotation), path)
    if get_origin(annotation) is tuple:
        return _conform_tuple(value, get_args(annotation), path)
    if isinstance(annotation, type) and hasattr(annotation, "_fields"):  # a NamedTuple
        return annotation(*_conform_fields(value, annotation, path))
    if annotation is Any:
        return value
    if annotation is float:
        value = _conform_float(value, path)
    if annotation is type(None):
        annotation = types.NoneType
    if annotation is str and isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{path} = {value!r} holds a NUL character")
    exact = annotation in (int, float, bool, str, types.NoneType)
    matches = type(value) is annotation if exact else isinstance(value, annotation)
    if not matches:
        raise ConfigError(f"{path} wants {_named(annotation)}, got {value!r}")
    return value


def _conform_float(value: Any, path: str) -> Any:
    if type(value) is float and value != value:
        raise ConfigError(f"{path} wants a number, got nan")
    if type(value) not in (int, float):
        return value
    if FP32_LIMIT < abs(value) < float("inf"):
        raise ConfigError(f"{path} wants a float, got a number beyond the range of FP32")
    return float(value)


def _conform_union(value: Any, annotation: Any, path: str) -> Any:
    for member in get_args(annotation):
        try:
            return conform(value, member, path)
        except ConfigError:
            continue
    wanted = " or ".join(_named(m) for m in get_args(annotation))
    raise ConfigError(f"{path} wants {wanted}, got {value!r}")


def _conform_literal(value: Any, choices: tuple, path: str) -> Any:
    if any(value == c and type(value) is type(c) for c in choices):
        return value
    hint = nearest(str(value), map(str, choices))
    raise ConfigError(f"{path} = {value!r} is no known choice{hint}")


def _conform_tuple(value: Any, members: tuple, path: str) -> tuple:
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{path} wants a tuple, got {value!r}")
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise ConfigError(f"{path} wants {len(members)} entries, got {len(value)}")
    return tuple(
        conform(v, m, f"{path}[{i}]") for i, (v, m) in enumerate(zip(value, members, strict=True))
    )


def _conform_fields(value: Any, annotation: Any, path: str) -> tuple:
    hints = typing.get_type_hints(annotation)
    return _conform_tuple(value, tuple(hints[f] for f in annotation._fields), path)


def _named(annotation: Any) -> str:
    if is_section(annotation) and annotation.tag:
        return repr(annotation.tag)
    return {type(None): "None"}.get(annotation) or getattr(annotation, "__name__", str(annotation))
