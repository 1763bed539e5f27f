import os
import sys
import time

import pytest

from dsv3.errors import ConfigError, UserError
from dsv3.evaluation.sandbox import Limits, run, runner

QUICK = Limits(seconds=2, megabytes=512)


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("x = 1\nassert x", "passed"),
        ("print('a' * 10**6)", "passed"),
        ("assert __name__ == '__main__'", "passed"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "it ended early"),
        ("import os; os._exit(0)", "it ended early"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('x', 'wb').write(bytes(32 << 20))", "OSError: [Errno 27] File too large"),
        ("files = [open('/dev/null') for _ in range(99)]", "Too many open files"),
        ("\ud800", "SyntaxError"),
        ("", "passed"),
    ],
)
def test_what_becomes_of_a_program(program, how):
    found = run(program, QUICK)
    assert how in found.how and found.passed == (how == "passed")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_deadline_ends_it(program):
    started = time.monotonic()
    found = run(program, Limits(seconds=1))
    assert not found.passed and found.how == "timed out"
    assert time.monotonic() - started < 10


def test_it_sees_an_empty_folder_that_goes_away_and_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "1")
    says = tmp_path / "says"
    program = f"""
import os
assert os.listdir('.') == [] and 'SECRET' not in os.environ
open('left behind', 'w').close()
open({str(says)!r}, 'w').write(os.getcwd())"""
    assert run(program, QUICK).passed
    assert not os.path.exists(says.read_text())


def test_what_it_starts_ends_with_it(tmp_path):
    ticks = tmp_path / "ticks"
    program = f"""
import os, time
if os.fork() == 0:
    while True:
        open({str(ticks)!r}, 'a').write('.')
        time.sleep(0.02)
time.sleep(0.5)"""
    assert run(program, QUICK).passed
    before = ticks.stat().st_size
    time.sleep(0.3)
    assert ticks.stat().st_size == before > 0


def test_it_has_no_network_where_the_kernel_can_cut_it_off():
    if run("", QUICK).network != "cut off":
        pytest.skip("this kernel does not allow namespaces: the network stays open")
    program = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)"
    assert "Network is unreachable" in run(program, QUICK).how
    children = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['sleep', '77'])"
    )
    assert run(children, QUICK).passed
    assert "sleep\x0077" not in "".join(_command_lines())


def test_it_is_not_told_how_passing_is_reported():
    program = """
import os, sys
said = ' '.join(sys.argv) + open('/proc/self/cmdline').read()
words = said.replace(chr(0), ' ').split()
if nonces := [word for word in words if len(word) == 32]:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, nonces[0].encode())
        except OSError:
            pass
    os._exit(0)
assert sys.argv == ['-c'] and sys.stdin.read() == ''
raise SystemExit('no nonce')"""
    found = run(program, QUICK)
    assert not found.passed and found.how == "no nonce"


@pytest.mark.parametrize("limits", [(0, 512), (2**40, 512), (2, 0), (2, 8796093022208)])
def test_limits_that_no_system_takes_are_named(limits):
    with pytest.raises(ConfigError, match=r"^(seconds|megabytes) = \d+ must lie in \[1, "):
        Limits(*limits)


def test_where_nothing_can_pass_nothing_is_judged():
    passes, _ = runner(QUICK)
    assert passes("x = 1") and not passes("assert 0")
    with pytest.raises(UserError, match="not even an empty program passes within 2 seconds and 1 "):
        runner(Limits(2, 1))


def _command_lines():
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline") as file:
                yield file.read()
        except OSError:
            pass


def test_it_is_the_interpreter_that_runs_us():
    program = f"import sys; assert sys.version_info[:2] == {sys.version_info[:2]}"
    assert run(program, QUICK).passed
