"""Reads an adapter's folder: a config and its tensors, every field and every tensor of which is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weft.adapters.choices import Choice
from weft.adapters.config_fields import ConfigFields, parse_config, show
from weft.adapters.errors import AdapterFormatError, AdapterMismatch
from weft.adapters.files import CONFIG, HUB_WEIGHTS, ROUTER, WEIGHTS, members, open_regular, present, size_limit
from weft.adapters.pickled import PickledTensors

MAX_TENSORS = 1 << 16
MAX_DIMENSION = 1 << 31
MAX_HEADER_BYTES = 32 << 20
DTYPES = ("F32", "F16", "BF16")
INTEGER_DTYPES = ("U8", "I16", "I32", "I64")
"""Of indices; every other tensor is a weight."""


class Tensors:
    """The tensors of a safetensors file or of a pickle (``.bin``), by name; remembers which were taken."""

    def __init__(self, path: Path) -> None:
        """Raises AdapterFormatError if the file cannot be read, or a tensor is a scalar or of another dtype."""
        try:
            self._file: Any = PickledTensors(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
            names = list(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFormatError(f"{path.name} cannot be read: {show(str(error))}", param=path.name) from error
        if len(names) > MAX_TENSORS:
            raise AdapterFormatError(
                f"{path.name} holds {len(names)} tensors; the limit is {MAX_TENSORS}", param=path.name
            )
        self.shapes = {name: self._check_header(name) for name in names}
        self._left = dict.fromkeys(names)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    @property
    def left(self) -> tuple[str, ...]:
        """The tensors that were not taken, in the file's order."""
        return tuple(self._left)

    def take(self, name: str, shape: tuple[int, ...] | None = None, *, integers: bool = False) -> torch.Tensor:
        """The tensor in its own dtype, on the CPU. It may share the file's memory: copy what is kept.

        Args:
            integers: it holds indices; they come as int64, also from whole numbers in float32 (peft on Windows).

        Raises:
            AdapterMismatch: there is no such tensor, or its shape is not ``shape``.
            AdapterFormatError: it holds NaN or infinity, or has integers where weights are needed or the reverse.
        """
        if name not in self.shapes:
            raise AdapterMismatch(f"the tensor {show(name)} is missing", param=name[:200])
        if shape is not None and self.shapes[name] != shape:
            raise AdapterMismatch(
                f"{show(name)} has shape {list(self.shapes[name])}, but the config and the base need {list(shape)}",
                param=name[:200],
            )
        if shape is None and 0 in self.shapes[name]:
            raise AdapterFormatError(
                f"{show(name)} has shape {list(self.shapes[name])}: nothing in it", param=name[:200]
            )
        self._left.pop(name, None)
        tensor: torch.Tensor = self._file.get_tensor(name)
        if integers:
            return _whole(tensor, name)
        if not tensor.is_floating_point():
            raise AdapterFormatError(
                f"{show(name)} holds integers; weights are float32, float16 or bfloat16", param=name[:200]
            )
        if not is_finite(tensor):
            raise AdapterFormatError(f"{show(name)} holds NaN or infinity", param=name[:200])
        return tensor

    def finish(self) -> None:
        """Raise AdapterMismatch if a tensor was not taken."""
        if self._left:
            names = ", ".join(show(name) for name in self.left[:3])
            raise AdapterMismatch(f"{len(self._left)} tensors have no place: {names}", param=self.left[0][:200])

    def _check_header(self, name: str) -> tuple[int, ...]:
        header = self._file.get_slice(name)
        dtype, shape = header.get_dtype(), tuple(header.get_shape())
        if dtype not in DTYPES + INTEGER_DTYPES:
            raise AdapterFormatError(
                f"{show(name)} has dtype {dtype}; weights are float32, float16 or bfloat16", param=name[:200]
            )
        if not shape or max(shape) > MAX_DIMENSION:
            raise AdapterFormatError(f"{show(name)} has shape {list(shape)}, which no weight has", param=name[:200])
        return shape


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is. The extremes are NaN if any value is, and take a tenth of the time of ``isfinite``."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def _whole(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Indices as int64."""
    if tensor.is_floating_point():
        whole = tensor.dtype == torch.float32 and is_finite(tensor) and torch.equal(tensor, tensor.trunc())
        if not whole:
            raise AdapterFormatError(f"{show(name)} must hold integers", param=name[:200])
    return tensor.long()


@dataclass
class PerRequest:
    """What of an adapter depends on the request, as its loader finds out.

    Attributes:
        chosen: values by name, for the variant to compile.
        choices: what the loader asked for.
        invocation: see ``CompiledAdapter.invocation``.
    """

    chosen: Mapping[str, int] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    def choose(self, choice: Choice) -> int:
        """The value to compile with: what was chosen, else the default, else the lowest."""
        self.choices[choice.name] = choice
        value = self.chosen.get(choice.name, choice.low if choice.default is None else choice.default)
        assert choice.low <= value <= choice.high, "requests are checked against the adapter's choices"
        return value


@dataclass(frozen=True)
class Checkpoint:
    """An adapter's config and tensors, each remembering what was used.

    Attributes:
        per_request: what of it depends on the request.
        members: by name, the adapters beside a router, which it chooses between; whoever reads one finishes it.
    """

    config: ConfigFields
    tensors: Tensors
    members: Mapping[str, Checkpoint] = field(default_factory=dict)
    per_request: PerRequest = field(default_factory=PerRequest)

    def finish(self) -> None:
        """Every field and every tensor must have been used by now.

        Raises:
            AdapterUnsupported: a config field was not.
            AdapterMismatch: a tensor was not.
        """
        self.config.finish()
        self.tensors.finish()


def read_checkpoint(folder: Path, chosen: Mapping[str, int] | None = None) -> Checkpoint:
    """Open the adapter in ``folder``, or the router and its members. The weights are mapped, not read: keep the file
    unchanged while in use (the store does).

    Args:
        chosen: what a request chose, by name.

    Raises:
        AdapterFormatError: a file is missing, not a regular file, malformed, or the weights are a pickle.
        AdapterTooLarge: a file is beyond its limit.
    """
    names = members(folder)
    if not names:
        return replace(_read(folder), per_request=PerRequest(chosen or {}))
    router = _read(folder / ROUTER)
    return replace(router, members={name: _read(folder / name) for name in names if name != ROUTER})


def _read(folder: Path) -> Checkpoint:
    weights = [name for name in present(folder) if name in (WEIGHTS, *HUB_WEIGHTS)]
    if len(weights) != 1:
        raise AdapterFormatError(f"the folder holds weights twice: {', '.join(weights)}", param=weights[0])
    return open_checkpoint(folder, CONFIG, weights[0])


def open_checkpoint(folder: Path, config: str, weights: str) -> Checkpoint:
    """Open two files as a config and its tensors; see ``read_checkpoint``."""
    with open_regular(folder, config) as file:
        fields = parse_config(file.read(size_limit(config)))
    return Checkpoint(fields, open_tensors(folder, weights))


def open_tensors(folder: Path, name: str) -> Tensors:
    """Open one file of tensors; see ``read_checkpoint``."""
    with open_regular(folder, name) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if name.endswith(".safetensors") and header_bytes > MAX_HEADER_BYTES:
        raise AdapterFormatError(f"{name} has a header of {header_bytes} bytes", param=name)
    return Tensors(folder / name)
