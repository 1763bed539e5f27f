"""The pieces of `benchmarks.decode` on a small model."""

import dataclasses

from benchmarks.decode import cached_seconds, random_model, rerun_seconds
from tests.model.conftest import SMALL

MODEL = dataclasses.replace(SMALL, mtp_depths=0)


def test_a_token_is_timed_with_and_without_the_cache():
    model = random_model(MODEL)
    assert cached_seconds(model, 20, "compute", steps=4) > 0
    assert rerun_seconds(model, 20) > 0
