"""The house rules that a program can read, checked on the syntax tree of every source file.

Rows: a file imports only from its own row of `ROWS` or from rows above it. Each rule is a
generator of complaints over one parsed file; `test_every_rule_can_fail` shows each of them a
snippet that breaks it, so a rule that has gone blind fails as well.
"""

import ast
import functools
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROWS = (
    (
        "errors",
        "cli",
        "files",
        "host",
        "schema",
        "cluster",
        "model_config",
        "config",
        "counts",
        "bindings",
        "sweeps",
        "shapes",
    ),
    ("numerics",),
    ("parallel",),
    ("model",),
    ("data",),
    ("training",),
    ("checkpoint",),
    ("inference",),
    ("posttraining",),
    ("evaluation",),
    ("reporting",),
)
# Files that import an extra of pyproject.toml, and so are imported by no other file of dsv3.
EXTRAS = {"dsv3/evaluation/lm_eval_adapter.py": {"lm_eval"}}
MESH = "dsv3/parallel/mesh.py"  # the one file that may look at the machine
ENVIRONMENT = {"os.environ", "os.getenv", "os.environb", "os.getenvb", "os.putenv"}
MACHINE = {f"jax.{name}" for name in (
    "devices", "local_devices", "device_count", "local_device_count", "default_backend",
)}  # fmt: skip
NNX = {f"flax.nnx.{name}" for name in (
    "jit", "grad", "value_and_grad", "scan", "vmap", "pmap", "remat", "checkpoint", "shard_map",
    "while_loop", "fori_loop", "cond", "switch", "Optimizer", "ModelAndOptimizer", "Intermediate",
    "pop", "capture",
)}  # fmt: skip
MAX_FILE = 400
MAX_FUNCTION = 80


@dataclass(frozen=True)
class Source:
    """A parsed file; `path` is relative to the root, as in 'dsv3/model/mla.py'."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


Complaints = Iterator[tuple[int, str]]  # (line, what is wrong)


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that is imported, at any depth of the file."""
    package = source.module.split(".")
    if not source.path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def names(source: Source) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported or reached through an imported name."""
    yield from imports(source)
    meaning = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                meaning[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and (dotted := dotted_name(node)):
            first, _, rest = dotted.partition(".")
            if first in meaning:
                yield node.lineno, f"{meaning[first]}.{rest}"


def dotted_name(node: ast.expr) -> str:
    """'a.b.c' for such an expression, '' for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted_name(node.value)):
        return f"{base}.{node.attr}"
    return ""


def row_of(module: str) -> int | None:
    """The row of 'dsv3.x.y', None where no row holds it; 'dsv3' itself stands above all."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return next((i for i, row in enumerate(ROWS) if parts[1] in row), None)


# --- the rules ---------------------------------------------------------------------------------


def import_order(source: Source) -> Complaints:
    own = row_of(source.module)
    if own is None:
        yield 1, "stands in no row"
        return
    for line, name in imports(source):
        if name.split(".")[0] == "dsv3":
            row = row_of(name)
            if row is None:
                yield line, f"imports {name}, which stands in no row"
            elif row > own:
                yield line, f"imports {name}, which stands below it"


def declared_dependencies(source: Source) -> Complaints:
    allowed = {"dsv3"} | set(sys.stdlib_module_names) | declared_modules()
    allowed |= EXTRAS.get(source.path, set())
    with_extras = {path.removesuffix(".py").replace("/", ".") for path in EXTRAS}
    for line, name in imports(source):
        if name.split(".")[0] not in allowed:
            yield line, f"imports {name}, no core dependency in pyproject.toml"
        if any(f"{name}.".startswith(f"{module}.") for module in with_extras):
            yield line, f"imports {name}, which wants an extra"


def no_machine(source: Source) -> Complaints:
    if source.path == MESH:
        return
    for line, name in names(source):
        for banned in sorted(ENVIRONMENT | MACHINE):
            if name == banned or name.startswith(f"{banned}."):
                yield line, f"reads {banned}; only {MESH} may"


def no_globals(source: Source) -> Complaints:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"assigns the global {', '.join(node.names)}"


def plain_nnx(source: Source) -> Complaints:
    for line, name in names(source):
        if name in NNX:
            yield line, f"uses {name}; only jax's own transforms and optax on plain pytrees"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in ("sow", "perturb"):
            yield node.lineno, f"uses .{node.attr}; statistics are returned"


def no_flags_in_call(source: Source) -> Complaints:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                if argument.annotation and "bool" in ast.unparse(argument.annotation).split(" | "):
                    yield argument.lineno, f"__call__ takes the flag {argument.arg}"


def short_files(source: Source) -> Complaints:
    lines = len(source.text.splitlines())
    if lines > MAX_FILE:
        yield MAX_FILE, f"is {lines} lines long, more than {MAX_FILE}"


def short_functions(source: Source) -> Complaints:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield node.lineno, f"{node.name} is {lines} lines long, more than {MAX_FUNCTION}"


def documented(source: Source) -> Complaints:
    public = not Path(source.path).name.startswith("_") or source.path.endswith("__init__.py")
    if public and source.tree.body and not ast.get_docstring(source.tree):
        yield 1, "has no module docstring"


RULES: tuple[Callable[[Source], Complaints], ...] = (
    import_order,
    declared_dependencies,
    no_machine,
    no_globals,
    plain_nnx,
    no_flags_in_call,
    short_files,
    short_functions,
    documented,
)


# --- what they read ----------------------------------------------------------------------------


@functools.cache
def declared_modules() -> set[str]:
    """Names that the core dependencies of pyproject.toml can be imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {canonical(re.split(r"[^\w.-]", line)[0]) for line in project["dependencies"]}
    installed = importlib.metadata.packages_distributions()
    return {name for name, owners in installed.items() if wanted & set(map(canonical, owners))}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def package_sources() -> list[Source]:
    files = sorted((ROOT / "dsv3").rglob("*.py"))
    return [parse(file.relative_to(ROOT).as_posix(), file.read_text("utf-8")) for file in files]


