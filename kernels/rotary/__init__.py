"""Rotary position embedding of queries and keys, as Llama and most after it rotate: each element with its partner in
the other half of the head.

*Semantics*, for a head x of width d at a token with angles whose cosines and sines are c and s, each step in fp32 and
rounded to x's dtype:

    y[i] = (x[i] * c[i]) + (x'[i] * s[i])      with x'[i] = -x[i + d/2] below d/2, x[i - d/2] from there on
"""

from torch import Tensor

from weft.kernels.dispatch import backend

from . import native, reference

__all__ = ["fits", "rotary"]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: [1, heads, T, d] fp32, bf16 or fp16, d even and contiguous.
        k: [1, kv_heads, T, d] of the same dtype, likewise.
        cos, sin: [1, T, d] of the same dtype, contiguous.

    Returns:
        Tensors of the shapes of q and k, in whose memory the heads of a token lie together.

    Raises:
        ValueError: shapes, strides or dtypes do not fit together.
    """
    if not fits(q, k, cos, sin):
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (q, k, cos, sin))
        raise ValueError(f"q, k, cos and sin do not fit together: {shapes}")
    if backend(q) == "triton":
        from .triton import rotary as launch

        return launch(q, k, cos, sin)
    return (native.rotary if native.supported(q) else reference.rotary)(q, k, cos, sin)


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these can be what `rotary` is given."""
    if q.ndim != 4 or k.ndim != 4:
        return False
    _, _, tokens, width = q.shape
    whole = q.shape[0] == k.shape[0] == 1 and k.shape[2:] == q.shape[2:] and tokens > 0 and width % 2 == 0
    angles = cos.shape == sin.shape == (1, tokens, width) and cos.is_contiguous() and sin.is_contiguous()
    return whole and angles and q.dtype == k.dtype == cos.dtype == sin.dtype and q.stride(3) == k.stride(3) == 1
