"""Reads tensors from a pickle that ``torch.save`` wrote, the only format of some adapters: tensors and nothing else.

Nothing is run: torch's own restricted unpickler reads the file (``weights_only``), and before that every name the
pickle refers to must be one that a tensor needs. Nothing is allocated: entries are stored as they are, not compressed,
and tensors are views of the mapped file, which torch does not let grow.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import BinaryIO

import torch

from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterFormatError

MAX_PICKLE_BYTES = 32 << 20
MAX_ENTRIES = 1 << 16
NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
        torch.uint8: "U8",
        torch.int8: "I8",
        torch.int16: "I16",
        torch.int32: "I32",
        torch.int64: "I64",
        torch.bool: "BOOL",
    }
)
"""Dtypes by the names that safetensors has for them."""

_STORAGES = ("Float", "Half", "BFloat16", "Double", "Byte", "Char", "Short", "Int", "Long", "Bool")
_GLOBALS = frozenset(
    ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", *(f"torch {name}Storage" for name in _STORAGES))
)
_BY_NAME = frozenset(("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"))
"""Other opcodes that find objects by name; ``torch.save`` writes none of them."""


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without its values, as safetensors' own reader says it."""

    tensor: torch.Tensor

    def get_dtype(self) -> str:
        return NAMES[self.tensor.dtype]

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


class PickledTensors:
    """The tensors of a file by ``torch.save``, with the methods of ``safetensors.safe_open``."""

    def __init__(self, path: Path) -> None:
        """Raises AdapterFormatError if the file holds anything but a dictionary of dense tensors."""
        try:
            check_archive(path, _GLOBALS, MAX_PICKLE_BYTES)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile, UnpicklingError) as error:
            raise _refused(path, f"cannot be read: {show(str(error))}") from error
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise _refused(path, "holds something else than tensors by name")
        for name, tensor in state.items():
            _check_tensor(path, name, tensor)
        self._state: dict[str, torch.Tensor] = state

    def keys(self) -> list[str]:
        return list(self._state)

    def get_slice(self, name: str) -> Header:
        return Header(self._state[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._state[name]


def check_archive(source: Path | BinaryIO, allowed: Collection[str], max_pickle_bytes: int) -> None:
    """Whether a file is as ``torch.save`` writes it, takes no more memory than its size, and names nothing else.

    Args:
        allowed: ``"module name"`` of all that its pickle may refer to.

    Raises:
        ValueError: what it is or does instead. BadZipFile, OSError: it cannot be read.
    """
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"it has {len(entries)} entries; the limit is {MAX_ENTRIES}")
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > max_pickle_bytes:
            raise ValueError("it has no single pickle of bounded size")
        data = archive.read(pickles[0])
    for code, argument, _ in pickletools.genops(data):
        if code.name in _BY_NAME or (code.name == "GLOBAL" and argument not in allowed):
            raise ValueError(f"its pickle asks for {show(argument or code.name)}, which no tensor needs")


def _check_tensor(path: Path, name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.dtype not in NAMES:
        raise _refused(path, f"holds {show(name)}, which is no dense tensor")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise _refused(path, f"holds {show(name)}, which is larger than its values")


def _refused(path: Path, why: str) -> AdapterFormatError:
    return AdapterFormatError(f"{path.name} {why}", param=path.name)
