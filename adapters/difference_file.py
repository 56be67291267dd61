"""Reads a file of sparse differences, a pickle by its form, as nothing but dicts, lists, integers and tensors."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterFormatError
from weft.adapters.files import DIFFERENCES, FILES, open_regular
from weft.adapters.pickled import check_archive

SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
"""numpy's name of what makes a scalar, before and since version 2."""

NAMES = frozenset(
    {
        "_codecs encode",
        "collections OrderedDict",
        "numpy dtype",
        "numpy.core.multiarray scalar",
        "numpy._core.multiarray scalar",
        "torch BFloat16Storage",
        "torch FloatStorage",
        "torch HalfStorage",
        "torch Size",
        "torch._utils _rebuild_tensor_v2",
    }
)
"""All that tensors, sizes and integers are made of."""

FAILURES = (
    *(pickle.PickleError, zipfile.BadZipFile, struct.error, OSError),
    *(RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError, AssertionError, OverflowError),
)
"""What reading a file that is none of these may raise."""

_reading = Lock()
"""torch keeps what a pickle may name for the whole process."""


class _Int64:
    """Stands for ``numpy.dtype``: the first index of a tensor is saved as one of numpy's integers."""

    def __init__(self, name: str, *_: object) -> None:
        if name != "i8":
            raise ValueError(f"a scalar of type {show(name)}")

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] != "<":
            raise ValueError("a big-endian scalar")


def _integer(_: _Int64, data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def read_difference_file(folder: Path) -> dict[str, Any]:
    """The file's dict, its tensors on the CPU.

    Raises:
        AdapterFormatError: it is no such file, names anything but tensors, or is larger than it looks.
        AdapterTooLarge: it is beyond its limit.
    """
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_Int64, "numpy.dtype"),
        _Int64,
        *((_integer, name) for name in SCALARS),
    ]
    try:
        with open_regular(folder, DIFFERENCES) as file:
            check_archive(file, NAMES, FILES[DIFFERENCES])
            file.seek(0)
            with _reading, torch.serialization.safe_globals(stand_ins):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FAILURES as error:
        raise AdapterFormatError(f"{DIFFERENCES} cannot be read: {show(str(error))}", param=DIFFERENCES) from error
    if not isinstance(content, dict):
        raise AdapterFormatError(f"{DIFFERENCES} must hold a dict", param=DIFFERENCES)
    return content
