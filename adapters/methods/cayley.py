"""Rotations as methods save them: skew-symmetric matrices, made orthogonal by Cayley's transform or its series."""

from __future__ import annotations

import torch


def skew_symmetric(upper: torch.Tensor, size: int) -> torch.Tensor:
    """``[..., size, size]`` of what is above the diagonal, ``[..., size (size − 1) / 2]`` row by row."""
    rows, columns = torch.triu_indices(size, size, 1)
    matrix = upper.new_zeros(*upper.shape[:-1], size, size)
    matrix[..., rows, columns] = upper
    return matrix - matrix.mT


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """(1 − Q) (1 + Q)⁻¹ of matrices ``[..., n, n]``."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype)
    exact: torch.Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return exact


def cayley_series(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """1 + 2 Q + 2 Q² + … with the last power once: (1 + Q) (1 − Q)⁻¹, cut off where peft does."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    if terms == 1:
        return one
    if terms == 2:
        return one + 2 * skew
    # peft goes up to the third power with three terms already.
    power, matrix = skew, one
    for _ in range(1, max(3, terms - 1)):
        matrix, power = matrix + 2 * power, power @ skew
    return matrix + power


def rotation_rows(blocks: torch.Tensor, count: int) -> torch.Tensor:
    """``SiteForms.rotate_in`` of blocks ``[count, size, size]``, or of one, ``[1, size, size]``, that all share."""
    size = blocks.shape[-1]
    rows = (blocks - torch.eye(size, dtype=blocks.dtype)).expand(count, size, size).transpose(0, 1)
    return rows.reshape(size, count * size).float()
