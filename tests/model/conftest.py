"""Small models whose sizes all differ, filled by numpy: compiling an init would cost more."""

import jax
import numpy as np
import pytest

from dsv3.config import AuxFree, Mla, Model, Moe

SMALL = Model(
    vocab=31,
    width=16,
    layers=3,
    dense_layers=1,
    dense_width=20,
    mla=Mla(heads=2, query_latent=10, kv_latent=9, nope_dim=4, rope_dim=6, value_dim=5),
    moe=Moe(
        routed_experts=8,
        shared_experts=2,
        experts_per_token=3,
        groups=4,
        groups_per_token=2,
        expert_width=7,
        block=4,
        balance=AuxFree(sequence_alpha=0.01),
    ),
    mtp_depths=2,
)


@pytest.fixture(scope="session")
def small() -> Model:
    return SMALL


@pytest.fixture(scope="session")
def fill():
    """fill(make, seed): the module `make(key)` with weights of a size that keeps activations near
    1, so that a wrong term shows; gains around 1, router biases of both signs."""
    return _fill


def _fill(make, seed: int = 0):
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=abstract.shape)
        if ".gain" in name:
            noise = 1 + 0.3 * noise
        elif ".bias" in name:
            noise = 0.2 * noise
        elif ".table" not in name:
            noise = noise * abstract.shape[-2] ** -0.5
        return jax.numpy.asarray(noise, abstract.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(make, jax.random.key(0)))
