"""Kernels run under Triton's interpreter here, which is chosen when triton is first imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

if not isinstance(tl.standard.sum, interpreter.InterpretedFunction):
    raise pytest.UsageError(
        "triton was imported before TRITON_INTERPRET was set: set TRITON_INTERPRET=1 in the environment or in "
        "tests/conftest.py"
    )


@pytest.fixture(autouse=True, scope="session")
def bfloat16_products() -> None:
    """The interpreter keeps bf16 as uint16, which numpy has no type for, and multiplies those integers: widen them."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return multiply(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
