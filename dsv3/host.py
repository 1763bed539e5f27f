"""What a program asks of the machine it runs on, once, before JAX starts."""

import ctypes

# mallopt's parameters, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory it frees instead of returning it to the kernel; False elsewhere.

    XLA:CPU allocates the temporaries of every call anew. glibc maps blocks of that size afresh
    each time, so every step faults all of its pages in again: for `configs/bench_cpu.py` 140,000
    faults and a quarter of the CPU time. The process's footprint stays at its peak in return.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, Windows
        return False
    return all(
        mallopt(parameter, value)
        for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    )
