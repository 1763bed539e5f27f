"""The pieces of `benchmarks.decode` on a small model."""

import dataclasses

import jax
import numpy as np

from benchmarks.decode import cached_seconds, random_model, rerun_seconds, write_official
from dsv3.checkpoint import huggingface
from tests.model.conftest import SMALL

MODEL = dataclasses.replace(SMALL, mtp_depths=0)


def test_what_is_written_for_transformers_is_the_model(tmp_path):
    model = random_model(MODEL)
    write_official(model, tmp_path)
    config, loaded = huggingface.load(tmp_path)
    assert dataclasses.replace(config.model, moe=MODEL.moe) == MODEL  # but for block and balance
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_token_is_timed_with_and_without_the_cache():
    model = random_model(MODEL)
    assert cached_seconds(model, 20, "compute", steps=4) > 0
    assert rerun_seconds(model, 20) > 0
