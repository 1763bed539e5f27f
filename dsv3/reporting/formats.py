"""Which product of a configuration runs in which format.

    python -m dsv3.reporting.formats configs/deepseek_v3.py --set model.dot=fp8

Walks the model itself, built as shapes only, and asks the dot rule in each of its parts: what is
printed is what runs. Products without a dot rule stay high by construction (§3.3.1): the router is
FP32, core attention multiplies in the compute dtype with an FP32 softmax. Groups along tokens,
128x1, are as long as `model.moe.block` in experts whose blocks are shorter.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from flax import nnx

from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.config import Model
from dsv3.errors import exits_cleanly
from dsv3.model.layers import Embedding, Linear
from dsv3.model.mla import Mla
from dsv3.model.moe import RoutedExperts
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.rule import DotRule, Formats
from dsv3.sweeps import load_config

PLAIN, FP32 = "compute x compute", "float32 x float32"
CORE = Formats(PLAIN, PLAIN, PLAIN, "compute")
ROUTER = Formats(FP32, FP32, FP32, "float32")
LOOKUP = Formats("lookup in float32", "-", "float32", "-")


class Product(NamedTuple):
    """One product of the model; `shape` is its weight's, with stacked layers and experts first."""

    name: str
    shape: tuple[int, ...]
    formats: Formats


def products(config: Model) -> Iterator[Product]:
    """Every product with a weight, and core attention, in the model's own order of parts."""
    model = jax.eval_shape(lambda key: Transformer(key, config), jax.random.key(0))
    for path, module in nnx.iter_modules(model):
        name = ".".join(map(str, path))
        match module:
            case Linear():
                second_half = path[-1] == "down"
                yield Product(name, module.w.shape, formats(module.dot, second_half))
            case RoutedExperts():
                first, second = module.dot.after_dispatch, module.dot.before_combine
                yield Product(f"{name}.gate", module.gate.shape, first.formats)
                yield Product(f"{name}.up", module.up.shape, first.formats)
                yield Product(f"{name}.down", module.down.shape, formats(second, True))
            case Router():
                yield Product(name, module.w.shape, ROUTER)
            case Mla():
                yield Product(f"{name}.core", (), CORE)
            case Embedding():
                yield Product(name, module.table.shape, LOOKUP)


def formats(rule: DotRule, second_half: bool = False) -> Formats:
    """A rule's formats; behind SwiGLU it is SwiGLU's inputs that an FP8 rule caches."""
    found = rule.formats
    if second_half and isinstance(rule, Fp8Rule):
        found = found._replace(cache=f"{found.cache}, SwiGLU's inputs")
    return found


def table(config: Model) -> str:
    """One line for each product."""
    rows = [("product", "weight", *(field.capitalize() for field in Formats._fields))]
    for name, shape, found in products(config):
        rows.append((name, "x".join(map(str, shape)), *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_bindings()
    options = parser.parse_args(arguments)
    print(table(apply(load_config(options.config), options.set).model))


if __name__ == "__main__":
    main()
