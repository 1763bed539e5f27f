"""Every shape of the 671B model, lowered for CUDA, and compiled for an H200 where that can be."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("shapes.py")
SPEC = importlib.util.spec_from_file_location("kernel_shapes", FILE)
assert SPEC and SPEC.loader
shapes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shapes)

CUDA = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve().parents[1]
WHEELS = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")


def missing() -> str | None:
    """What compiling without a GPU wants and is not here."""
    for name in WHEELS:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"needs the wheel of {name}: pip install --no-deps jax-cuda13-plugin (and -pjrt)"
    if not (CUDA / "bin/ptxas").exists():
        return "needs ptxas of a CUDA 13 toolkit"
    return None


@pytest.mark.parametrize("name", shapes.CALLS)
def test_it_lowers_for_cuda(name):
    """Layouts are inferred, shared memory and transposes checked."""
    assert "mosaic_gpu" in shapes.lowered(name).as_text()


@pytest.fixture(scope="session")
def assembled(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("assembled")
    done = subprocess.run(
        [sys.executable, str(FILE), str(CUDA), str(folder)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr[-2000:]
    reports = {path.stem: path for path in folder.glob("*.ptxas")}
    assert len(reports) >= len(shapes.CALLS) - 2  # equal kernels are compiled once
    return reports


def test_nothing_spills_and_no_product_is_serialised(assembled):
    for name, path in assembled.items():
        said = path.read_text()
        spills = re.findall(r"(\d+) bytes spill", said)
        assert spills and not any(map(int, spills)), (name, said)
        assert "C7512" not in said and "serializ" not in said, (name, said)


def test_products_run_on_the_tensor_cores(assembled):
    wanted = {"fp8_nt": "f32.e4m3.e4m3", "fp8_wgrad": "f32.e4m3.e"} | dict.fromkeys(
        ("bf16", "attention", "mla_decode"), "f32.bf16.bf16"
    )
    for name, path in assembled.items():
        code = path.with_suffix(".ptx").read_text()
        kind = next((wanted[k] for k in wanted if name.startswith(k)), None)
        assert kind is None or f"k{32 if 'fp8' in name else 16}.{kind}" in code, name
    assert all(any(name.startswith(k) for name in assembled) for k in wanted)


def test_shared_memory_suffices(assembled):
    folder = next(iter(assembled.values())).parent
    reports = list(folder.glob("*.resources.txt"))
    assert len(reports) >= len(shapes.CALLS) // 2
    for path in reports:
        [size] = re.findall(r"smem_scratch_bytes=(\d+)", path.read_text())
        assert int(size) <= 227 * 1024, path.name
