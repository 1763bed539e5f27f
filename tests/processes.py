"""Starting several processes of a test, and ending them whatever happens."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds for all that a process does; a busy machine is slow


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@contextmanager
def running(*commands: list, devices: int = 1) -> Iterator[list[subprocess.Popen]]:
    """`python COMMAND` for each of `commands`, on so many CPU devices; stderr goes with stdout."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    begun = [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        yield begun
    finally:
        for process in begun:
            process.kill()
            process.wait()
            process.stdout.close()


def outputs(begun: list[subprocess.Popen]) -> list[list[str]]:
    """The lines that each printed, once all have ended."""
    return [process.communicate(timeout=PATIENCE)[0].splitlines() for process in begun]