# --- tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule):
    sources = package_sources()
    assert sources
    complaints = [f"{s.path}:{line}: {what}" for s in sources for line, what in rule(s)]
    assert not complaints, "\n" + "\n".join(complaints)


LONG_FUNCTION = "def f():\n" + "    pass\n" * MAX_FUNCTION

BROKEN = [
    (import_order, "dsv3/model/mla.py", "from dsv3.training.step import train_step"),
    (import_order, "dsv3/model/mla.py", "from dsv3 import training"),
    (import_order, "dsv3/model/mla.py", "import dsv3.training.step as s"),
    (import_order, "dsv3/model/mla.py", "from ..training import step"),
    (import_order, "dsv3/model/__init__.py", "from ..data import loader"),
    (import_order, "dsv3/config.py", "def f():\n    import dsv3.numerics.dot"),
    (import_order, "dsv3/training/loop.py", "from dsv3.checkpoint.store import Store"),
    (import_order, "dsv3/__init__.py", "from dsv3 import config"),
    (import_order, "dsv3/helpers.py", ""),
    (import_order, "dsv3/model/mla.py", "from dsv3 import helpers"),
    (declared_dependencies, "dsv3/model/mla.py", "import torch"),
    (declared_dependencies, "dsv3/model/mla.py", "from configs.tiny import config"),
    (declared_dependencies, "dsv3/evaluation/lm_eval_adapter.py", "import torch"),
    (declared_dependencies, "dsv3/evaluation/tasks.py", "import lm_eval"),
    (
        declared_dependencies,
        "dsv3/evaluation/tasks.py",
        "from dsv3.evaluation import lm_eval_adapter",
    ),
    (no_machine, "dsv3/model/mla.py", "import os\nx = os.environ['X']"),
    (no_machine, "dsv3/model/mla.py", "import os\nx = os.environ.get('X')"),
    (no_machine, "dsv3/model/mla.py", "from os import getenv as g"),
    (no_machine, "dsv3/model/mla.py", "import jax\nn = len(jax.devices())"),
    (no_machine, "dsv3/parallel/dispatch.py", "import jax as j\nn = j.device_count()"),
    (no_machine, "dsv3/model/mla.py", "from jax import local_devices"),
    (no_globals, "dsv3/model/mla.py", "def f():\n    global x\n    x = 1"),
    (plain_nnx, "dsv3/model/mla.py", "from flax import nnx\n@nnx.jit\ndef f(): pass"),
    (plain_nnx, "dsv3/model/mla.py", "import flax.nnx as n\nf = n.grad(g)"),
    (plain_nnx, "dsv3/model/mla.py", "import flax\nf = flax.nnx.scan(g)"),
    (plain_nnx, "dsv3/model/mla.py", "from flax.nnx import Optimizer"),
    (plain_nnx, "dsv3/model/mla.py", "def f(self, x): self.sow('losses', 'z', x)"),
    (no_flags_in_call, "dsv3/model/mla.py", "class A:\n def __call__(self, x, train: bool): ..."),
    (short_files, "dsv3/model/mla.py", "x = 1\n" * (MAX_FILE + 1)),
    (short_functions, "dsv3/model/mla.py", LONG_FUNCTION),
    (documented, "dsv3/model/mla.py", "x = 1"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    BROKEN,
    ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(BROKEN)],
)
def test_every_rule_can_fail(rule, path, text):
    assert list(rule(parse(path, text)))
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


GOOD = '''"""A module that keeps the rules."""

import os.path
from functools import partial

import jax
from flax import nnx

from dsv3.config import Mla
from dsv3.parallel import mesh
from ..numerics.dot import dot
from . import rope


class Layer(nnx.Module):
    def __call__(self, x: int) -> jax.Array:
        environ = devices = jit = jax.jit(partial(dot, x), static_argnums=0)
        return self.devices(environ, os.path.join("a"), jax.process_index(), devices, jit)
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_let_good_code_pass(rule):
    assert not list(rule(parse("dsv3/model/layer.py", GOOD)))


def test_the_mesh_may_look_at_the_machine():
    text = "import os, jax\nn = jax.devices(), os.environ"
    assert not list(no_machine(parse(MESH, text)))
    assert list(no_machine(parse("dsv3/parallel/meshes.py", text)))
