"""What a token costs between nodes: node-limited dispatch against a flat all-to-all (§3.2.2).

    python -m benchmarks.transports
    python -m benchmarks.transports configs/deepseek_v3.py --node 8 --local 8 --tokens 512

The copies are those that `parallel.exchange` makes, for every device of the mesh; those that leave
their node are counted. Routers are random ones whose scores
of every expert are shifted by a bias of that spread: 0 is an even router, 0.5 one collapsed
on few experts. Tokens travel there in the format of `model.dot` with their gates and experts, sums
come back in BF16; bytes are for a layer's forward pass, of a token.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.bindings import apply
from dsv3.cli import Parser
from dsv3.cluster import Sizes
from dsv3.config import Config, Moe, Parallel
from dsv3.errors import exits_cleanly
from dsv3.model.router import choose
from dsv3.numerics.dot import build
from dsv3.parallel.exchange import Hop, goes_to
from dsv3.parallel.mesh import hops_of
from dsv3.sweeps import load_config

SPREADS = (0.0, 0.02, 0.1, 0.5)


def routed(moe: Moe, spread: float, devices: int, tokens: int) -> jax.Array:
    """The experts of `tokens` tokens on each device, int32 [devices, X, K]."""
    k_scores, k_bias = jax.random.split(jax.random.key(0))
    scores = jax.nn.sigmoid(jax.random.normal(k_scores, (devices * tokens, moe.routed_experts)))
    bias_E = spread * jax.random.normal(k_bias, (moe.routed_experts,))
    return choose(scores, bias_E, moe).reshape(devices, tokens, -1)


def leaving(moe: Moe, hop: Hop, experts: jax.Array) -> float:
    """Copies of a token that `hop` sends to another node, in the mean; experts int32 [n, l, X, K].

    Counted in what every device sends to every rank of the hop.
    """

    node, local, tokens, chosen = experts.shape
    goes = np.asarray(goes_to(experts.reshape(-1, chosen), moe.routed_experts, hop))
    to_node = goes.reshape(node, local * tokens, node, -1).sum((1, 3))
    return float(to_node.sum() - np.trace(to_node)) / (node * local * tokens)


def bytes_of_copy(config: Config) -> int:
    """Of a token there, with its gates and experts, and of a sum in BF16 back."""
    x_XD = jnp.zeros((1, config.model.width), jnp.bfloat16)
    packed = jax.tree.leaves(build(config.model.dot).wire.pack(x_XD))
    there = sum(leaf.nbytes for leaf in packed) + 8 * config.model.moe.experts_per_token
    return there + x_XD.nbytes


def table(config: Config, node: int, local: int, tokens: int) -> str:
    moe, lines = config.model.moe, []
    sizes = Sizes(1, 1, node, local)
    each = bytes_of_copy(config)
    for spread in SPREADS:
        experts = routed(moe, spread, node * local, tokens).reshape(node, local, tokens, -1)
        load = np.bincount(np.asarray(experts).ravel(), minlength=moe.routed_experts)
        row = [f"{spread:g}", f"{load.max() / load.mean():.2f}"]
        for transport in ("all_to_all", "node_limited"):
            laid = replace(config, parallel=Parallel(node=node, local=local, transport=transport))
            copies = leaving(moe, hops_of(laid, sizes)[0], experts)
            row += [f"{copies:.2f}", f"{copies * each / 1024:.1f}"]
        row.append(f"{float(row[2]) / float(row[4]):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    head = (
        f"{node} nodes of {local} devices, {tokens} tokens each; between nodes, a token:",
        "",
        "| bias spread | max / mean load | flat: copies | KiB | limited: copies | KiB | ratio |",
        "|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *lines])


@exits_cleanly
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", nargs="?", default="configs/deepseek_v3.py")
    parser.add_bindings()
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="a device")
    args = parser.parse_args()
    print(table(apply(load_config(args.config), args.set), args.node, args.local, args.tokens))


if __name__ == "__main__":
    main()
