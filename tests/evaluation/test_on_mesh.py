"""What is scored on several devices is what one device scores."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3.config import Config, Parallel, Training
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.evaluation.bits_per_byte import bits_per_byte
from dsv3.evaluation.scoring import Span, score
from dsv3.inference.replicas import routed_loads
from dsv3.model.transformer import Transformer
from dsv3.parallel import mesh as meshes
from dsv3.training.state import on_mesh
from tests.model.conftest import SMALL, _fill

MODEL = dataclasses.replace(SMALL, vocab=300, layers=1, dense_layers=0, mtp_depths=0)
PARALLEL = Parallel(replica=2, local=2)


@pytest.fixture(scope="module")
def models():
    """The same model on four devices, and on one."""
    if jax.device_count() < 4:
        pytest.skip("wants 4 devices")
    config = Config(model=MODEL, training=Training(compute_dtype="float32"), parallel=PARALLEL)
    alone = _fill(lambda key: Transformer(key, MODEL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "WHOLE_BELOW", 150)
        yield on_mesh(config, alone, meshes.build(PARALLEL, jax.devices()[:4])), alone


def test_bits_per_byte(models):
    tokenizer = Tokenizer(ready_made("bytes"), "bytes")
    texts = ["naïve " * 20, "short"]
    ours, single = (bits_per_byte(model, tokenizer, texts, 40) for model in models)
    assert ours[1:] == single[1:]
    np.testing.assert_allclose(ours.bits, single.bits, rtol=1e-6)


def test_scores_of_spans(models):
    """Rows of 64: as many on each device; some spans share a row, and one is long."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 290, n).tolist() for n in (5, 9, 33, 64, 7)]
    spans = [Span(row, first) for row in rows for first in (1, len(row) - 1)]
    spans += [Span(rng.integers(0, 290, 20).tolist(), 19) for _ in range(30)]
    ours, single = (score(model, spans, 64, 290) for model in models)
    assert [s[1:] for s in ours] == [s[1:] for s in single]
    np.testing.assert_allclose([s.nats for s in ours], [s.nats for s in single], rtol=1e-6)


def test_loads(models):
    sequences = [[5, 6, 7], [8], [9] * 20]
    ours, single = (routed_loads(model, sequences) for model in models)
    assert ours.sum() == 24 * SMALL.moe.experts_per_token
    np.testing.assert_array_equal(ours, single)
