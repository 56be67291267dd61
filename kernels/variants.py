"""What a kernel's folder says of itself for compilation ahead of time, without a GPU.

Its ``triton.py`` has a function ``variants``, which yields one ``Variant`` for each way in which the launch compiles a
kernel: the block sizes and features it picks from, at a few shapes and element types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Element types by Triton's names."""

VALUES = "*"
INTEGERS = "*i32"
FLOATS = "*fp32"
FLOAT = "fp32"
MULTIPLE = "i32 of 16"
"""Kinds of arguments: pointers to elements of the kernel's type, to int32 and to fp32; an fp32 number; an integer that
is a multiple of 16 at the widths models have, which the launch specializes on. All others are integers."""

SHARED = {
    **dict.fromkeys(("x", "y"), VALUES),
    **dict.fromkeys(("order", "tiles", "slots", "table", "counts"), INTEGERS),
    **dict.fromkeys(("width", "x_stride", "y_stride"), MULTIPLE),
}
"""The arguments that mean the same in every kernel: rows of a batch, ``RowGroups`` and ``SlotRows``."""


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel.

    Attributes:
        name: for people to read.
        kernel: the function, as ``triton.jit`` made it.
        dtype: its element type, one of ``DTYPES``.
        config: what the launch passes as constants and options.
        arguments: the kind of each argument that is neither a constant nor an integer nor ``SHARED``, by name.
    """

    name: str
    kernel: Any
    dtype: str
    config: Mapping[str, Any]
    arguments: Mapping[str, str] = field(default_factory=dict)
