"""Weights in FP8: dequantised as transformers wants them, and written again bit for bit."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dsv3.checkpoint import exporting, hub, hub_config, huggingface
from dsv3.checkpoint.folder import Folder
from dsv3.checkpoint.hub_config import DEEPSEEK_FP8
from dsv3.checkpoint.manifest import name_leaves
from dsv3.checkpoint.safetensors_file import METADATA
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.trained import restore
from dsv3.errors import CheckpointError
from dsv3.evaluation.logits import logits
from tests.checkpoint.folders import (
    GOLDEN,
    assert_same_tensors,
    golden,
    in_hub_layout,
    rewrite,
    save,
    stored,
)

E4M3 = ml_dtypes.float8_e4m3fn


def spread(scales: np.ndarray, shape: tuple[int, ...], block=(128, 128)) -> np.ndarray:
    rows, columns = (np.arange(n) // b for n, b in zip(shape, block, strict=True))
    return scales[rows][:, columns]


def blocks(w: np.ndarray, block) -> np.ndarray:
    """max|w| of each block, slowly."""
    rows, columns = (range(0, n, b) for n, b in zip(w.shape, block, strict=True))
    return np.array([[np.abs(w[i : i + block[0], j : j + block[1]]).max() for j in columns]
                     for i in rows], np.float32)  # fmt: skip


# --- in ----------------------------------------------------------------------------------------


def test_agrees_with_transformers_on_the_dequantised_weights():
    """1e-4 where logits reach 9, as for the other golden files."""
    wanted = golden("fp8")
    _, model = huggingface.load(GOLDEN / "fp8")
    found = logits(model, wanted["tokens"])
    np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=1e-4)
    mtp_BTV = found["mtp_logits"][:, :-1]
    np.testing.assert_allclose(mtp_BTV, wanted["mtp_logits"], rtol=0, atol=1e-4)


def test_is_the_product_with_the_scale_in_fp32_throughout():
    config, model = huggingface.load(GOLDEN / "fp8")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {"float32"}
    files, found = stored(GOLDEN / "fp8"), in_hub_layout(config.model, name_leaves(model))
    partial = 0
    for name, tensor in found.items():
        wanted = files[name].read().astype(np.float32)
        if (scales := files.get(hub.scale_of(name))) is not None:
            wanted = wanted * spread(scales.read(), tensor.shape)
            partial += any(n > 128 and n % 128 for n in tensor.shape)
        np.testing.assert_array_equal(tensor, wanted, name)
    assert partial > 20


def test_another_precision_is_rounded_from_that():
    exact = jax.tree.leaves(huggingface.load(GOLDEN / "fp8")[1])
    rounded = jax.tree.leaves(huggingface.load(GOLDEN / "fp8", dtype="bfloat16")[1])
    for one, other in zip(exact, rounded, strict=True):
        np.testing.assert_array_equal(one.astype(other.dtype), other)


# --- out ---------------------------------------------------------------------------------------


def requantised(folder: Path, scales_of, **said) -> Path:
    """The golden checkpoint with the scales that `scales_of(max|W| of blocks)` gives."""
    block = said.get("weight_block_size", [128, 128])

    def edit(tensors):
        for name in [n for n in tensors if hub.QUANTIZED.fullmatch(n)]:
            old = tensors[hub.scale_of(name)]
            w = tensors[name].astype(np.float32) * spread(old, tensors[name].shape)
            scales = scales_of(blocks(w, block)).astype(np.float32)
            tensors[hub.scale_of(name)] = scales
            tensors[name] = (w / spread(scales, w.shape, block)).clip(-448, 448).astype(E4M3)

    rewrite(folder, edit)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = DEEPSEEK_FP8 | said
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def power_of_two(amax):
    return 2.0 ** np.ceil(np.log2(amax / 448))


def remembered(amax):
    return amax / 448 * np.random.default_rng(0).uniform(1, 3, amax.shape)


@pytest.mark.parametrize(
    ("scales_of", "said"),
    [
        (lambda amax: np.maximum(amax, 1e-4) / 448, {}),
        (power_of_two, {"scale_fmt": "ue8m0"}),
        (remembered, {}),
        (lambda amax: amax / 240, {"weight_block_size": [64, 96]}),
    ],
)
def test_whatever_made_the_scales_the_bytes_come_back(fp8_folder, tmp_path, scales_of, said):
    requantised(fp8_folder, scales_of, **said)
    exporting.export(exporting.of_folder(fp8_folder), tmp_path / "out", fp8=True)
    assert_same_tensors(fp8_folder, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["quantization_config"] == DEEPSEEK_FP8 | said


def test_tensors_that_were_not_in_fp8_do_not_become_it(fp8_folder, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"

    def widen(tensors):
        scales = tensors.pop(hub.scale_of(name))
        w = tensors[name].astype(np.float32) * spread(scales, tensors[name].shape)
        tensors[name] = w.astype(ml_dtypes.bfloat16)

    rewrite(fp8_folder, widen)
    exporting.export(exporting.of_folder(fp8_folder), tmp_path / "out", fp8=True)
    assert_same_tensors(fp8_folder, tmp_path / "out")


def test_copies_are_written_as_their_main_tensor_whatever_the_folder_has(fp8_folder, tmp_path):
    """An MTP layer without its copies, and a head in FP8."""
    copies = hub.copies(Folder(fp8_folder).config.model)

    def edit(tensors):
        for copy in copies:
            del tensors[copy]
        head = tensors["lm_head.weight"].astype(np.float32)
        grid = tuple(-(-n // 128) for n in head.shape)
        tensors["lm_head.weight"] = head.astype(E4M3)
        tensors[hub.scale_of("lm_head.weight")] = np.ones(grid, np.float32)

    rewrite(fp8_folder, edit)
    exporting.export(exporting.of_folder(fp8_folder), tmp_path / "out", fp8=True)
    found = stored(tmp_path / "out")
    for copy, main in copies.items():
        assert found[copy].dtype == found[main].dtype
        assert found[copy].read().tobytes() == found[main].read().tobytes()
    both = (jax.tree.leaves(huggingface.load(f)[1]) for f in (fp8_folder, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_without_the_scales_they_cannot_be_found_again():
    """Why an export takes them as they are: amax / 448 of w = 448 · s is not s in one of ten."""
    s = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    changed = np.mean(np.float32(448) * s / np.float32(448) != s)
    assert 0.08 < changed < 0.13
    values = np.arange(127, dtype=np.uint8).view(E4M3)
    w = values.astype(np.float32) * s[:, None]
    assert np.array_equal((w / s[:, None]).astype(E4M3), np.broadcast_to(values, w.shape))


def test_what_was_imported_in_fp8_and_trained_is_written_in_the_same_way(fp8_folder, tmp_path):
    said = {"weight_block_size": [64, 96], "scale_fmt": "ue8m0"}
    requantised(fp8_folder, remembered, **said)
    workdir, out = tmp_path / "workdir", tmp_path / "out"
    config = huggingface.import_checkpoint(fp8_folder, workdir)
    store = Store(workdir / "checkpoints", 3, pytest.fail)
    store.save(1, restore(config, store).state, {})
    exporting.export(exporting.of_workdir(workdir, pytest.fail), out, fp8=True)
    fields = json.loads((out / "config.json").read_text())
    assert fields["quantization_config"] == DEEPSEEK_FP8 | said
    before, after = stored(fp8_folder), stored(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    name = "model.layers.0.self_attn.q_a_proj.weight"
    old = before[hub.scale_of(name)].read()
    w = before[name].read().astype(np.float32) * spread(old, before[name].shape, (64, 96))
    fresh = power_of_two(blocks(w, (64, 96)))
    np.testing.assert_array_equal(after[hub.scale_of(name)].read(), fresh)


def half_step(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Half the distance of neighbouring E4M3 numbers at w / scale, times the scale."""
    exponent = np.floor(np.log2(np.maximum(np.abs(w / scales), 2.0**-9)))
    return scales * 2.0 ** (np.maximum(exponent, -6) - 4)


