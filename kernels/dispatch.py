"""Which implementation of an op serves a tensor."""

from typing import Literal

from torch import Tensor

Backend = Literal["triton", "torch"]


def backend(tensor: Tensor) -> Backend:
    """`triton` for tensors on a CUDA or ROCm device, `torch` for tensors on the CPU.

    Raises:
        ValueError: the tensor lies on a device no op is written for.
    """
    if tensor.is_cuda:  # true for ROCm as well
        return "triton"
    if tensor.is_cpu:
        return "torch"
    raise ValueError(f"no kernel serves device {tensor.device}: move the tensors to cpu or cuda")
