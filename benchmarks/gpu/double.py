"""What a reference computes in fp64: the one in ``weft.kernels`` itself, with every ``float32`` in it read as fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Widened(TorchFunctionMode):
    """The references sum in fp32 and say so by ``Tensor.float``; here that is fp64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        given = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **given)


@contextmanager
def in_double() -> Iterator[None]:
    """Whatever says ``.float()`` or leaves the dtype open computes in fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widened():
            yield
    finally:
        torch.set_default_dtype(before)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor changed: those in dicts, tuples, lists and frozen dataclasses as well."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(mapped(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Plans belong to a step and a device: a copy makes its own.
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "_plans"}
        return dataclasses.replace(
            value, **{name: mapped(each, change) for name, each in named.items()}, **_plans_of(value)
        )
    return value


def _plans_of(value: Any) -> dict[str, Any]:
    return {"_plans": {}} if hasattr(value, "_plans") else {}


def widened(value: Any) -> Any:
    """A copy in fp64: floating tensors are cast, integers are as they were."""
    return mapped(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone())


def moved(value: Any, device: torch.device) -> Any:
    """A copy on ``device``; strides, and what lies between strided rows, stay."""
    return mapped(value, lambda tensor: _moved(tensor, device))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_contiguous() or 0 in tensor.shape:
        return tensor.to(device, copy=True)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    held = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(
        device, copy=True
    )
    assert tensor.storage_offset() + last <= len(held), "a view lies within its storage"
    return held.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the expected value, or to the expected values' root mean square where that is
    larger; NaN if anything is.

    Args:
        expected: fp64 of the same shape.
    """
    if not expected.numel():
        return 0.0
    scale = expected.square().mean().sqrt().clamp_min(1e-30)
    return float(((actual.double() - expected).abs() / torch.maximum(expected.abs(), scale)).amax())
