"""The C library's memory allocator, told to keep what is freed."""

import ctypes
import platform


# Of malloc.h: where to stop giving memory back, how much more to ask for, and how many blocks to map by themselves.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep the memory of large tensors that were freed, for the next ones.

    By default it gives them back to the kernel after each operation, which then hands out the same pages again, one
    fault each. It is for a process that computes for minutes: to be called before the first tensor. Elsewhere nothing
    happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**28)
