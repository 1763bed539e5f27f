"""Folders that are made file by file: interrupted, killed, damaged in between, and gone on with."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3.checkpoint import exporting, huggingface
from dsv3.checkpoint.importing import HUB
from dsv3.checkpoint.unfinished import LEDGER, unfinished
from dsv3.errors import CheckpointError
from tests.checkpoint.folders import GOLDEN

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


def test_an_error_leaves_nothing_even_of_an_earlier_attempt(tmp_path):
    folder = tmp_path / "made"
    interrupted(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        Making(0, CheckpointError("NaN"))(folder)
    with pytest.raises(CheckpointError, match=f"{folder}/sub: No space left"):
        Making(5, OSError(28, "No space left", str(tmp_path / ".made.part/made/sub")))(folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    Making()(folder)
    alone(folder)


def test_what_was_harmed_in_between_is_made_again(tmp_path):
    part = interrupted(folder := tmp_path / "made")
    file = part / "made" / "a"
    file.write_bytes(b"onetwO")
    (part / "made" / "stray").write_text("of an older attempt")
    with open(part / LEDGER, "a") as ledger:
        ledger.write("9 beef sub/c")  # torn
    going_on = Making()
    going_on(folder)
    assert going_on.taken == [b"one", b"two", b"four", b"", b"five"]
    alone(folder)


@pytest.mark.parametrize("harm", ["emptied", "noise", "gone"])
def test_without_its_ledger_nothing_is_believed(tmp_path, harm):
    ledger = interrupted(folder := tmp_path / "made") / LEDGER
    if harm == "gone":
        shutil.rmtree(ledger.parent / "made")
        ledger.unlink()
    else:
        ledger.write_bytes(b"" if harm == "emptied" else bytes(range(256)))
    going_on = Making()
    going_on(folder)
    assert len(going_on.taken) == 6
    alone(folder)


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


def test_a_strange_folder_in_the_way_is_kept(tmp_path):
    mine = tmp_path / ".made.part" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(CheckpointError, match=r"\.made\.part is in the way"):
        Making()(tmp_path / "made")
    mine.unlink()
    mine.parent.rmdir()
    mine.parent.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"\.made\.part is in the way"):
        Making()(tmp_path / "made")


# --- imports and exports -----------------------------------------------------------------------

KILLED = """
import os, signal
from dsv3.checkpoint import exporting, huggingface
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
