"""Running a program that a model wrote, in a process of its own with limits. Off unless asked for.

    run(program, Limits(seconds=10, megabytes=1024))  →  Outcome(passed, how, network)

What it is: a fresh interpreter (`-I`: no environment, no site of the user) in an empty temporary
folder that is deleted afterwards; limits of CPU time, memory, file size, open files and, for users
other than root, processes; a deadline after which its whole process group is killed; where the
kernel allows it, namespaces without network and with processes of its own, which all die with it.
`passed` wants the program to run to its end: an early `exit(0)` does not count.

What it is not: a security boundary. The program has the rights of the user who runs it: it reads
and writes that user's files, and where `Outcome.network` says 'open' it reaches the network and a
child in a session of its own may outlive it. Accidents are contained, malice is not; run code of
a model that you do not trust in a container or a virtual machine.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3.errors import ConfigError, UserError

BOOTSTRAP = """
import os, resource, sys
nonce, *numbers = sys.stdin.readline().split()  # not in argv, which the program and its like read
megabytes, seconds, report = map(int, numbers)
program = sys.stdin.read()
try:
    user = () if os.geteuid() == 0 else (os.CLONE_NEWUSER,)
    os.unshare(sum(user, os.CLONE_NEWNET | os.CLONE_NEWPID))
    os.write(report, b"cut off\\n")
    child = os.fork()  # the first process of its namespace: when it ends, all there do
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
except (OSError, AttributeError):  # not allowed, or not Linux
    os.write(report, b"open\\n")
for limit, value in (
    (resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_FSIZE, 16 << 20), (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_NPROC, 64), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(report, nonce.encode())
"""


@dataclass(frozen=True)
class Limits:
    """Raises ConfigError for a number that no system takes."""

    seconds: int = 10  # of CPU time and of wall-clock time
    megabytes: int = 1024  # of address space

    def __post_init__(self):
        for name, most in (("seconds", 24 * 60 * 60), ("megabytes", 1 << 24)):
            if not 1 <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"{name} = {value} must lie in [1, {most}]")


class Outcome(NamedTuple):
    passed: bool
    how: str  # 'passed', 'timed out', or the last line of what it complained
    network: str  # 'cut off' or 'open'


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """What became of `program`. Nothing that it prints is shown."""
    nonce = secrets.token_hex(16)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)  # a process that escaped may hold the other end open
    with tempfile.TemporaryDirectory(prefix="dsv3-", ignore_cleanup_errors=True) as folder:
        complaint = Path(folder) / "stderr"
        command = [sys.executable, "-I", "-c", BOOTSTRAP]
        first = f"{nonce} {limits.megabytes} {limits.seconds} {writing}\n"
        (home := Path(folder) / "home").mkdir()
        with complaint.open("wb") as stderr:
            process = subprocess.Popen(
                command, cwd=home, env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr,
                pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        os.close(writing)
        how = "failed"
        try:
            process.communicate((first + program).encode("utf-8", "replace"), limits.seconds)
        except subprocess.TimeoutExpired:
            how = "timed out"
        finally:
            _kill(process)
            said = _read(reading).decode(errors="replace")
        network, _, end = said.partition("\n")
        if end == nonce and how == "failed" and process.returncode == 0:
            return Outcome(True, "passed", network)
        lines = complaint.read_bytes()[-4096:].decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it ended early")
        return Outcome(False, last if how == "failed" else how, network or "open")


def runner(limits: Limits) -> tuple[Callable[[str], bool], str]:
    """Whether a program passes, and what is known of its network.

    Raises UserError with what an empty program complains of, if that does not pass.
    """
    empty = run("", limits)
    if not empty.passed:
        raise UserError(f"not even an empty program passes within {limits.seconds} seconds and "
                        f"{limits.megabytes} megabytes: {empty.how}")  # fmt: skip
    return lambda program: run(program, limits).passed, empty.network


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except BlockingIOError:
        return b""
    finally:
        os.close(descriptor)


def _kill(process: subprocess.Popen) -> None:
    """End the process group, and what is left of it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
