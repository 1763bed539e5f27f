"""What FP8 and its variants do to gradients on their way back, at trained weights.

    python train.py configs/tiny.py --workdir runs/fp8 --set model.dot=fp8
    python -m benchmarks.gradient_error --workdir runs/fp8

Takes the weights of a run and the last sequences of its data, and computes the gradients of the
main loss twice: by a variant, and with the variant's forward pass but a backward pass in FP32, from
the same cached activations and the same quantised weights. So neither the forward pass nor a token
that changed its expert is in the difference, only what the variant does to gradients going back.

Three losses: the mean over tokens, and two whose tokens weigh 10^u, u uniform in [-6, 0] and in
[-12, 0], because App. B.2 suspects that block-wise groups fail where tokens' gradients differ much
in size. Printed are, for each, the relative error of all weights' gradients together (Frobenius),
that of the gradient at the embeddings for the median token, and for how many of the tokens it is
larger than the report's.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from dsv3.checkpoint.trained import Trained, from_workdir
from dsv3.cli import Parser
from dsv3.config import Fp8Dot
from dsv3.data.loader import Loader
from dsv3.data.prepare import prepare
from dsv3.errors import exits_cleanly
from dsv3.model.transformer import Transformer
from dsv3.numerics.dot import PlainDot
from dsv3.numerics.fp8 import Quantized, dequantize, quantize
from dsv3.numerics.fp8_dot import Fp8Rule
from dsv3.numerics.rule import PlainWire
from dsv3.training.losses import head_loss
from dsv3.training.state import merge, split

VARIANTS = {
    "report": Fp8Dot(),
    "power-of-two scales": Fp8Dot(scales="power_of_two"),
    "E5M2 gradients": Fp8Dot(gradient_format="e5m2"),
    "block-wise gradients": Fp8Dot(gradient_groups="block"),
    "one scale a tensor": Fp8Dot(groups="tensor"),
}


DECADES = (0, 6, 12)  # over which the weights of tokens are spread


class ExactBackward(Fp8Rule):
    """An FP8 rule whose gradients are not rounded: FP32 products of what it has quantised."""

    @property
    def gradient_wire(self) -> PlainWire:
        return PlainWire()

    def linear(self, x_XI, ws):
        return _exact(self, x_XI, ws, None)

    def grouped(self, x_PI, ws, expert_Z):
        return _exact(self, x_PI, tuple(ws), expert_Z)


def _multiply(rule, x, ws, expert_Z):
    return rule.linear(x, ws) if expert_Z is None else rule.grouped(x, ws, expert_Z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(rule: ExactBackward, x, ws, expert_Z):
    return _multiply(Fp8Rule(**vars(rule)), x, ws, expert_Z)


def _exact_forward(rule, x, ws, expert_Z):
    return _exact(rule, x, ws, expert_Z), (rule.keep(x), ws, expert_Z)


def _exact_backward(rule, residuals, dy):
    cached, ws, expert_Z = residuals
    ws = tuple(dequantize(quantize(w, *rule.weight)) for w in ws)
    multiply = functools.partial(_multiply, PlainDot(), expert_Z=expert_Z)
    x = rule.cached(cached, jnp.float32)
    x = dequantize(x) if isinstance(x, Quantized) else x
    dx, dws = jax.vjp(multiply, x, ws)[1](dy)
    return rule.gradient_of(cached, dx), dws, None


_exact.defvjp(_exact_forward, _exact_backward)


def gradients(trained: Trained, rule: type[Fp8Rule], variant: Fp8Dot):
    """Jitted (x_BTD, tokens [B, T + 1], weight_X) to gradients of the weights and of x."""
    config = replace(trained.config.model, dot=variant)
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    for _, module in nnx.iter_modules(model):
        if isinstance(getattr(module, "dot", None), Fp8Rule):
            module.dot = rule(**vars(module.dot))  # pyrefly: ignore
    graph, _, _ = split(model)
    _, params, router_bias = split(trained.model)

    def loss(params, x_BTD, tokens_BS, weight_X):
        model = merge(graph, params, router_bias)
        model.mtp = nnx.List([])
        setattr(model, "embedding", lambda tokens, dtype: x_BTD)  # noqa: B010
        h_BTD = model.hidden(tokens_BS[:, :-1]).main_BTD
        h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
        return head_loss(h_XD, model.head.w[...], tokens_BS[:, 1:].reshape(-1), weight_X)

    return functools.partial(jax.jit(jax.grad(loss, argnums=(0, 1))), params)


def errors(got, wanted) -> tuple[float, np.ndarray]:
    """Relative: of all weights together, and of each token [X]."""
    (params, dx_BTD), (exact, exact_BTD) = got, wanted
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(exact), strict=True))
    squares = sum(float(jnp.sum((g - w) ** 2)) for g, w in pairs)
    of_weights = (squares / sum(float(jnp.sum(w**2)) for _, w in pairs)) ** 0.5
    apart_BT = jnp.linalg.norm(dx_BTD - exact_BTD, axis=-1) / jnp.linalg.norm(exact_BTD, axis=-1)
    return of_weights, np.ravel(apart_BT)


def rows(trained: Trained, tokens_BS: Array) -> Iterator[str]:
    """The lines of a Markdown table."""
    x_BTD = trained.model.embedding(tokens_BS[:, :-1])
    draw = np.random.default_rng(0).uniform(-1, 0, x_BTD.shape[0] * x_BTD.shape[1])
    weightings = [
        jnp.asarray(w / w.sum(), jnp.float32) for w in (10.0 ** (draw * d) for d in DECADES)
    ]
    yield (
        "| | " + " | ".join(f"{d} decades: weights | median token | worse" for d in DECADES) + " |"
    )
    yield "|---" * (1 + 3 * len(DECADES)) + "|"
    report = []
    for name, variant in VARIANTS.items():
        ours, exact = (gradients(trained, rule, variant) for rule in (Fp8Rule, ExactBackward))
        found = [errors(*(f(x_BTD, tokens_BS, w_X) for f in (ours, exact))) for w_X in weightings]
        report = report or found
        cells = [
            f"{of_weights:.2%} | {np.nanmedian(of_X):.2%} | {np.mean(of_X > usual_X):.0%}"
            for (of_weights, of_X), (_, usual_X) in zip(found, report, strict=True)
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--workdir", required=True, help="of a run in FP8 or BF16")
    parser.add_argument("--sequences", type=int, default=8)
    options = parser.parse_args(arguments)
    trained = from_workdir(options.workdir, print)
    prepared = prepare(trained.config)
    loader = Loader(prepared, trained.config)
    last = len(prepared.train_shards) - options.sequences
    loader.restore({**loader.state(), "position": last})
    tokens_BS = jnp.asarray(loader.next_batch(options.sequences).tokens)
    for line in rows(trained, tokens_BS):
        print(line, flush=True)


if __name__ == "__main__":
    main()
