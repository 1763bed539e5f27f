"""Choosing the next token from logits.

A sampler is a frozen, hashable callable `sampler(keys_B, logits_BV) -> token_B`, static to
`jax.jit`. Every row draws from its own key, so what it gets does not depend on the rows beside it.

    Greedy()                               the most likely token; ties go to the lower id
    Random(temperature, top_k, top_p)      p ∝ exp(logits / temperature), cut to the `top_k` most
                                           likely tokens, then to the fewest of these that together
                                           hold at least `top_p` of what is left (the nucleus)

Ranks, not thresholds, make the cuts: exactly `top_k` tokens stay when logits tie, and at least one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.errors import ConfigError

Sampler = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Greedy:
    """token_B = argmax of logits_BV; the keys are not used."""

    def __call__(self, keys_B: Array, logits_BV: Array) -> Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Random:
    """A draw for each row; raises ConfigError for a temperature or cut that cannot be."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature} must be positive and finite")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must lie above 0 and at most at 1")

    def __call__(self, keys_B: Array, logits_BV: Array) -> Array:
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
        ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1).astype(jnp.float32)
        rank_B = jax.vmap(jax.random.categorical)(keys_B, self.cut(ranked_BV))
        return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def cut(self, ranked_BV: Array) -> Array:
        """Logits in descending order, over the temperature, -inf where a cut drops the token."""
        ranked_BV = (ranked_BV - ranked_BV[:, :1]) / self.temperature
        if self.top_k is not None:
            kept_V = jnp.arange(ranked_BV.shape[1]) < self.top_k
            ranked_BV = jnp.where(kept_V[None], ranked_BV, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            p_BV = jax.nn.softmax(ranked_BV, axis=-1)
            before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
            ranked_BV = jnp.where(before_BV < self.top_p, ranked_BV, -jnp.inf)
        return ranked_BV


def sampler_of(temperature: float, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """Greedy at temperature 0, else Random. Raises ConfigError for values that cannot be, and for
    cuts at temperature 0, where they would change nothing."""
    if temperature != 0:
        return Random(temperature, top_k, top_p)
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if value is not None:
            raise ConfigError(f"{name} = {value} cuts nothing at temperature 0; set a temperature")
    return Greedy()
