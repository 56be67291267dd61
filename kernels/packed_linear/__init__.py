"""A linear in bf16 on CPUs with matrix tiles (Intel AMX): its weight is laid out once in the order it is read.

*Semantics*: y = x W^T + bias, sums in fp32, rounded once to bf16, as torch's linear does it. Torch lays the weight out
anew at every call, which for the few rows of a decode step takes longer than the product. Grouped LoRA of few rows is
added in the same call: teams of threads then meet once for both, and y is near.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.kernels import native
from weft.kernels.grouped_lora import grouped_lora, in_passing
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

SOURCE = "packed_linear/amx.c"
_POINTER, _INT, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_ssize_t
SIDE = 32
"""Rows, inputs and outputs come in blocks of as many."""
FEW_ROWS = 512
"""Up to as many rows this is the quicker way; with more, laying the weight out anew is soon paid for."""


Update = tuple[SlotRows, SlotRows, RowGroups]
"""What grouped LoRA adds to a linear's rows: the rows of A and of B, and whose the linear's rows are."""


def supported(weight: Tensor) -> bool:
    """Whether a linear with this weight can be packed here: bf16 on a CPU that has tiles, and a compiler for them."""
    return weight.is_cpu and weight.dtype == torch.bfloat16 and weight.ndim == 2 and native.has_tiles(SOURCE)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A weight in tiles, a copy, and the bias.

    Attributes:
        packed: bf16, flat.
        bias: bf16 [out], contiguous, or None.
        inputs, outputs: of the linear.
    """

    packed: Tensor
    bias: Tensor | None
    inputs: int
    outputs: int
    _linear: Callable[..., int]

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None) -> "PackedLinear":
        """Packs `weight` [out, in], which may be a transposed view.

        Raises:
            ValueError: this weight or bias cannot be packed.
        """
        if not supported(weight):
            raise ValueError(f"a weight of {weight.dtype} {tuple(weight.shape)} on {weight.device} is not packed here")
        if bias is not None and (bias.dtype, bias.shape) != (weight.dtype, weight.shape[:1]):
            raise ValueError(f"a bias {bias.dtype} {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}")
        outputs, inputs = weight.shape
        packed = torch.empty(_rounded(outputs) * _rounded(inputs), dtype=torch.bfloat16)
        pack_weight = native.function(SOURCE, "pack_weight", _POINTER, _POINTER, _INT, _INT, _STRIDE, _STRIDE, _INT)
        pack_weight(weight.data_ptr(), packed.data_ptr(), outputs, inputs, *weight.stride(), torch.get_num_threads())
        linear = native.function(SOURCE, "linear", *[_POINTER] * 4, *[_INT] * 4, _POINTER)
        return cls(packed, None if bias is None else bias.contiguous(), inputs, outputs, linear)

    def __call__(self, x: Tensor, update: Update | None = None) -> Tensor:
        """x [..., in] bf16 to [..., out] bf16, and what adapters add to it.

        Raises:
            ValueError: x or the update does not fit.
            MemoryError: there is none for what lies between x and y.
        """
        if x.dtype != torch.bfloat16 or x.shape[-1] != self.inputs or not x.is_cpu:
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} on {x.device} does not fit a bf16 linear of {self.inputs}")
        rows = x.reshape(-1, self.inputs).contiguous()
        y = torch.empty(len(rows), self.outputs, dtype=torch.bfloat16)
        lora = None if update is None else in_passing(y, rows, *update)
        failed = self._linear(
            rows.data_ptr(),
            self.packed.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            y.data_ptr(),
            len(rows),
            self.inputs,
            self.outputs,
            torch.get_num_threads(),
            None if lora is None else ctypes.addressof(lora),
        )
        if failed:
            raise MemoryError(f"no memory for {len(rows)} rows of {self.inputs}")
        if update is not None and lora is None:
            grouped_lora(y, rows, *update)
        return y.view(*x.shape[:-1], self.outputs)


def _rounded(count: int) -> int:
    return -(-count // SIDE) * SIDE
