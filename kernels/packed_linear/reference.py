"""The meaning of a packed linear."""

from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] bf16, weight [out, in], bias [out] to [..., out]: sums in fp32, rounded once."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)
