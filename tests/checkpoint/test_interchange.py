"""The commands: a workdir from a checkpoint of the hub, and the way back."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import train
from dsv3.checkpoint import exporting, huggingface
from dsv3.checkpoint.importing import HUB
from dsv3.checkpoint.safetensors_file import read_header
from dsv3.checkpoint.store import Store
from dsv3.checkpoint.trained import from_workdir, restore
from dsv3.checkpoint.weights import INDEX
from dsv3.data.tokenizer import SPECIAL_TOKENS, ready_made
from dsv3.errors import CheckpointError, MisfitError
from dsv3.parallel.mesh import on_this_platform
from dsv3.training import state
from tests.checkpoint.folders import (
    GOLDEN,
    assert_same_tensors,
    edit_config,
    edit_tensors,
    refusal,
    rewrite,
    stored,
)
from tests.checkpoint.states import fails


def run(*arguments: object) -> None:
    huggingface.main([str(a) for a in arguments])


def test_import_makes_a_workdir(sharded, tmp_path, capsys):
    (sharded / "tokenizer.json").write_text('{"as": "it is"}')
    workdir = tmp_path / "runs" / "imported"
    run("import", "--hf", sharded, "--workdir", workdir)
    assert "3 layers" in capsys.readouterr().out
    assert (workdir / "tokenizer.json").read_text() == '{"as": "it is"}'
    config, model = huggingface.load(sharded)
    trained = from_workdir(workdir, warn=pytest.fail)
    assert trained.config.model == on_this_platform(config).model
    both = jax.tree.leaves(trained.model), jax.tree.leaves(model)
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert [p.name for p in workdir.parent.iterdir()] == ["imported"]


@pytest.mark.parametrize("there", ["file", "folder"])
def test_import_keeps_what_is_there(folder, tmp_path, capsys, there):
    workdir = tmp_path / "run"
    mine = workdir if there == "file" else workdir / "config.gin"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run("import", "--hf", folder, "--workdir", workdir)
    assert ended.value.code == 2
    assert ("no folder" if there == "file" else "not empty") in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_failed_import_leaves_nothing(folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as ended:
        run("import", "--hf", folder, "--workdir", tmp_path / "runs" / "imported")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run("ixport")
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- and back ----------------------------------------------------------------------------------


def imported(folder, tmp_path):
    run("import", "--hf", folder, "--workdir", tmp_path / "workdir")
    return tmp_path / "workdir"


@pytest.mark.parametrize(
    ("case", "how"),
    [("mtp_sharded", ["--dtype", "float32"]), ("bf16", []), ("fp8", ["--fp8"])],
)
def test_import_and_export_and_import_is_bit_exact(tmp_path, case, how):
    first, out = imported(GOLDEN / case, tmp_path), tmp_path / "out"
    run("export", "--workdir", first, "--out", out, *how)
    assert_same_tensors(GOLDEN / case, out)
    second = tmp_path / "second"
    run("import", "--hf", out, "--workdir", second)
    one, other = (from_workdir(workdir, pytest.fail) for workdir in (first, second))
    assert one.config.model == other.config.model
    jax.tree.map(np.testing.assert_array_equal, one.model, other.model)


def test_an_import_has_the_files_as_they_came(tmp_path):
    workdir = imported(GOLDEN / "fp8", tmp_path)
    for file in (GOLDEN / "fp8").iterdir():
        assert (workdir / HUB / file.name).read_bytes() == file.read_bytes()


def test_a_flipped_bit_in_an_import_is_found_by_whoever_reads_it(tmp_path):
    workdir = imported(GOLDEN / "fp8", tmp_path)
    store = Store(workdir / "checkpoints", 3, pytest.fail)
    for file in (workdir / HUB).iterdir():
        sound = file.read_bytes()
        for place in (0, len(sound) // 3, len(sound) - 1):
            harmed = bytearray(sound)
            harmed[place] ^= 128
            file.write_bytes(harmed)
            for read in (
                lambda: exporting.of_workdir(workdir, pytest.fail),
                lambda: from_workdir(workdir, pytest.fail),
                lambda: restore(on_this_platform(huggingface.load(GOLDEN / "fp8")[0]), store),
            ):
                with pytest.raises(CheckpointError, match=r"hub is damaged: .*; import it into"):
                    read()
        file.write_bytes(sound)
    (workdir / HUB / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"hub is damaged: {INDEX} is missing"):
        from_workdir(workdir, pytest.fail)
    shutil.rmtree(workdir / HUB)
    with pytest.raises(CheckpointError, match="hub is gone, with which this run begins"):
        restore(on_this_platform(huggingface.load(GOLDEN / "fp8")[0]), store)


DOWN = "model.layers.1.mlp.experts.0.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda t: t[DOWN].view(np.uint8).__setitem__((3, 5), 0xFF), f"{DOWN} holds NaN"),
        (lambda t: t[f"{DOWN}_scale_inv"].fill(0), f"{DOWN}_scale_inv holds 0.0, no positive"),
    ],
)
def test_numbers_that_are_none_are_not_imported(fp8_folder, tmp_path, edit, fault):
    rewrite(fp8_folder, edit)
    with pytest.raises(CheckpointError, match=fault):
        huggingface.import_checkpoint(fp8_folder, tmp_path / "workdir")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_files_are_as_large_as_allowed_and_indexed(tmp_path):
    out = tmp_path / "out"
    run("export", "--hf", GOLDEN / "mtp_sharded", "--out", out, "--shard-gb", 5e-5)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    places = json.loads((out / INDEX).read_text())
    sizes = {}
    for file in files:
        tensors = read_header(file)
        assert tensors.keys() == {n for n, at in places["weight_map"].items() if at == file.name}
        sizes |= {name: tensor.nbytes for name, tensor in tensors.items()}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 50_000
    assert places["metadata"]["total_size"] == sum(sizes.values())
    huggingface.load(out)


def test_training_begins_from_an_import(tmp_path):
    workdir = imported(GOLDEN / "groups", tmp_path)
    trained = from_workdir(workdir, pytest.fail)
    store = Store(workdir / "checkpoints", 3, pytest.fail)
    begun = restore(trained.config, store)
    assert begun.step == 0 and begun.extra["loader"] is None
    fresh = state.from_model(trained.config, trained.model)
    assert jax.tree.structure(begun.state) == jax.tree.structure(fresh)
    jax.tree.map(np.testing.assert_array_equal, begun.state, fresh)
    store.save(7, begun.state, {})
    assert restore(trained.config, store).step == 7
    jax.tree.map(np.testing.assert_array_equal, restore(trained.config, store).state, begun.state)


def test_an_import_of_another_model_is_named(tmp_path):
    workdir = imported(GOLDEN / "groups", tmp_path)
    text = (workdir / "config.gin").read_text()
    (workdir / "config.gin").write_text(f"{text}model.width = 48\n")
    with pytest.raises(MisfitError, match=r"hub does not fit this configuration: \w") as raised:
        from_workdir(workdir, pytest.fail)
    assert raised.value.extra["config"] == text


def test_the_average_is_exported_where_there_is_one(tmp_path, capsys):
    workdir = imported(GOLDEN / "fp8", tmp_path)
    with pytest.raises(SystemExit):
        run("export", "--workdir", workdir, "--out", tmp_path / "out", "--ema")
    assert "keeps no average" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="was not trained: it has no average"):
        from_workdir(workdir, pytest.fail, ema=True)
    config = from_workdir(workdir, pytest.fail).config
    store = Store(workdir / "checkpoints", 3, pytest.fail)
    begun = restore(config, store).state
    halved = dataclasses.replace(begun, ema=jax.tree.map(lambda x: x / 2, begun.ema))
    store.save(3, halved, {})
    run("export", "--workdir", workdir, "--out", tmp_path / "live", "--dtype", "float32")
    run("export", "--workdir", workdir, "--out", tmp_path / "ema", "--dtype", "float32", "--ema")
    live, average = stored(tmp_path / "live"), stored(tmp_path / "ema")
    assert live.keys() == average.keys()
    for name in live:
        share = 1 if name.endswith("bias") else 2  # it is moved, not averaged
        np.testing.assert_array_equal(live[name].read() / share, average[name].read(), name)
    with pytest.raises(SystemExit):
        run("export", "--hf", GOLDEN / "fp8", "--out", tmp_path / "x", "--ema")
    assert "--ema belongs to --workdir" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["file", "folder"])
def test_export_keeps_what_is_there(folder, tmp_path, capsys, there):
    out = tmp_path / "out"
    mine = out if there == "file" else out / "config.json"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        run("export", "--hf", folder, "--out", out)
    assert ended.value.code == 2
    assert ("no folder" if there == "file" else "not empty") in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_errors_name_the_folder_that_was_asked_for(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, named in (
        (tmp_path / "link", f"{tmp_path / 'link'} is no folder"),
        ("/dev/null", "/dev/null is no folder"),
        ("", "--out is empty"),
        ("/dev/null/x", "/dev/null: File exists"),
    ):
        with pytest.raises(SystemExit):
            run("export", "--hf", folder, "--out", out)
        assert named in capsys.readouterr().err
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", fails(full))
    for command, option in (("export", "--out"), ("import", "--workdir")):
        with pytest.raises(SystemExit):
            run(command, "--hf", folder, option, tmp_path / "new")
        error = capsys.readouterr().err
        assert f"{tmp_path / 'new'}: No space left" in error
        assert [path.name for path in tmp_path.iterdir() if ".part" in path.name] == []


def test_a_failed_export_leaves_nothing(tmp_path):
    source = exporting.of_folder(GOLDEN / "mtp_sharded")

    def fails(piece):
        if piece.tensor == "model.norm.weight":
            raise CheckpointError("torn")
        return source.read(piece)

    with pytest.raises(CheckpointError, match="torn"):
        exporting.export(dataclasses.replace(source, read=fails), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_wants_a_run_with_a_checkpoint_and_room(tmp_path, capsys, monkeypatch):
    def refusal(*arguments):
        with pytest.raises(SystemExit) as ended:
            run("export", *arguments, "--out", tmp_path / "out")
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return error

    assert "is no run: it has no config.gin" in refusal("--workdir", tmp_path)
    (tmp_path / "config.gin").write_text("")
    assert "no checkpoint in" in refusal("--workdir", tmp_path)
    groups = ("--hf", GOLDEN / "groups")
    for size in ("0", "nan", "inf", "1e300"):
        assert f"--shard-gb {float(size)} must" in refusal(*groups, "--shard-gb", size)
    assert "invalid choice: 'float8'" in refusal(*groups, "--dtype", "float8")
    assert "required" in refusal()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "has no room for 1 MB" in refusal(*groups)


# --- what servers read -------------------------------------------------------------------------


def with_tokenizer(folder, tmp_path, definition):
    workdir = imported(folder, tmp_path)
    (workdir / "tokenizer.json").write_text(definition)
    return workdir


def test_a_tokenizer_comes_with_what_servers_read(tmp_path):
    edit_config(folder := wide_vocabulary(tmp_path), vocab_size=272)
    workdir = with_tokenizer(folder, tmp_path, ready_made("bytes"))
    run("export", "--workdir", workdir, "--out", tmp_path / "out")
    read = {p.name: json.loads(p.read_text("utf-8")) for p in (tmp_path / "out").glob("*.json")}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert ids.items() <= read["config.json"].items()
    assert read["generation_config.json"] == ids
    said = read["tokenizer_config.json"]
    assert said["eos_token"] == SPECIAL_TOKENS["eos"] and said["tokenizer_class"]
    assert said["added_tokens_decoder"]["3"]["content"] == SPECIAL_TOKENS["fim_hole"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == ready_made("bytes")

    (tmp_path / "out" / "generation_config.json").write_text('{"temperature": 0.3}')
    run("import", "--hf", tmp_path / "out", "--workdir", tmp_path / "second")
    run("export", "--workdir", tmp_path / "second", "--out", tmp_path / "third")
    assert (tmp_path / "third" / "generation_config.json").read_text() == '{"temperature": 0.3}'


def test_ids_and_files_go_through_an_import_without_a_tokenizer(folder, tmp_path):
    edit_config(folder, bos_token_id=11, eos_token_id=[12, 13], pad_token_id=14)
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    run("export", "--workdir", imported(folder, tmp_path), "--out", tmp_path / "out")
    run("export", "--hf", folder, "--out", tmp_path / "converted")
    for out in (tmp_path / "out", tmp_path / "converted"):
        said = json.loads((out / "config.json").read_text())
        ids = {name: value for name, value in said.items() if name.endswith("_token_id")}
        assert ids == {"bos_token_id": 11, "eos_token_id": [12, 13], "pad_token_id": 14}
        assert (out / "generation_config.json").read_text() == '{"temperature": 0.3}'
    exporting.export(exporting.of_model(*huggingface.load(folder)), tmp_path / "model")
    assert "_token_id" not in (tmp_path / "model" / "config.json").read_text()
    edit_config(folder, eos_token_id="</s>")
    assert "eos_token_id = '</s>' is no id" in refusal(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "model.safetensors", "config.json"])
def test_what_is_no_file_of_the_folder_is_neither_copied_nor_waited_for(folder, tmp_path, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        huggingface.import_checkpoint(folder, tmp_path / "workdir")
    if name == "chat_template.jinja":
        (folder / name).unlink()
        (folder / name).symlink_to("/etc/hostname")
        with pytest.raises(CheckpointError, match=f"{name} is a link that leads outside"):
            exporting.export(exporting.of_folder(folder), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_training_on_with_another_tokenizer_is_refused(tmp_path, capsys):
    edit_config(folder := wide_vocabulary(tmp_path), vocab_size=272)
    mine = json.dumps(json.loads(ready_made("bytes")))
    (folder / "tokenizer.json").write_text(mine)
    workdir, corpus = imported(folder, tmp_path), tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"{i}: " + "some text to read " * 50)
    with pytest.raises(SystemExit) as ended:
        train.main([
            "configs/tiny.py", "--workdir", str(workdir), "--bindings", str(workdir / "config.gin"),
            "--set", f"data.corpus='{corpus}'", "--set", f"data.cache='{tmp_path / 'cache'}'",
            "--set", "data.tokenizer='bytes'",
        ])  # fmt: skip
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: data.tokenizer = 'bytes' is not {workdir / 'tokenizer.json'}")
    assert (workdir / "tokenizer.json").read_text() == mine


def wide_vocabulary(tmp_path):
    """A checkpoint with room for the ids of the bytes."""
    folder = Path(shutil.copytree(GOLDEN / "groups", tmp_path / "wide"))

    def edit(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = np.resize(tensors[name], (272, 32))

    edit_tensors(folder, edit)
    return folder


@pytest.mark.parametrize(
    ("definition", "named"),
    [
        (ready_made("bytes"), "has 264 ids, more than model.vocab = 64"),
        ('{"added_tokens": [5]}', "is no tokenizer.json"),
        ("{", "is no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, capsys, definition, named):
    workdir = with_tokenizer(GOLDEN / "groups", tmp_path, definition)
    with pytest.raises(SystemExit):
        run("export", "--workdir", workdir, "--out", tmp_path / "out")
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
