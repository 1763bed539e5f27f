"""Becoming one of several processes, and ending well when another does not.

    python train.py ... --coordinator HOST:PORT --processes N --process I      (or eval.py)

or the same command under a launcher that jax knows: SLURM, Open MPI, Kubernetes, Cloud TPU. The
processes find each other through the coordinator, a service in process 0, of `jax.distributed`.

Where a process does not come, or dies later, that runtime aborts the others, each in a thread of
its own, with pages of C++ and a signal. So the work is done in a child. Its parent, which never
starts JAX, passes on what the child says and the first signal that comes, and says in the end in
one line what the runtime said in many: which process was missed. A second signal kills the child,
whatever it waits for, and it dies with its parent, whoever kills that.

The death of process 0, and so of the service, is seen at once. That of another is when its parent
announces it; where that died as well, a whole host for instance, when heartbeats stay away.
"""

import contextlib
import ctypes
import functools
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import distributed  # jax.distributed cannot set how long a process is waited for
from jax._src.clusters import ClusterEnv
from jax._src.lib import _jax

from dsv3.errors import UserError, exits_cleanly

HEARTBEAT_SECONDS = 60  # without one a process is dead
ANNOUNCE_SECONDS = 5  # that an announcement of a death may take
SHUTDOWN_SECONDS = 60  # between the end of the first process and the last
FAREWELL_SECONDS = 2  # for which process 0 serves the others, who end of the same error as it
HOLD_SECONDS = 3  # between what the runtime complains of and its death of that
DAY = 24 * 3600  # longer, a process is not waited for
COMPLAINT, FATAL = (re.compile(rb"^[%s]\d{4} \d\d:" % kinds, re.M) for kinds in (b"WEF", b"F"))
LOST = re.compile(r"gloo|nccl|connection|socket|coordination|DEADLINE|UNAVAILABLE|CANCELLED", re.I)
SERVICE_KNOWS = "the JAX distributed service detected fatal errors"
AGAIN = "give all of them the same command again"  # to resume from the last checkpoint
_PR_SET_PDEATHSIG = 1  # from sys/prctl.h
_TAIL = 1 << 15  # bytes of a child's last words


class Place(NamedTuple):
    """Which of how many processes this is, and where process 0 listens."""

    coordinator: str
    processes: int
    process: int
    devices: Sequence[int] | None = None  # the accelerators of this host that are its own


