"""The training step, compiled for a mesh that is not there, in a process of its own.

`compile_step` starts this module as a program, since how many devices XLA:CPU pretends to have is
settled when JAX starts, and since a compiler that crashes should not take its caller along. No
array is made: state and batch are shapes with shardings. The process prints one line of JSON.

The devices are virtual ones of this host. XLA:CPU, for 'cpu', computes in FP32 what is BF16, and
would send it so; that pass (`float-normalization-bf16`) is left out, as nothing will run. For
'h200' the program is lowered for CUDA and given to NVIDIA's own compiler, without a GPU, where its
wheels are installed: `jax-cuda13-plugin`, `jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and `nvidia-nvvm`.
(A description of H200s in place of virtual devices would do, but that it knows of no host memory.)
"""

import importlib.util
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler  # what is lowered for other devices is compiled under no public name
from jax._src.lib import xla_client
from jax.experimental import topologies

from dsv3.bindings import Binding, apply, literal
from dsv3.cli import Parser
from dsv3.config import Config
from dsv3.errors import UserError, exits_cleanly
from dsv3.parallel import mesh as meshes
from dsv3.reporting.hlo import Collective, Shape, Transfer, collectives, host_work, transfers
from dsv3.sweeps import load_config
from dsv3.training import state as train_state
from dsv3.training.schedules import value_at
from dsv3.training.step import jitted_step, operands

TARGETS = ("cpu", "h200")  # of `COMPILE`
WHEELS = ("jax_plugins.xla_cuda13", "nvidia.cu13")
WIDENING = [f"float-normalization-{narrow}" for narrow in ("bf16", "f8e4m3fn", "f8e5m2")]
LARGEST = 8  # buffers that are named


class Buffer(NamedTuple):
    """A stretch of temporary memory, and the arrays that use it one after the other."""

    bytes: int
    arrays: str


class Program(NamedTuple):
    """What a compiled step says of itself; bytes are a device's."""

    target: str
    seconds: float  # to lower and compile it
    host_bytes: int  # at most, of the compiling process
    temporary: int
    collectives: list[Collective]
    transfers: list[Transfer]  # between a device and its host
    host_work: list[float]  # FLOP of products while the host computes, each time
    buffers: list[Buffer]  # the largest first


