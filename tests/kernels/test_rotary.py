import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama import modeling_llama

from tests.kernels.test_grouped_lora import bits
from weft.kernels.rotary import reference, rotary, triton
from weft.kernels.testing import TOLERANCES, assert_close

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [rotary, triton.rotary])


def inputs(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As models have them: queries and keys of a token side by side."""
    both = torch.randn(1, tokens, heads + kv_heads, width, generator=torch.Generator().manual_seed(tokens))
    q, k = both.to(dtype).transpose(1, 2).split([heads, kv_heads], dim=1)
    angles = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(width))
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@IMPLEMENTATIONS
@given(
    tokens=st.sampled_from([1, 3, 40]),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (12, 12)]),
    width=st.sampled_from([2, 6, 32, 80, 128]),
    dtype=st.sampled_from(list(TOLERANCES)),
)
@settings(deadline=None, max_examples=40)
def test_it_agrees_with_the_reference(implementation, tokens, heads, width, dtype) -> None:
    given_ = inputs(tokens, *heads, width, dtype)
    for y, expected in zip(implementation(*given_), reference.rotary(*given_), strict=True):
        assert y.dtype == dtype and y.shape == expected.shape and y.transpose(1, 2).is_contiguous()
        assert_close(y, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_reference_is_transformers_own(dtype) -> None:
    q, k, cos, sin = inputs(5, 4, 2, 16, dtype)
    for y, expected in zip(
        reference.rotary(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert torch.equal(bits(y), bits(expected))


def test_keys_that_lie_otherwise_than_queries() -> None:
    q, k, cos, sin = inputs(6, 2, 2, 24, torch.float32)
    for ours, theirs in zip(rotary(q.contiguous(), k, cos, sin), rotary(q, k.contiguous(), cos, sin), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_refused() -> None:
    q, k, cos, sin = inputs(3, 2, 2, 8, torch.float32)
    for wrong in (
        (q, k[:, :, :2], cos, sin),
        (q, k.half(), cos, sin),
        (q, k, cos[..., :4], sin[..., :4]),
        (q, k, cos, sin.expand(2, -1, -1)),
        (q[..., :7], k[..., :7], cos[..., :7], sin[..., :7]),
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, sin),
        (q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0]),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            rotary(*wrong)
