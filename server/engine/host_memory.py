"""How the C library keeps the memory that tensors on the host are made in."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3), from its malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB that it freed, where it would give back every large block at once.

    The activations of a prefill are blocks of megabytes, made and freed hundreds of times in a step. Each came from
    the operating system, which zeroes its pages one fault at a time.

    Returns:
        Whether the C library is glibc and could be told; others, and allocators loaded in its place, decide themselves.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(parameter, _BYTES) for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
