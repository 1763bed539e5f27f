"""A random model of bytes, with everything it takes to read text; shared by the tests here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3.config import Mla, Model, Moe
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.evaluation.harness import Reader
from dsv3.model.transformer import Transformer

MODEL = Model(
    vocab=300, width=16, layers=2, dense_width=16, mtp_depths=0,
    mla=Mla(heads=1, query_latent=None, kv_latent=8, nope_dim=8, rope_dim=8, value_dim=8),
    moe=Moe(routed_experts=4, experts_per_token=2, groups=1, groups_per_token=1, expert_width=16,
            block=16),
)  # fmt: skip


@functools.cache
def reader(context: int = 100) -> Reader:
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), MODEL))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), abstract)
    return Reader(model, Tokenizer(ready_made("bytes"), "bytes"), context)


@functools.cache
def whole():
    """log-softmax of the logits [1, T, V] at every position, the plain way."""
    return jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens).logits_BTV))


def log_p(tokens: list[int], first: int) -> list[float]:
    """log p of each of tokens[first:], by a forward pass over all of them in FP32."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    found = np.asarray(whole()(reader().model, padded))[0]
    return [float(found[i - 1, tokens[i]]) for i in range(first, len(tokens))]
