"""What a token costs between nodes: node-limited dispatch against a flat all-to-all (§3.2.2).

    python -m benchmarks.transports [--set model.dot=fp8]
    python -m benchmarks.transports configs/deepseek_v3.py --node 8 --local 8 --tokens 512
    python -m benchmarks.transports --workdir runs/tiny --node 4 --local 4

The copies are those that `parallel.exchange` makes, for every device of the mesh; those that leave
their node are counted. With a configuration, routers are random ones whose scores of every expert
are shifted by a bias of that spread: 0 is an even router, 0.5 one collapsed on few experts. With a
workdir, they are those of the trained model's layers, biases included, on held-out documents.
Tokens travel there in the format of `model.dot` with their gates and experts, sums come back in
BF16; bytes are for a layer's forward pass, of a token.
"""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3.bindings import apply
from dsv3.checkpoint.trained import Trained, from_workdir
from dsv3.cli import Parser
from dsv3.cluster import Sizes
from dsv3.config import Config, Moe, Parallel
from dsv3.errors import DataError, exits_cleanly
from dsv3.evaluation.bits_per_byte import held_out
from dsv3.model.rope import rotation
from dsv3.model.router import choose
from dsv3.model.transformer import Transformer
from dsv3.numerics.dot import build
from dsv3.parallel.exchange import Hop, goes_to
from dsv3.parallel.mesh import hops_of
from dsv3.sweeps import load_config

SPREADS = (0.0, 0.02, 0.1, 0.5)


def random_routers(moe: Moe, devices: int, tokens: int) -> Iterator[tuple[str, jax.Array]]:
    """What each is called, and the experts of `tokens` tokens on each device, [devices, X, K]."""
    k_scores, k_bias = jax.random.split(jax.random.key(0))
    scores = jax.nn.sigmoid(jax.random.normal(k_scores, (devices * tokens, moe.routed_experts)))
    shift_E = jax.random.normal(k_bias, (moe.routed_experts,))
    for spread in SPREADS:
        experts = choose(scores, spread * shift_E, moe)
        yield f"random, bias spread {spread:g}", experts.reshape(devices, tokens, -1)


def trained_routers(trained: Trained, devices: int, tokens: int) -> Iterator[tuple[str, jax.Array]]:
    """The same of every MoE layer of a run's model, on sequences of its held-out text."""
    tokenizer, length = trained.tokenizer(), trained.config.training.sequence_length
    rows = -(-devices * tokens // length)
    texts = [document.text for document in held_out(trained.config.data)]
    stream = [id for ids in tokenizer.encode_batch(texts) for id in (tokenizer.eos, *ids.tolist())]
    if len(stream) < rows * length:
        raise DataError(f"the held-out text has {len(stream)} tokens, fewer than {rows * length}")
    chosen_LXK = chosen(trained.model, jnp.array(stream[: rows * length]).reshape(rows, length))
    for layer, experts in enumerate(
        chosen_LXK[:, : devices * tokens], trained.config.model.dense_layers
    ):
        yield f"trained, layer {layer}", experts.reshape(devices, tokens, -1)


@jax.jit
def chosen(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    """The experts of every token in every MoE layer of the main model, int32 [L, X, K]."""
    turn = rotation(model.config.mla, jnp.arange(tokens_BT.shape[1]))
    everywhere = jnp.ones(tokens_BT.shape, bool)
    x_BTD, chosen_LXK = model.embedding(tokens_BT, None), jnp.zeros((0, 0, 0), jnp.int32)
    for blocks in (model.dense, model.moe):
        if blocks is not None:
            x_BTD, routing = lax.scan(lambda x, b: b(x, turn, everywhere), x_BTD, blocks)
            chosen_LXK = chosen_LXK if routing is None else routing.experts_XK
    return chosen_LXK


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


def table(
    config: Config, node: int, local: int, routers: Iterator[tuple[str, jax.Array]]
) -> Iterator[str]:
    sizes = Sizes(1, 1, node, local)
    each = bytes_of_copy(config)
    yield "| router | max / mean load | flat: copies | KiB | limited: copies | KiB | ratio |"
    yield "|---|---|---|---|---|---|---|"
    for name, experts in routers:
        experts = experts.reshape(node, local, *experts.shape[1:])
        load = np.bincount(np.asarray(experts).ravel(), minlength=config.model.moe.routed_experts)
        row = [name, f"{load.max() / load.mean():.2f}"]
        copies = []
        for transport in ("all_to_all", "node_limited"):
            laid = replace(config, parallel=Parallel(node=node, local=local, transport=transport))
            copies.append(leaving(config.model.moe, hops_of(laid, sizes)[0], experts))
            row += [f"{copies[-1]:.2f}", f"{copies[-1] * each / 1024:.2f}"]
        yield "| " + " | ".join([*row, f"{copies[0] / copies[1]:.2f}"]) + " |"


@exits_cleanly
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", nargs="?", default="configs/deepseek_v3.py")
    parser.add_argument("--workdir", metavar="DIR", help="of a run: its own routers and shape")
    parser.add_bindings()
    parser.add_argument("--node", type=int, default=8)
    parser.add_argument("--local", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="a device")
    args = parser.parse_args()
    devices = args.node * args.local
    if args.workdir:
        trained = from_workdir(args.workdir, print)
        config = apply(trained.config, args.set)
        routers = trained_routers(trained, devices, args.tokens)
    else:
        config = apply(load_config(args.config), args.set)
        routers = random_routers(config.model.moe, devices, args.tokens)
    print(f"{args.node} nodes of {args.local} devices, {args.tokens} tokens each;", end=" ")
    print("between nodes, a token:\n")
    for line in table(config, args.node, args.local, routers):
        print(line)


if __name__ == "__main__":
    main()
