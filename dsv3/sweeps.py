"""Configuration files, and the sweeps that stand beside what they vary.

A configuration is a Python file with `get_config() -> Config`. It may also hold named sweeps:

    sweeps = {"balance": lambda: product(param("model.moe.balance", ["aux_free", "aux_loss"]),
                                         param("training.seed", [0, 1, 2]))}

A `Sweep` is a list of bindings `{path: value}`, the same object for `--sweep balance` and for a
loop in a notebook. A run is named by a hash of its bindings, whatever their order, so its folder
keeps its name when the sweep is reordered or grown, and a sweep started again goes on.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import runpy
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.bindings import apply, blocks_of, literal, require_file
from dsv3.config import Config
from dsv3.errors import ConfigError, UserError, nearest
from dsv3.schema import Section


class Run(NamedTuple):
    """One configuration of a sweep; `id` names its folder."""

    id: str
    bindings: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Mappings `{path: value}`, one a run, in the order in which they run."""

    points: tuple[dict[str, Any], ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def runs(self, base: Config) -> list[Run]:
        """Every run, built and validated. Raises ConfigError naming the bindings that cannot be,
        or that occur twice."""
        runs: dict[str, Run] = {}
        for point in self:
            try:
                run = Run(run_id(point), point, apply(base, point))
            except ConfigError as error:
                raise ConfigError(f"sweep run ({describe(point)}): {error}") from None
            if run.id in runs:
                raise ConfigError(f"sweep run ({describe(point)}) occurs twice, as {run.id}")
            runs[run.id] = run
        return list(runs.values())


def select(runs: list[Run], index: int) -> Run:
    """Run `index`, counted from 0."""
    if not 0 <= index < len(runs):
        raise ConfigError(f"--index {index}: the sweep has runs 0 to {len(runs) - 1}")
    return runs[index]


def run_id(bindings: Mapping[str, Any]) -> str:
    """Eight hex digits of a hash of the bindings, whatever their order."""
    text = "\n".join(f"{path} = {literal(bindings[path])}" for path in sorted(bindings))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def describe(bindings: Mapping[str, Any]) -> str:
    """Bindings on one line, for messages and legends."""
    return ", ".join(f"{path} = {literal(value)}" for path, value in bindings.items()) or "base"


# --- combinators -------------------------------------------------------------------------------


def param(path: str, values: Iterable[Any]) -> Sweep:
    """One run for each value of the binding `path`. A Section stands for its tag and fields."""
    points = tuple(_point(path, value) for value in values)
    if not points:
        raise ConfigError(f"sweep over {path} has no values")
    return Sweep(points)


def _point(path: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Section):
        return {p: v for block in blocks_of(value, path) for p, v in block.items()}
    return {path: value.item() if isinstance(value, np.generic) else value}


def product(*sweeps: Sweep) -> Sweep:
    """Every combination; the last sweep varies fastest."""
    return Sweep(tuple(_merged(points) for points in itertools.product(*sweeps)))


def zipped(*sweeps: Sweep) -> Sweep:
    """The first with the first, the second with the second; lengths must agree."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zipped sweeps differ in length: {', '.join(map(str, lengths))}")
    return Sweep(tuple(_merged(points) for points in zip(*sweeps, strict=True)))


def chain(*sweeps: Sweep) -> Sweep:
    """The runs of the first, then those of the second, and so on."""
    return Sweep(tuple(itertools.chain(*sweeps)))


def _merged(points: Iterable[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for point in points:
        if twice := sorted(merged.keys() & point.keys()):
            raise ConfigError(f"sweep binds {', '.join(twice)} more than once in a run")
        merged |= point
    return merged


# --- configuration files -----------------------------------------------------------------------


def load_config(path: str | Path) -> Config:
    """What `get_config()` of a Python configuration file returns. Raises ConfigError naming the
    file, and the line where it is the file's own code that fails."""
    with _executed(Path(path)) as names:
        if "get_config" not in names:
            raise ConfigError("defines no get_config()")
        config = names["get_config"]()
        if not isinstance(config, Config):
            raise ConfigError(f"get_config() returned a {type(config).__name__}, not a Config")
        return config


def load_sweep(path: str | Path, name: str) -> Sweep:
    """The sweep `name` from the dictionary `sweeps` of a configuration file."""
    with _executed(Path(path)) as names:
        sweeps = names.get("sweeps", {})
        if name not in sweeps:
            hint = nearest(name, sweeps) if sweeps else "; it defines none"
            raise ConfigError(f"no sweep {name!r}{hint}")
        sweep = sweeps[name]()
        if not isinstance(sweep, Sweep):
            raise ConfigError(f"sweep {name!r} returned a {type(sweep).__name__}, not a Sweep")
        return sweep


@contextlib.contextmanager
def _executed(path: Path) -> Iterator[dict[str, Any]]:
    """The names that a configuration file defines; what is raised becomes a ConfigError."""
    require_file(path, "configuration file")
    try:
        yield runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise ConfigError(f"{_place(path, error)}: {kind}{error}") from error


def _place(path: Path, error: BaseException) -> str:
    """file:line of the innermost line of `path` on the way to `error`, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines else str(path)
