"""The computed filters are those of peft's tables."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet

from weft.adapters.methods.wavelets import FAMILIES, synthesis_filters


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_are_pefts(family: str) -> None:
    wavelet = Wavelet(family)
    expected = torch.tensor([wavelet.rec_lo, wavelet.rec_hi], dtype=torch.float64)
    torch.testing.assert_close(synthesis_filters(family), expected, rtol=0, atol=1e-11)
