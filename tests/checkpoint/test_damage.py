"""What happens to a checkpoint on disk is found, named and survived."""

import errno
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3.checkpoint.arrays import Arrays
from dsv3.checkpoint.store import Store
from dsv3.errors import CheckpointError
from tests.checkpoint.states import assert_same_bits, small


def expect_recovery(directory, to=1, reason=""):
    """Restoring warns once, naming step 2 and the reason, sets it aside, and yields step `to`."""
    warned = []
    restored = Store(directory, 3, warned.append).restore(small(0))
    assert restored is not None and restored.step == to and restored.extra == {"position": to}
    assert_same_bits(restored.state, jax.tree.map(jnp.asarray, small(to)))
    assert len(warned) == 1 and "step-2 is damaged" in warned[0] and reason in warned[0]
    assert "\n" not in warned[0]
    assert (directory / "damaged-2-1").is_dir() and not (directory / "step-2").exists()


class TestDamage:
    def test_random_bit_flips_in_every_file(self, two_steps, tmp_path):
        rng = random.Random(0)
        files = [p.relative_to(two_steps) for p in (two_steps / "step-2").rglob("*") if p.is_file()]
        for trial in range(40):
            directory = shutil.copytree(two_steps, tmp_path / str(trial))
            path = directory / files[trial % len(files)]
            content = bytearray(path.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            expect_recovery(directory, reason=path.name)

    @pytest.mark.parametrize("harm", ["truncate", "delete", "zero", "directory"])
    @pytest.mark.parametrize("name", ["MANIFEST", "extra.json", "arrays/_METADATA", "arrays/d/*"])
    def test_lost_and_emptied_files(self, harmed, harm, name):
        path = max((harmed / "step-2").glob(name), key=lambda p: p.stat().st_size)
        size = path.stat().st_size
        if harm == "truncate":
            os.truncate(path, size // 2)
        elif harm == "zero":
            path.write_bytes(bytes(size))
        else:
            path.unlink()
        if harm == "directory":
            path.mkdir()
        expect_recovery(harmed, reason=path.name)

    def test_a_surplus_file(self, harmed):
        (harmed / "step-2" / "arrays" / "more").write_bytes(b"")
        expect_recovery(harmed, reason="arrays/more does not belong to it")

    def test_files_swapped_between_steps(self, harmed):
        for name in ("MANIFEST", "extra.json", "arrays"):
            directory = shutil.copytree(harmed, harmed.with_name(name))
            a, b, aside = directory / "step-1" / name, directory / "step-2" / name, directory / "x"
            b.rename(aside)
            if a.is_dir():
                shutil.copytree(a, b)
            else:
                shutil.copy(a, b)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            expect_recovery(directory)

    def test_whole_steps_swapped(self, harmed):
        shutil.rmtree(harmed / "step-2")
        shutil.copytree(harmed / "step-1", harmed / "step-2")
        expect_recovery(harmed, reason="it holds step 1")

    def test_corruption_between_file_and_array(self, harmed, monkeypatch):
        def corrupt(arrays, name, box):
            found = read(arrays, name, box)
            wrong = arrays.path.name == "step-2" and name == "a"
            return found + np.float32(1e-6) if wrong else found

        read = Arrays._stored
        monkeypatch.setattr(Arrays, "_stored", corrupt)
        expect_recovery(harmed, reason="the array a does not match its fingerprint")

    def test_nothing_sound_is_never_a_fresh_start(self, harmed):
        for step in (1, 2):
            (harmed / f"step-{step}" / "MANIFEST").unlink()
        warned = []
        for newest in (r"step-2: MANIFEST: No such file or directory", "damaged-2-1"):
            with pytest.raises(CheckpointError, match=rf"every checkpoint .* damaged \({newest}\)"):
                Store(harmed, 3, warned.append).restore(small(0))
        assert len(warned) == 2
        assert sorted(os.listdir(harmed)) == ["damaged-1-1", "damaged-2-1"]

    def test_damage_that_cannot_be_set_aside_is_passed_over(self, harmed, monkeypatch):
        def read_only(*_):
            raise OSError(errno.EROFS, "Read-only file system")

        (harmed / "step-2" / "extra.json").unlink()
        monkeypatch.setattr(Path, "rename", read_only)
        warned = []
        assert Store(harmed, 3, warned.append).restore(small(0)).step == 1
        assert len(warned) == 1 and "Read-only file system" in warned[0]

    def test_a_step_can_be_damaged_twice(self, harmed):
        store = Store(harmed, 3, lambda _: None)
        for n in (1, 2):
            (harmed / "step-2" / "extra.json").write_text("{}")
            assert store.restore(small(0)).step == 1
            assert (harmed / f"damaged-2-{n}" / "extra.json").read_text() == "{}"
            store.save(2, small(2), {"position": 2})

    def test_extra_alone_is_verified(self, harmed):
        warned = []
        store = Store(harmed, 3, warned.append)
        assert store.read_extra() == {"position": 2} and store.read_extra(1) == {"position": 1}
        (harmed / "step-2" / "extra.json").write_text('{"position": 3}')
        assert store.read_extra() == {"position": 1} and len(warned) == 1