def compile_step(path: str, bindings: Sequence[Binding], devices: int, target: str) -> Program:
    """The program of the configuration at `path`, with `bindings`, on so many devices.

    UserError where the compiler fails, or wants wheels that are not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = [a for b in bindings for a in ("--set", f"{b.path}={literal(b.value)}")]
        command = [sys.executable, "-m", __spec__.name, path, *wanted, "--devices", str(devices)]
        command += ["--target", target, "--dump", folder]
        done = subprocess.run(
            ["env", *_environment(devices, target, folder), *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode == 0:
        return _read(json.loads(done.stdout.splitlines()[-1]))
    said = done.stderr.strip().splitlines()[-1:] or ["without a word"]
    if done.returncode == 2:
        raise UserError(said[0].removeprefix("error: "))
    status = done.returncode
    ended = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    raise UserError(f"the compiler for {target} ended with {ended}: {said[0]}")


def batch_of(config: Config) -> int:
    """Sequences of a step at the end of the schedule."""
    return int(value_at(config.training.batch, 1.0))


# --- the other process -------------------------------------------------------------------------


def _environment(devices: int, target: str, folder: str) -> list[str]:
    flags = [f"--xla_dump_to={folder}", "--xla_dump_hlo_module_re=jit_step"]
    flags += [f"--xla_force_host_platform_device_count={devices}"]
    if target == "cpu":
        flags += ["--xla_backend_optimization_level=0",
                  f"--xla_disable_hlo_passes={','.join(WIDENING)}"]  # fmt: skip
        return ["JAX_PLATFORMS=cpu", f"XLA_FLAGS={' '.join(flags)}"]
    flags += ["--xla_gpu_autotune_level=0", f"--xla_gpu_cuda_data_dir={_cuda()}"]
    skip = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1"
    return ["JAX_PLATFORMS=cpu", skip, f"XLA_FLAGS={' '.join(flags)}"]


def _cuda() -> str:
    try:
        plugin, cuda = map(importlib.util.find_spec, WHEELS)
    except ModuleNotFoundError:
        plugin = cuda = None
    if plugin is None or cuda is None:
        raise UserError("--for h200 wants jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc and "
                        "nvidia-nvvm, installed without their dependencies")  # fmt: skip
    return str(next(iter(cuda.submodule_search_locations or [])))


def _compiled(config: Config, count: int, target: str, dump: Path) -> Program:
    start = time.perf_counter()
    mesh = meshes.build(config.parallel)
    tokens = jax.ShapeDtypeStruct(
        (batch_of(config), config.training.sequence_length + 1), jnp.int32,
        sharding=meshes.batch_sharding(mesh),
    )  # fmt: skip
    behind = jax.ShapeDtypeStruct((), bool, sharding=meshes.everywhere(mesh))
    state = operands(train_state.abstract(config, mesh), behind)
    traced = jitted_step(config, mesh).trace(*state, tokens)
    text, temporary = COMPILE[target](traced, count, config.parallel.local)
    return Program(
        target=target,
        seconds=time.perf_counter() - start,
        host_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        temporary=temporary,
        collectives=collectives(text, dict(mesh.shape)),
        transfers=transfers(text),
        host_work=host_work(text),
        buffers=_largest(dump),
    )


def _for_cpu(traced: Any, count: int, local: int) -> tuple[str, int]:
    """The program as text, and its temporary memory."""
    compiled = traced.lower().compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def _for_h200(traced: Any, count: int, local: int) -> tuple[str, int]:
    lowered = traced.lower(lowering_platforms=("cuda",))
    described = Path(__file__).with_name("h200.txtpb").read_text("utf-8")
    nodes = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology=f"1x{count // local}x{local}"
    )
    options = compiler.get_compile_options(
        1, count, np.arange(count)[None], env_options_overrides=meshes.COMPILER["gpu"]
    )
    devices: Any = list(nodes.devices)
    compiled = devices[0].client.compile(
        lowered.compiler_ir("stablehlo"), xla_client.DeviceList(tuple(devices)), options
    )
    temporary = compiled.get_compiled_memory_stats().temp_size_in_bytes
    return compiled.hlo_modules()[0].to_string(), temporary


COMPILE = {"cpu": _for_cpu, "h200": _for_h200}


def _largest(dump: Path) -> list[Buffer]:
    """From XLA's own report of the memory it laid out."""
    found: list[Buffer] = []
    for report in dump.glob("*jit_step*memory-usage-report.txt"):
        for line in report.read_text("utf-8").splitlines():
            fields = [field.strip() for field in line.split(";")]
            if len(fields) == 5 and (size := re.fullmatch(r"([\d.]+)(\w+)", fields[1])):
                found.append(Buffer(_bytes(size[1], size[2]), fields[4]))
    return sorted(found, reverse=True)[:LARGEST]


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit))


def _read(said: dict) -> Program:
    def shapes(listed):
        return tuple(Shape(dtype, tuple(dims)) for dtype, dims in listed)

    said["collectives"] = [
        Collective(kind, tuple(axes), group, shapes(left), *rest)
        for kind, axes, group, left, *rest in said["collectives"]
    ]
    said["transfers"] = [Transfer(*each) for each in said["transfers"]]
    said["buffers"] = [Buffer(*each) for each in said["buffers"]]
    return Program(**said)


@exits_cleanly
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("config")
    parser.add_bindings()
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--dump", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = apply(load_config(options.config), options.set)
    program = _compiled(config, options.devices, options.target, options.dump)
    print(json.dumps(program._asdict()))


if __name__ == "__main__":
    main()
