"""What the C library and the system are told of the memory that tensors on the host are in."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterable

import torch

# Parameters of glibc's mallopt(3), from its malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_BYTES = 1 << 30
_WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)


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


def read_ahead(tensors: Iterable[torch.Tensor]) -> None:
    """Have the system read the files that tensors on the host are mapped from, in this order, and do not wait for it.

    Else a page is read when it is first used, and the disk waits while what was read is computed with. What is not
    mapped from a file, or on a system that takes no such advice, is left as it is.
    """
    if _WILL_NEED is None:
        return
    advise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        if tensor.is_cpu and tensor.nbytes:
            first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - first
            advise(ctypes.c_void_p(first), ctypes.c_size_t(size), _WILL_NEED)
