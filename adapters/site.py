"""What a site is: a module of the base, the rows that are under way, and where the adapters' rows for it are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from weft.adapters.overlap import Overlap
from weft.adapters.parts import Part
from weft.adapters.slots import SlotPool
from weft.kernels.gated_prefix import Joint
from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows
from weft.kernels.spans import Spans


@dataclass
class ActiveRows:
    """The rows of the forward pass under way, as the sites see them; a linear is given nothing but ``x``.

    Attributes:
        tokens: groups of all tokens of the flat batch; None outside a forward pass.
        logits: groups of the rows whose logits are wanted, for the output embedding.
        embeddings: tokens of the batch, and vectors that stand for them in place of what the embedding returns.
        query: ``[T, heads, d]``, rotated, of the attention that ran last: a layer's output projection is next.
        spans: of the tokens, what gates are means over; None where no row has gates.
        prefix_gates: fp32 ``[T, 2]``, of prefixes that join the attention that runs next, if some row has one.
        joint: what such a prefix must know of that attention, once it ran.
        overlap: what lets low-rank updates begin beside the base's products; None in steps that are not captured.
    """

    tokens: RowGroups | None = None
    logits: RowGroups | None = None
    embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    query: torch.Tensor | None = None
    spans: Spans | None = None
    prefix_gates: torch.Tensor | None = None
    joint: Joint | None = None
    overlap: Overlap | None = None

    def clear(self) -> None:
        """There is no forward pass under way."""
        self.tokens = self.logits = self.spans = self.joint = None
        self.embeddings = self.query = self.prefix_gates = self.overlap = None


class Site(nn.Module):
    """A module of the base and where the adapters' rows for it are."""

    def __init__(self, path: str, pool: SlotPool, rows: ActiveRows) -> None:
        super().__init__()
        self._path = path
        self._pool = pool
        self._rows = rows

    def _active(self, part: Part, groups: RowGroups) -> SlotRows | None:
        """The rows of a part, if some row of the batch has any."""
        rows = self._pool.rows(self._path, part)
        return rows if rows is not None and rows.used_by(groups.active) else None
