"""The meaning of the rotary embedding: torch's operators in the order in which transformers' models call them."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `weft.kernels.rotary.rotary`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (_partners(q) * sin), (k * cos) + (_partners(k) * sin)


def _partners(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def heads_of_tokens(like: Tensor) -> Tensor:
    """An empty tensor of the shape of `like`, [1, heads, T, d], in whose memory the heads of a token lie together."""
    _, heads, tokens, width = like.shape
    return torch.empty(1, tokens, heads, width, dtype=like.dtype, device=like.device).transpose(1, 2)
