from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.bindings import operative
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.trained import from_hf, from_workdir
from dsv3.config import Config, Model
from dsv3.data.tokenizer import Tokenizer, ready_made
from dsv3.errors import CheckpointError, DataError
from dsv3.inference.generate import generate
from dsv3.inference.sampling import Greedy
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import on_this_platform
from dsv3.training.state import from_model
from tests.checkpoint.folders import GOLDEN

MODEL = Model(vocab=264, width=8, layers=2, dense_width=8, mtp_depths=1)


def filled(config: Model, value: float) -> Transformer:
    """A model whose every parameter is `value`."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), abstract)


@pytest.fixture(scope="module")
def state():
    """Ones, whose average is twos."""
    config = Config(model=MODEL)
    twos = from_model(config, filled(MODEL, 2.0)).params
    return replace(from_model(config, filled(MODEL, 1.0)), ema=twos)


def run(folder, state, config=None):
    config = config or Config(model=MODEL)
    store = Store(folder / "checkpoints", 2, pytest.fail)
    store.save(5, jax.tree.map(np.zeros_like, state), {})
    store.save(9, state, {})
    (folder / "config.gin").write_text(operative(config))
    Tokenizer(ready_made("bytes"), "bytes").save(folder / "tokenizer.json")
    return folder


def values(model):
    return {value for leaf in name_leaves(model).values() for value in np.unique(leaf).tolist()}


def test_the_newest_checkpoint_or_its_average(tmp_path, state):
    run(tmp_path, state)
    trained = from_workdir(tmp_path, pytest.fail)
    assert trained.config == on_this_platform(Config(model=MODEL))
    assert trained.tokenizer().vocab_size == 264
    assert values(trained.model) == {1.0}
    average = name_leaves(from_workdir(tmp_path, pytest.fail, ema=True).model)
    bias = {name for name in average if name.endswith("router.bias")}
    assert bias and values({name: average[name] for name in bias}) == {1.0}  # has no average
    assert values({name: average[name] for name in average.keys() - bias}) == {2.0}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, state):
    run(tmp_path, state)
    manifest = tmp_path / "checkpoints" / "step-9" / "MANIFEST"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    warnings = []
    assert values(from_workdir(tmp_path, warnings.append).model) == {0.0}
    assert len(warnings) == 1 and "step-9 is damaged" in warnings[0]


def test_without_checkpoint_average_or_fit(tmp_path, state):
    with pytest.raises(CheckpointError, match=r"is no run: it has no config\.gin"):
        from_workdir(tmp_path, pytest.fail)
    (tmp_path / "config.gin").write_text(operative(Config(model=MODEL)))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints yet"):
        from_workdir(tmp_path, pytest.fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.gin"]

    averageless = Config(model=MODEL, training=replace(Config().training, ema_decay=None))
    run(tmp_path, replace(state, ema=None), averageless)
    with pytest.raises(CheckpointError, match=r"keeps no average: training\.ema_decay = None"):
        from_workdir(tmp_path, pytest.fail, ema=True)

    wider = replace(averageless, model=replace(MODEL, width=16))
    (tmp_path / "config.gin").write_text(operative(wider))
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        from_workdir(tmp_path, pytest.fail)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, state):
    small = replace(MODEL, vocab=263)
    config = Config(model=small)
    run(tmp_path, from_model(config, filled(small, 1.0)), config)
    with pytest.raises(DataError, match=r"has 264 ids, more than model\.vocab = 263"):
        from_workdir(tmp_path, pytest.fail).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        from_workdir(tmp_path, pytest.fail).tokenizer()


def test_weights_from_fp8_held_in_bf16_decode_in_bf16_as_those_in_fp32(tmp_path):
    """BF16 products round FP32 weights to the same numbers; all that was not FP8 was BF16."""
    wide, narrow = (from_hf(GOLDEN / "fp8", dtype=dtype).model for dtype in (None, "bfloat16"))
    dtypes = {name: leaf.dtype for name, leaf in name_leaves(narrow).items()}
    assert {dtype.name for name, dtype in dtypes.items() if "router.bias" not in name} == {
        "bfloat16"
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}
    options = {"stop": [1], "vocab": 64, "context": 32, "dtype": jnp.bfloat16}
    ours, theirs = (generate(m, [[3, 4, 5], [6]], Greedy(), 20, **options) for m in (wide, narrow))
    assert ours == theirs
