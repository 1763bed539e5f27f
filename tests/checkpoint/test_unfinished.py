"""Folders that are made file by file: interrupted, killed, damaged in between, and gone on with."""

import dataclasses
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dsv3.checkpoint import exporting, huggingface
from dsv3.checkpoint import unfinished as module
from dsv3.checkpoint.importing import HUB
from dsv3.checkpoint.unfinished import LEDGER, unfinished
from dsv3.errors import CheckpointError
from tests.checkpoint.folders import GOLDEN, assert_same_tensors
from tests.checkpoint.states import fails

ROOT = Path(__file__).parents[2]
FILES = {"a": [b"one", b"two"], "sub/b": [b"three"], "sub/c d": [b"four", b"", b"five"]}
WHOLE = {name: b"".join(parts) for name, parts in FILES.items()} | {"note": b"small"}


class Making:
    """Fills a folder with FILES; `taken` says which parts were asked for, and the one of number
    `stop` raises instead."""

    def __init__(self, stop: int | None = None, error: BaseException | None = None):
        self.stop, self.error, self.taken = stop, error, []

    def _parts(self, name):
        for part in FILES[name]:
            if len(self.taken) == self.stop:
                raise self.error or KeyboardInterrupt
            self.taken.append(part)
            yield np.frombuffer(part, np.uint8)

    def __call__(self, folder, made_of="these"):
        said = []
        with unfinished(folder, 20, made_of, lambda *told: said.append(told)) as making:
            (making.path / "note").write_bytes(b"small")
            (making.path / "sub").mkdir(exist_ok=True)
            prints = making.write("writing", {name: self._parts(name) for name in FILES})
        assert {name: file.size for name, file in prints.items()} == {
            name: len(WHOLE[name]) for name in FILES
        }
        return said


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def interrupted(folder, stop=4):
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        Making(stop)(folder)
    return folder.parent / f".{folder.name}.part"


def alone(folder):
    """What is in it is what was to be made, and nothing lies beside it."""
    assert content(folder) == WHOLE
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interruption_at_every_part_loses_one_file_at_most(tmp_path):
    for stop in range(6):
        folder = tmp_path / str(stop) / "made"
        with pytest.raises(KeyboardInterrupt):
            Making(stop)(folder)
        assert not folder.exists()
        assert any(folder.parent.iterdir()) == (stop > 1)  # else no file was finished
        going_on = Making()
        said = going_on(folder)
        finished = 3 if stop >= 3 else 2 if stop == 2 else 0
        assert len(going_on.taken) == 6 - finished
        assert said[-1] == ("writing", 19, 20)
        if finished:
            assert said[0][0] == "checking what is there"
        alone(folder)


