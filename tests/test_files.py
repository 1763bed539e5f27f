"""Atomic writes: whole or absent, nothing left behind, the path named in the error."""

import errno
import os
from pathlib import Path

import pytest

from dsv3.errors import UserError
from dsv3.files import exclusive, fsync_tree, write_atomically


@pytest.mark.parametrize("content", ["", "Größe\n", b"\x00\xff"])
def test_writes_exactly_the_content(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["a.txt"]
    fsync_tree(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, "new")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_directory_is_an_oserror_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a.txt", "x")


def test_only_regular_files_are_replaced_and_links_are_followed(tmp_path):
    with pytest.raises(OSError, match="regular"):
        write_atomically("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    write_atomically(link, "new")
    assert link.is_symlink() and real.read_text() == "new"


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    with exclusive(tmp_path), pytest.raises(UserError, match="another run"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass
