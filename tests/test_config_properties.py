"""Arbitrary values in arbitrary fields: a one-line ConfigError, or a model that traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsv3.bindings import apply, operative, parse
from dsv3.config import Config, Mla, Model, Moe, Training
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.training.losses import training_loss
from dsv3.training.schedules import batch_size, learning_rate

BASE = Config(
    model=Model(
        vocab=32, width=16, layers=2, dense_layers=1, dense_width=8, mtp_depths=1,
        mla=Mla(heads=2, query_latent=8, kv_latent=8, nope_dim=4, rope_dim=4, value_dim=4),
        moe=Moe(routed_experts=8, experts_per_token=2, groups=4, groups_per_token=2,
                expert_width=4, block=4),
    ),
    training=Training(sequence_length=8),
)  # fmt: skip
PATHS = [binding.path for binding in parse(operative(BASE))]
NUMBERS = st.one_of(
    st.integers(-2, 12), st.sampled_from([16, 64, 2**40, 0.0, 0.5, 1e-9, -1.0]), st.floats()
)
WORDS = st.sampled_from(["", "none", "bf16", "report", "float32", "aux_loss", "yarn", "constant"])
VALUES = st.one_of(NUMBERS, st.booleans(), st.none(), WORDS, st.just(()), st.tuples(NUMBERS))
SMALL = 4096  # a field above it is legal, but nothing to trace in a test


def traces(config: Config) -> bool:
    """The whole loss and its gradient of `config`, as shapes only."""

    def loss(key):
        model = Transformer(key, config.model)
        tokens_BS = jnp.zeros((2, min(config.training.sequence_length, 16) + 1), jnp.int32)
        return training_loss(model, tokens_BS, jnp.ones(()), jnp.float32)[0]

    return jax.eval_shape(loss, jax.random.key(0)).shape == ()


@given(st.dictionaries(st.sampled_from(PATHS), VALUES, min_size=1, max_size=3))
@example({"model.moe.groups": 3})
@example({"model.mla.rope_dim": 3})
@example({"model.moe.experts_per_token": 8})
def test_any_value_in_any_field_is_a_named_error_or_a_model(values):
    try:
        config = apply(BASE, values)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert any(path.rsplit(".", 1)[-1] in str(error) for path in values), str(error)
        return
    assert apply(Config(), parse(operative(config))) == config
    assert batch_size(config.training, 0) >= 1
    assert learning_rate(config.training, 1, 0.5, np) >= 0
    if all(abs(v) <= SMALL for v in values.values() if isinstance(v, int | float)):
        assert traces(config)


def test_the_property_is_not_empty():
    """Both outcomes are really drawn."""
    assert traces(BASE)
    with pytest.raises(ConfigError, match="groups"):
        apply(BASE, {"model.moe.groups": 3})
