"""What the backward pass of one block keeps, in BF16 and in FP8, at the shapes of the 671B model.

    python -m benchmarks.activation_memory configs/deepseek_v3.py --tokens 4096

Nothing is computed: the block is differentiated on shapes only, and what its backward pass holds
besides parameters is added up by dtype. One line for each dot rule and rematerialisation policy.

`--compile` asks XLA as well: the gradients of a scan over blocks are compiled at two depths, and
what each further block adds to the program's temporary memory is what it keeps. (Of one block alone
the temporaries say little: what only lives inside it, attention's scores first, outweighs all.)
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from dsv3.cli import Parser
from dsv3.config import Bf16Dot, Fp8Dot, Model
from dsv3.errors import exits_cleanly
from dsv3.model.block import Block
from dsv3.model.rope import rotation
from dsv3.model.transformer import remat
from dsv3.numerics import dot
from dsv3.sweeps import load_config

DEPTHS = (8, 16)
RULES = {"bf16": Bf16Dot(), "fp8": Fp8Dot()}


def block_of(config: Model, tokens: int, policy: str, routed: bool):
    """(run(block, x), abstract block, abstract x) for one sequence of `tokens`."""
    rule = dot.build(config.dot)
    block = jax.eval_shape(lambda k: Block(k, config, rule, routed=routed), jax.random.key(0))
    turn, valid_BT = rotation(config.mla, jnp.arange(tokens)), jnp.ones((1, tokens), bool)
    run = remat(policy, lambda block, x: block(x, turn, valid_BT)[0], rule.kept)
    return run, block, jax.ShapeDtypeStruct((1, tokens, config.width), jnp.bfloat16)


def kept_bytes(config: Model, tokens: int, policy: str, routed: bool) -> Counter:
    """Bytes that the backward pass holds, by dtype, without parameters."""
    run, block, x_BTD = block_of(config, tokens, policy, routed)
    pullback = jax.eval_shape(lambda b, x: jax.vjp(run, b, x)[1], block, x_BTD)
    parameters = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(block))
    held = Counter()
    for leaf in jax.tree.leaves(pullback):
        if parameters[leaf.shape, leaf.dtype]:
            parameters[leaf.shape, leaf.dtype] -= 1
        else:
            held[leaf.dtype.name] += leaf.size * leaf.dtype.itemsize
    return held


def compiled_bytes(config: Model, tokens: int, policy: str, routed: bool) -> float:
    """What one more block adds to XLA's temporary memory, on the platform at hand."""
    run, block, x_BTD = block_of(config, tokens, policy, routed)

    def temporary(layers: int) -> int:
        def stacked(leaf):
            return jax.ShapeDtypeStruct((layers, *leaf.shape), leaf.dtype)

        def loss(blocks, x_BTD):
            y_BTD, _ = lax.scan(lambda x, block: (run(block, x), None), x_BTD, blocks)
            return y_BTD.astype(jnp.float32).sum()

        step = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
        analysis = step.lower(jax.tree.map(stacked, block), x_BTD).compile().memory_analysis()
        assert analysis is not None  # every platform that we run on gives one
        return analysis.temp_size_in_bytes

    few, many = DEPTHS
    return (temporary(many) - temporary(few)) / (many - few)


def rows(config: Model, tokens: int, compiled: bool = False) -> Iterator[str]:
    """The lines of a Markdown table; sizes are bytes a token."""
    yield "| block | dot rule | policy | bytes kept a token | of these, by dtype | compiled |"
    yield "|---|---|---|---|---|---|"
    for routed in (False, True):
        for policy in ("none", "report"):
            for name, rule in RULES.items():
                model = dataclasses.replace(config, dot=rule)
                held = kept_bytes(model, tokens, policy, routed)
                parts = ", ".join(f"{d} {n / tokens:,.0f}" for d, n in held.most_common(4))
                temporary = "–"
                if compiled:
                    temporary = f"{compiled_bytes(model, tokens, policy, routed) / tokens:,.0f}"
                kind = "MoE" if routed else "dense"
                total = sum(held.values()) / tokens
                yield f"| {kind} | {name} | {policy} | {total:,.0f} | {parts} | {temporary} |"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", help="a configuration file, configs/*.py")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help="also compile")
    options = parser.parse_args(arguments)
    for line in rows(load_config(options.config).model, options.tokens, options.compile):
        print(line, flush=True)


if __name__ == "__main__":
    main()
