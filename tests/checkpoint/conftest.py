"""Directories with two sound steps."""

import shutil

import pytest

from dsv3.checkpoint.store import Store
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