def test_bf16_to_fp8_and_back_is_within_half_a_step(tmp_path):
    bf16, fp8, back = (tmp_path / name for name in ("bf16", "fp8", "back"))
    exporting.export(exporting.of_folder(GOLDEN / "fp8"), bf16)
    exporting.export(exporting.of_folder(bf16), fp8, fp8=True)
    exporting.export(exporting.of_folder(fp8), back)
    assert not any(name.endswith("_scale_inv") for name in stored(back))
    one, quantized, other = stored(bf16), stored(fp8), stored(back)
    for name in one:
        w, again = (t[name].read().astype(np.float64) for t in (one, other))
        if hub.QUANTIZED.fullmatch(name):
            scales = spread(quantized[hub.scale_of(name)].read(), w.shape).astype(np.float64)
            rounding = np.abs(again) * 2.0**-8  # to BF16 at the end
            assert np.all(np.abs(again - w) <= half_step(w, scales) * (1 + 1e-6) + rounding), name
        else:
            np.testing.assert_array_equal(again, w, name)


def test_dequantised_to_bf16_is_the_product_rounded_once(tmp_path):
    exporting.export(exporting.of_folder(GOLDEN / "fp8"), tmp_path / "out", dtype="bfloat16")
    exact, found = Folder(GOLDEN / "fp8").weights, stored(tmp_path / "out")
    for name in exact.headers:
        wanted = exact.read(name).astype(found[name].read().dtype)
        np.testing.assert_array_equal(found[name].read(), wanted, name)


