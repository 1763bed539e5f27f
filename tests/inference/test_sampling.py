import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.errors import ConfigError
from dsv3.inference.sampling import Greedy, Random, sampler_of

LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))
DRAWS = 20_000


def frequencies(sampler, logits_V=LOGITS, seed=0):
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    tokens = jax.jit(sampler)(keys, jnp.broadcast_to(logits_V, (DRAWS, logits_V.size)))
    assert tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=logits_V.size) / DRAWS


def assert_distributed(sampler, expected, logits_V=LOGITS):
    # five standard deviations of a frequency near 1/2 over DRAWS draws
    np.testing.assert_allclose(frequencies(sampler, logits_V), expected, atol=2.5 / DRAWS**0.5)


def test_greedy_takes_the_most_likely_and_the_lower_of_a_tie():
    logits = jnp.array([[0.0, 3.0, 3.0], [2.0, 1.0, 0.0]])
    assert Greedy()(None, logits).tolist() == [1, 0]


def test_plain_sampling_follows_softmax():
    assert_distributed(Random(), [0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_the_exponent(temperature):
    p = np.exp(np.asarray(LOGITS)) ** (1 / temperature)
    assert_distributed(Random(temperature), p / p.sum())


def test_a_tiny_temperature_is_greedy_and_finite():
    assert_distributed(Random(1e-30), [0, 1, 0, 0, 0])


def test_top_k_keeps_k_and_renormalises():
    assert_distributed(Random(top_k=2), [0, 4 / 7, 0, 3 / 7, 0])
    assert_distributed(Random(top_k=99), [0.1, 0.4, 0.05, 0.3, 0.15])


def test_top_k_keeps_exactly_k_of_equals():
    assert_distributed(Random(top_k=2), [0.5, 0.5, 0, 0], jnp.zeros(4))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, [1]), (0.6, [1, 3]), (0.72, [1, 3, 4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_nucleus(top_p, kept):
    p = np.zeros(5)
    p[kept] = np.exp(np.asarray(LOGITS))[kept]
    assert_distributed(Random(top_p=top_p), p / p.sum())


def test_top_p_counts_what_top_k_left():
    # of 0.4, 0.3, 0.15 renormalised to 0.47, 0.35, 0.18 the first two hold 0.82
    assert_distributed(Random(top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0])


def test_at_the_edge_of_fp32_the_first_rank_stays():
    best = int(jnp.argmax(LOGITS))
    for sampler in (Random(2e-38), Random(top_p=1e-320), Random(2e-38, 3, 1e-320)):
        assert frequencies(sampler)[best] == 1
    assert_distributed(Random(1.0, 99_999_999_999), [0.1, 0.4, 0.05, 0.3, 0.15])


def test_masked_tokens_are_never_drawn():
    logits = LOGITS.at[jnp.array([1, 4])].set(-jnp.inf)
    for sampler in (Random(), Random(5.0), Random(top_p=0.999), Random(top_k=5)):
        assert frequencies(sampler, logits)[[1, 4]].sum() == 0


def test_a_row_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(3), 8)
    logits = jax.random.normal(jax.random.key(4), (8, 50))
    draw = jax.jit(Random(top_p=0.9))
    alone = [draw(keys[i : i + 1], logits[i : i + 1])[0] for i in range(8)]
    assert draw(keys, logits).tolist() == [int(token) for token in alone]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-39}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p"),
        ({"temperature": 0.0, "top_k": 5}, "top_k"),
        ({"temperature": 0.0, "top_p": 0.9}, "top_p"),
    ],
)
def test_impossible_values_are_named(arguments, named):
    with pytest.raises(ConfigError, match=f"^{named} = "):
        sampler_of(**arguments)


def test_temperature_zero_is_greedy():
    assert sampler_of(0.0) == Greedy()
    assert sampler_of(0.7, 3, 0.9) == Random(0.7, 3, 0.9)
