"""Choosing the next token from logits.

A sampler is frozen and hashable, static to `jax.jit`, and has two halves: `probabilities` says with
what chance each token is chosen, `draw` chooses by them. Called, it does one after the other;
speculative decoding stands between the two. Every row draws from its own key, so what it gets does
not depend on the rows beside it.

    Greedy()                               the most likely token; ties go to the lower id
    Random(temperature, top_k, top_p)      p ∝ exp(logits / temperature), cut to the `top_k` most
                                           likely tokens, then to the fewest of these that together
                                           hold at least `top_p` of what is left (the nucleus)

Ranks, not thresholds, make the cuts: exactly `top_k` tokens stay when logits tie, and the first
rank always. Temperatures are those that FP32 holds; toward the least of them Random becomes greedy.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from dsv3.errors import ConfigError

TINY = float(jnp.finfo(jnp.float32).tiny)  # below it FP32 computes with zeros


class Sampler(ABC):
    """The contract; see the module docstring."""

    @abstractmethod
    def probabilities(self, logits_BV: Array) -> Array:
        """float32 p_BV, summing to 1 over V, zero for a token that is never chosen."""

    @abstractmethod
    def draw(self, keys_B: Array, p_BV: Array) -> Array:
        """int32 token_B by probabilities, which need not sum to 1."""

    def __call__(self, keys_B: Array, logits_BV: Array) -> Array:
        return self.draw(keys_B, self.probabilities(logits_BV))


@dataclass(frozen=True)
class Greedy(Sampler):
    """token_B = argmax of logits_BV; the keys are not used."""

    def probabilities(self, logits_BV: Array) -> Array:
        return jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])

    def draw(self, keys_B: Array, p_BV: Array) -> Array:
        return jnp.argmax(p_BV, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Random(Sampler):
    """A draw for each row; raises ConfigError for a temperature or cut that cannot be."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not TINY <= self.temperature < math.inf:
            raise ConfigError(f"temperature = {self.temperature} must be finite, and at least "
                              f"{TINY:.3g}; 0 is greedy")  # fmt: skip
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p} must lie above 0 and at most at 1")

    def probabilities(self, logits_BV: Array) -> Array:
        logits_BV = logits_BV.astype(jnp.float32)
        if self.top_k is None and self.top_p is None:  # nothing to sort for
            above_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
            return jax.nn.softmax(above_BV / self.temperature, axis=-1)
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True)
        ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        p_BV = jax.nn.softmax(self.cut(ranked_BV), axis=-1)
        return jnp.take_along_axis(p_BV, jnp.argsort(order_BV, axis=-1), axis=-1)

    def draw(self, keys_B: Array, p_BV: Array) -> Array:
        return jax.vmap(jax.random.categorical)(keys_B, jnp.log(p_BV)).astype(jnp.int32)

    def cut(self, ranked_BV: Array) -> Array:
        """Logits in descending order, over the temperature, -inf where a cut drops the token."""
        ranked_BV = (ranked_BV - ranked_BV[:, :1]) / self.temperature
        if self.top_k is not None:
            kept_V = jnp.arange(ranked_BV.shape[1]) < min(self.top_k, ranked_BV.shape[1])
            ranked_BV = jnp.where(kept_V[None], ranked_BV, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            p_BV = jax.nn.softmax(ranked_BV, axis=-1)
            before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
            ranked_BV = jnp.where(before_BV < max(self.top_p, TINY), ranked_BV, -jnp.inf)
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