def test_a_block_of_zeros(tmp_path):
    source = exporting.of_folder(GOLDEN / "fp8")
    zeros = dataclasses.replace(
        source, read=lambda piece: np.zeros_like(source.read(piece)), weights=None
    )
    exporting.export(zeros, tmp_path / "out", fp8=True)
    _, model = huggingface.load(tmp_path / "out")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(model))


def test_a_large_tensor_is_the_same_in_one_chunk_or_many(monkeypatch, tmp_path):
    again = dataclasses.replace(exporting.of_folder(GOLDEN / "fp8"), weights=None)
    exporting.export(again, tmp_path / "whole", fp8=True)
    monkeypatch.setattr(exporting, "CHUNK", 160 * 128)
    exporting.export(again, tmp_path / "out", fp8=True)
    assert_same_tensors(tmp_path / "whole", tmp_path / "out")
    monkeypatch.setattr("dsv3.checkpoint.weights.CHUNK_BYTES", 1000)
    found = Folder(tmp_path / "out").weights
    for name, tensor in stored(tmp_path / "out").items():
        if name in found.headers and name not in found.scales:
            np.testing.assert_array_equal(found.read(name), tensor.read())
    save(tmp_path / "again", {n: found.read(n) for n in found.scales}, METADATA)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_written_as_it_is(fp8_folder, tmp_path, value):
    rewrite(fp8_folder, lambda tensors: tensors["model.norm.weight"].__setitem__(2, value))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds a number that is not f"):
        exporting.export(exporting.of_folder(fp8_folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("how", [{"fp8": True}, {"dtype": "float32"}, {}])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 3.4e38])
def test_what_is_no_number_is_refused(tmp_path, how, value):
    sound = exporting.of_folder(GOLDEN / "fp8")
    name = "model.layers.0.mlp.down_proj.weight"

    def harmed(piece):
        w = sound.read(piece)
        if piece.tensor == name:
            w[5, 7] = value
        return w

    source = dataclasses.replace(sound, read=harmed, weights=None)
    if value == 3.4e38:  # a number, but neither in BF16 nor with a power of two as its scale
        if how == {"dtype": "float32"}:
            return exporting.export(source, tmp_path / "out", **how)
        said = {"scale_fmt": "ue8m0"} | DEEPSEEK_FP8
        source = dataclasses.replace(source, quantization=hub_config.Quantization(said))
    with pytest.raises(CheckpointError, match=name):
        exporting.export(source, tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())
