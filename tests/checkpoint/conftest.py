"""Directories with two sound steps, and copies of checkpoints of the hub."""

import shutil
from pathlib import Path

import pytest

from dsv3.checkpoint.store import Store
from tests.checkpoint.folders import GOLDEN
from tests.checkpoint.states import small


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A directory with the sound steps 1 and 2, to be copied and harmed."""
    directory = tmp_path_factory.mktemp("sound") / "checkpoints"
    store = Store(directory, keep=3, warn=pytest.fail)
    for step in (1, 2):
        store.save(step, small(step), {"position": step})
    return directory


@pytest.fixture
def harmed(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the single-file golden checkpoint."""
    return Path(shutil.copytree(GOLDEN / "groups", tmp_path / "hf"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A copy of the golden checkpoint with MTP in four files."""
    return Path(shutil.copytree(GOLDEN / "mtp_sharded", tmp_path / "hf"))


@pytest.fixture
def fp8_folder(tmp_path) -> Path:
    """A copy of the golden checkpoint in FP8, with MTP in two files."""
    return Path(shutil.copytree(GOLDEN / "fp8", tmp_path / "hf"))
