"""The synthesis filters of Daubechies' orthogonal wavelets, computed ("Ten Lectures on Wavelets", 1992, ch. 6 and 8).

A wavelet with n vanishing moments has a low-pass filter with n zeros at -1 and n - 1 more, which are the roots of a
known polynomial, each or its inverse. ``dbN`` takes those inside the unit circle, ``symN`` a choice with nearly linear
phase. Both are normalised to the sum √2.
"""

from __future__ import annotations

import math

import numpy as np
import torch

OUTSIDE = {2: (), 3: (), 4: (1,), 5: (0,), 6: (0, 2), 7: (0,), 8: (1, 3), 9: (1, 2), 10: (0, 2, 4)}
"""By n, which groups of roots ``symN`` takes from outside, in the order of ``_root_groups``."""

FAMILIES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in OUTSIDE))


def synthesis_filters(family: str) -> torch.Tensor:
    """``[2, 2 n]``: the low-pass and the high-pass filter of one of ``FAMILIES``, fp64."""
    name = family.rstrip("0123456789")
    moments = int(family.removeprefix(name))
    outside = OUTSIDE[moments] if name == "sym" else ()
    low = np.array([1.0])
    for _ in range(moments):
        low = np.convolve(low, [1, 1])
    for index, roots in enumerate(_root_groups(moments)):
        for root in roots:
            low = np.convolve(low, [1, -1 / root if index in outside else -root])
    low = low.real * math.sqrt(2) / low.real.sum()
    signs = (-1.0) ** np.arange(len(low))
    return torch.from_numpy(np.stack([low, signs * low[::-1]]))


def _root_groups(moments: int) -> list[list[complex]]:
    """The roots inside the unit circle, each with its conjugate; real ones first, then the largest real part."""
    # Of P(y) = Σ C(n − 1 + k, k) y^k in y = (2 − z − 1/z) / 4.
    groups = []
    for y in np.roots([math.comb(moments - 1 + k, k) for k in reversed(range(moments))]):
        if y.imag < -1e-9:
            continue
        inside = min(np.roots([1, 4 * y - 2, 1]).astype(complex), key=abs)
        groups.append([inside] if abs(y.imag) < 1e-9 else [inside, inside.conjugate()])
    return sorted(groups, key=lambda roots: (len(roots), -roots[0].real))
