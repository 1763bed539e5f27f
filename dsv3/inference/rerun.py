"""Completing prompts by running the whole sequence again for every new token: the oracle.

It knows no cache and no draft. What lies to the right of a row's last token is not seen, by
causality. A step costs a forward pass over all S positions of the buffer.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv3.inference.decode import TOKEN, keys, row_keys
from dsv3.inference.sampling import Sampler
from dsv3.model.transformer import Transformer
from dsv3.parallel.shard import ALONE


@functools.partial(jax.jit, static_argnames=("vocab", "dtype"))
def last_logits(
    model: Transformer, tokens_BS: Array, length_B: Array, vocab: int, dtype: jnp.dtype | None
) -> Array:
    """float32 [B, vocab]: of the token that follows the first `length_B` of each row."""
    h_BSD = model.hidden(tokens_BS, dtype=dtype).main_BTD
    last_BD = h_BSD[jnp.arange(length_B.size), length_B - 1]
    return model.head(last_BD.astype(jnp.float32))[:, :vocab]


def generate_by_rerunning(
    model: Transformer, prompts: Sequence[Sequence[int]], sampler: Sampler, tokens: int, *,
    vocab: int, seed: int = 0, dtype: jnp.dtype | None = None, size: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """`tokens` new tokens for every prompt, stop tokens or not, as `generate` chooses them with
    this seed. `size` is that of the buffer, where it shall be larger than it must."""
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BS = np.zeros((len(prompts), size or int(length_B.max()) + tokens), np.int32)
    for row, prompt in zip(tokens_BS, prompts, strict=True):
        row[: len(prompt)] = prompt
    each_B = np.arange(len(prompts))
    key_B = row_keys(seed, ALONE, len(prompts))
    draw = jax.jit(sampler)
    for _ in range(tokens):
        logits_BV = last_logits(model, tokens_BS, length_B, vocab, dtype)
        keys_B = keys(key_B, jnp.asarray(length_B)[:, None], TOKEN)[:, 0]
        tokens_BS[each_B, length_B] = draw(keys_B, logits_BV)
        length_B = length_B + 1
    return [
        row[len(prompt) :][:tokens].tolist() for row, prompt in zip(tokens_BS, prompts, strict=True)
    ]