def test_an_error_leaves_nothing_where_nothing_is_finished(tmp_path):
    folder = tmp_path / "made"
    with pytest.raises(CheckpointError, match=r"^NaN$"):
        Making(1, CheckpointError("NaN"))(folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    Making()(folder)
    alone(folder)


def test_an_error_keeps_what_is_finished_and_says_so(tmp_path):
    folder, part = tmp_path / "made", tmp_path / ".made.part"
    full = OSError(28, "No space left", str(part / "made" / "sub"))
    said = f"{folder}: {part}/made/sub: No space left; the same command goes on with what {part}"
    with pytest.raises(CheckpointError, match=f"^{said} has$"):
        Making(5, full)(folder)
    with pytest.raises(CheckpointError, match=f"^NaN; the same command goes on with what {part}"):
        Making(0, CheckpointError("NaN"))(folder)
    going_on = Making()
    going_on(folder)
    assert going_on.taken == [b"four", b"", b"five"]
    alone(folder)


def test_an_interruption_while_files_are_checked_keeps_them(tmp_path):
    interrupted(folder := tmp_path / "made")

    def stop(*told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        with unfinished(folder, 20, "these", stop):
            pass
    going_on = Making()
    going_on(folder)
    assert len(going_on.taken) == 3


def test_an_interruption_behind_the_end_leaves_what_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fsync_directory", fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        Making()(tmp_path / "made")
    alone(tmp_path / "made")


def test_what_was_harmed_in_between_is_made_again(tmp_path):
    part = interrupted(folder := tmp_path / "made")
    made = part / "made"
    (made / "a").write_bytes(b"onetwO")
    (made / "stray").write_text("of an older attempt")
    (made / "folder" / "within").mkdir(parents=True)
    (made / "sub" / "link").symlink_to("/etc")
    os.mkfifo(made / "sub" / "pipe")
    with open(part / LEDGER, "a") as ledger:
        ledger.write("9 beef sub/c")  # torn
    going_on = Making()
    going_on(folder)
    assert going_on.taken == [b"one", b"two", b"four", b"", b"five"]
    alone(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["a", "b", "c d", "note", "sub"]


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_finished_file_that_is_none_any_more_is_made_again(tmp_path, kind):
    mine = tmp_path / "mine"
    mine.write_bytes(b"onetwo")
    part = interrupted(folder := tmp_path / "there" / "made")
    (part / "made" / "a").unlink()
    if kind == "link":
        (part / "made" / "a").symlink_to(mine)
    else:
        (part / "made" / "a" / "b").mkdir(parents=True)
    going_on = Making()
    going_on(folder)
    assert len(going_on.taken) == 5 and mine.read_bytes() == b"onetwo"
    alone(folder)
    assert not (folder / "a").is_symlink()


HARMS = ("noise", "emptied", "gone", "link", "folder is a link", "it is a link", "a pipe", "more")


@pytest.mark.parametrize("harm", HARMS)
def test_what_this_program_did_not_leave_is_left_alone(tmp_path, harm):
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "thesis").write_text("mine")
    part = interrupted(folder := tmp_path / "there" / "made")
    made, ledger = part / "made", part / LEDGER
    if harm == "noise":
        ledger.write_bytes(bytes(range(256)))
    elif harm == "emptied":
        ledger.write_bytes(b"")
    elif harm in ("gone", "link"):
        ledger.unlink()
        if harm == "link":
            ledger.symlink_to(mine / "thesis")
    elif harm == "it is a link":
        part.rename(tmp_path / "elsewhere")
        part.symlink_to(tmp_path / "elsewhere")
    elif harm == "more":
        (part / "photos").mkdir()
    else:
        shutil.rmtree(made)
        os.mkfifo(made) if harm == "a pipe" else made.symlink_to(mine)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=r"\.made\.part is in the way"):
        Making()(folder)
    assert content(tmp_path) == before and (mine / "sub").is_dir()


def test_what_a_kill_before_the_first_file_leaves_is_gone_over(tmp_path):
    for name in ("nothing", LEDGER):
        part = tmp_path / name / ".made.part"
        part.mkdir(parents=True)
        if name == LEDGER:
            (part / LEDGER).touch()
        Making()(tmp_path / name / "made")
        alone(tmp_path / name / "made")


def test_another_folder_under_the_same_name_begins_anew(tmp_path):
    interrupted(folder := tmp_path / "made")
    other = Making()
    other(folder, "those")
    assert len(other.taken) == 6
    alone(folder)


def test_what_has_no_identity_is_never_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Making(4)(tmp_path / "made", None)
    assert not list(tmp_path.iterdir())


def test_two_at_once(tmp_path):
    folder = tmp_path / "made"
    with unfinished(folder, 20, "these") as making:
        with pytest.raises(CheckpointError, match=f"another process is making {folder}"):
            Making()(folder)
        (making.path / "mine").write_text("")
    assert content(folder) == {"mine": b""}


def test_places_that_cannot_be_taken_are_known_before_the_work(tmp_path, monkeypatch):
    (folder := tmp_path / "made").mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(CheckpointError, match="is the current folder"):
        Making()(folder)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path == folder)
        with pytest.raises(CheckpointError, match="is a mount point"):
            Making()(folder)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=19))
    with pytest.raises(CheckpointError, match="has no room for 1 MB"):
        Making()(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_empty_folder_keeps_its_mode(tmp_path):
    (folder := tmp_path / "made").mkdir()
    folder.chmod(0o2750)
    Making()(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2750
    alone(folder)


# --- imports and exports -----------------------------------------------------------------------

KILLED = """
import os, signal
from dsv3.checkpoint import exporting, huggingface
from dsv3.checkpoint import unfinished as module
def progress(what, done, size):
    if what != "checking what is there" and done > {share} * size:
        os.kill(os.getpid(), signal.SIGKILL)
{command}
"""


def killed(command: str, share: float) -> None:
    """Run `command` in another process, which is killed when that share is done."""
    program = KILLED.format(share=share, command=command)
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert ended.returncode == -signal.SIGKILL


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("command", ["import", "export"])
def test_kill_9(tmp_path, command):
    hf = tmp_path / "hf"
    exporting.export(exporting.of_folder(GOLDEN / "fp8"), hf, fp8=True, shard_bytes=50_000)
    names = [file.name for file in sorted(hf.glob("*.safetensors"))]
    assert len(names) > 4
    out, below = tmp_path / "out", HUB if command == "import" else "."
    call = {
        "import": f"huggingface.import_checkpoint('{hf}', '{out}', progress)",
        "export": f"exporting.export(exporting.of_folder('{hf}'), '{out}', fp8=True, "
        "shard_bytes=50_000, progress=progress)",
    }[command]
    before = {}
    for share in (0.3, 0.7):
        killed(call, share)
        assert not out.exists()
        now = times(tmp_path / ".out.part" / "out" / below)
        assert len(before) < len(now) < len(names)
        assert sum(now[name] == before[name] for name in before) >= len(before) - 1  # was torn
        before = now
    if command == "import":
        huggingface.import_checkpoint(hf, out)
    else:
        exporting.export(exporting.of_folder(hf), out, fp8=True, shard_bytes=50_000)
    after = times(out / below)
    assert sum(after[name] == before[name] for name in before) >= len(before) - 1
    assert sorted(after) == names and sorted(os.listdir(tmp_path)) == ["hf", "out"]
    for name in names:
        assert (out / below / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.parametrize("command", ["import", "export"])
def test_weights_of_the_same_names_sizes_and_times_are_other_weights(tmp_path, command):
    source = exporting.of_folder(GOLDEN / "groups")
    for more, name in enumerate(("one", "other")):

        def read(piece, more=more):
            return source.read(piece) + more

        other = dataclasses.replace(source, weights=None, read=read)
        exporting.export(other, tmp_path / name, shard_bytes=20_000)
        for file in (tmp_path / name).glob("*.safetensors"):
            os.utime(file, (1, 1))

    def make(hf, until=math.inf):
        def progress(what, done, size):
            if done > until * size:
                raise KeyboardInterrupt

        if command == "import":
            huggingface.import_checkpoint(hf, tmp_path / "out", progress)
        else:
            found = exporting.of_folder(hf)
            exporting.export(found, tmp_path / "out", shard_bytes=30_000, progress=progress)

    with pytest.raises(KeyboardInterrupt, match="goes on"):
        make(tmp_path / "one", 0.6)
    make(tmp_path / "other")
    assert_same_tensors(tmp_path / "other", tmp_path / "out" / (HUB if command == "import" else ""))


def test_a_checkpoint_replaced_while_it_is_read_is_refused(tmp_path):
    hf = Path(shutil.copytree(GOLDEN / "mtp_sharded", tmp_path / "hf"))
    last = max(hf.glob("*.safetensors"))

    def replace(*told):
        shutil.copyfile(last, tmp_path / "new")
        (tmp_path / "new").rename(last)

    def export(source, out, progress):
        exporting.export(exporting.of_folder(source), out, progress=progress)

    for make in (huggingface.import_checkpoint, export):
        with pytest.raises(CheckpointError, match=f"{last} changed while it was read"):
            make(hf, tmp_path / "out", replace)
        assert not (tmp_path / "out").exists()
