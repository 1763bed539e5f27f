"""What a program asks of its machine."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from dsv3.host import keep_freed_memory
kept = keep_freed_memory() if {keep} else True
libc, size = ctypes.CDLL(None), 256 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def second_time(keep: bool) -> tuple[str, int]:
    code = FAULTS.format(keep=keep)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_not_faulted_in_again():
    kept, faults = second_time(keep=True)
    if kept == "False":
        pytest.skip("this libc has no mallopt")
    assert faults < 100
    assert second_time(keep=False)[1] > 100  # a page may be of 4 KiB or of 2 MiB