def place_of(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that the options name, or the launcher; None for a process that is alone.

    Raises UserError on options that do not fit together.
    """
    if processes == 1 and process in (None, 0):
        return None
    if coordinator is None and processes is None and process is None:
        return _place_in_cluster()
    if coordinator is None or processes is None or process is None:
        raise UserError("--coordinator, --processes and --process go together")
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if not port or not 1 <= int(port[1]) <= 65535:
        raise UserError(f"--coordinator {coordinator} is not HOST:PORT, with a port of 1 to 65535")
    if not 0 <= process < processes:
        raise UserError(f"--process {process} must lie between 0 and {processes - 1}")
    return Place(coordinator, processes, process)


def _place_in_cluster() -> Place | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a Kubernetes without its Python package
        try:
            coordinator, processes, process, devices = (
                ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
            )
        except Exception as error:
            raise UserError(
                f"the launcher was not understood: {error}; --coordinator, --processes and "
                "--process say what it should have, --processes 1 that there is no other process"
            ) from error
    if coordinator is None or process is None or processes in (None, 1):
        return None
    return Place(coordinator, processes, process, devices)


def run(place: Place | None, seconds: int, work: Callable[[], None]) -> None:
    """`work` as the process at `place`, once all have come; None: as a process that is alone.

    The others are waited for so many seconds. Work happens in a child process. Where it fails, the
    child ends at once, without waiting for the others as JAX would at its exit; they miss it then.
    Raises UserError where one of them is missed here.
    """
    if not 1 <= seconds <= DAY:
        raise UserError(f"--join-seconds {seconds} must lie between 1 and {DAY}")
    if place is None:
        return work()
    _supervise(place, seconds)
    try:
        _together(place, seconds, work)
        jax.distributed.shutdown()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        if place.process == 0:
            time.sleep(FAREWELL_SECONDS)
        code = error.code if isinstance(error, SystemExit) else 1
        os._exit(code if isinstance(code, int) else 1)


@exits_cleanly
def _together(place: Place, seconds: int, work: Callable[[], None]) -> None:
    _join(place, seconds)
    try:
        work()
    except jax.errors.JaxRuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"process {place.process} lost another one: {reason}; {AGAIN}") from error


def _join(place: Place, seconds: int) -> None:
    """What `jax.distributed.initialize` does, but that process 0 waits no longer than `seconds`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if place.devices is not None:
        visible = ",".join(map(str, place.devices))
        for kind in ("cuda", "rocm", "oneapi"):
            jax.config.update(f"jax_{kind}_visible_devices", visible)
    state = distributed.global_state
    state.coordinator_address = place.coordinator
    state.num_processes, state.process_id = place.processes, place.process
    patience: dict[str, Any] = {
        "heartbeat_timeout": HEARTBEAT_SECONDS,
        "shutdown_timeout": SHUTDOWN_SECONDS,
    }
    if place.process == 0:
        port = int(place.coordinator.rpartition(":")[2])
        _require_free(port, place)
        state.service = _jax.get_distributed_runtime_service(
            f"[::]:{port}", place.processes, cluster_register_timeout=seconds, **patience
        )
    state.client = _jax.get_distributed_runtime_client(
        place.coordinator, place.process, init_timeout=seconds + 5, use_compression=True,
        **patience,
    )  # fmt: skip
    state.client.connect()
    if place.process == 0:
        state.client.key_value_set("dsv3/processes", str(place.processes))
    count = state.client.blocking_key_value_get("dsv3/processes", seconds * 1000)
    if count != str(place.processes):
        raise UserError(f"--processes {place.processes} is {count} in process 0")


def _require_free(port: int, place: Place) -> None:
    """Raise UserError where nobody can listen; the service would share the port with another."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"process 0 cannot listen at {place.coordinator}: {reason}") from error


def _supervise(place: Place, seconds: int) -> None:
    """Return in a child of this process, which ends when that does."""
    sys.stdout.flush()
    read, write = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        os.setpgid(0, 0)  # a terminal's Ctrl-C comes once, through the parent
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        with contextlib.suppress(AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.dup2(write, 2)
        os.close(write)
        os.close(read)
        return
    os.close(write)
    _pass_signals_to(child)
    said, held, status = _listen(read, child)
    code = os.waitstatus_to_exitcode(status)
    reason = _reason(said, place, seconds) if code < 0 else None
    if reason is None:
        _pass_on(held)
    if code >= 0:
        raise SystemExit(code)
    if SERVICE_KNOWS not in said:
        _announce(place)
    reason = reason or f"ended by {signal.Signals(-code).name}; {AGAIN}"
    raise UserError(f"process {place.process}: {reason}")


def _announce(place: Place) -> None:
    """Let the others know that this process died, where the service is not its own.

    The service has no word for it, but it knows a process that comes again for one that died, and
    ends the rest. That is done in a process of its own, which the runtime may abort.
    """
    if place.process == 0:
        return
    again = os.fork()
    if again:
        os.waitpid(again, 0)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(Exception):
        _jax.get_distributed_runtime_client(
            place.coordinator, place.process, init_timeout=ANNOUNCE_SECONDS, use_compression=True
        ).connect()
    os._exit(0)


def _pass_signals_to(child: int) -> None:
    """The first as it is, a second as SIGKILL: the child may be where it handles none."""

    def handle(number: int, _: Any, send: int | None = None) -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, functools.partial(handle, send=signal.SIGKILL))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, send or number)

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, handle)


def _listen(pipe: int, child: int) -> tuple[str, bytes, int]:
    """Pass on what comes through `pipe` until `child` ends; the end of it, and the status.

    What the runtime complains of is held back, with all behind it, until it is seen whether that
    kills it. In the middle: what is held back at the end.
    """
    said, held, ended, status, since = b"", b"", 0, 0, time.monotonic()
    while True:
        ready, _, _ = select.select([pipe], [], [], 0 if ended else 0.2)
        chunk = os.read(pipe, 1 << 16) if ready else b""
        said, held = (said + chunk)[-_TAIL:], held + chunk
        late = time.monotonic() - since > HOLD_SECONDS and not FATAL.search(held)
        if not COMPLAINT.search(held) or (late and not ended):
            _pass_on(held)
            held, since = b"", time.monotonic()
        if ended and not chunk:
            return said.decode(errors="replace"), held, status
        if not ended:
            ended, status = os.waitpid(child, os.WNOHANG)


def _pass_on(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads our stderr
        os.write(2, text)


def _reason(said: str, place: Place, seconds: int) -> str | None:
    """What the runtime's last words in `said` mean, if they are known."""
    if missing := re.findall(r"timed out task names:\s*((?:\d+\s+)+)", said):
        names = _listed(missing[-1])
        return f"{names} of {place.processes} did not join {place.coordinator} in {seconds} s"
    if "RegisterTask" in said:
        return f"process 0 did not answer at {place.coordinator} in {seconds} s"
    if dead := re.findall(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", said):
        return f"{_listed(dead[-1])} died; {AGAIN}"
    if dead := re.findall(r"(\d+) unexpectedly tried to connect", said):
        return f"{_listed(' '.join(set(dead)))} died; {AGAIN}"
    if "leader task was preempted" in said:
        return f"process 0 died or cannot be reached; {AGAIN}"
    return None


def _listed(numbers: str) -> str:
    """'process 1' or 'processes 1, 3' of '1\\n3\\n'."""
    found = sorted(map(int, numbers.split()))
    return f"process{'es' if len(found) > 1 else ''} {', '.join(map(str, found))}"
