"""A linear of the base, which adds what each row's adapter asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.adapters.parts import Part
from weft.adapters.site import ActiveRows, Site
from weft.adapters.slots import SlotPool
from weft.kernels.gated_lora import gated_lora
from weft.kernels.gated_prefix import gated_prefix
from weft.kernels.grouped_affine import grouped_affine
from weft.kernels.grouped_delta import grouped_delta
from weft.kernels.grouped_lora import PackedWeights, expand, grouped_lora, pack, shrink
from weft.kernels.grouped_rotate import grouped_rotate
from weft.kernels.grouped_sparse import grouped_sparse
from weft.kernels.grouped_turn import grouped_turn
from weft.kernels.groups import RowGroups
from weft.kernels.mean_gates import mean_gates
from weft.kernels.packed_linear import FEW_ROWS, PackedLinear
from weft.kernels.packed_linear import supported as packed_linear_supported
from weft.kernels.routed_lora import routed_lora
from weft.kernels.slot_rows import SlotRows

LOW_RANK = frozenset({Part.A, Part.B})


class LinearSite(Site):
    """A linear of the base and the adapters of the rows that pass through it.

    Args:
        linear: the frozen module, ``nn.Linear`` or transformers' ``Conv1D``.
        path: its path in the model.
        pool: where the adapters' weights are.
        rows: shared by all sites of a model.
        output: whether this is the output embedding, which sees only the rows whose logits are wanted.
    """

    def __init__(self, linear: nn.Module, path: str, pool: SlotPool, rows: ActiveRows, *, output: bool) -> None:
        super().__init__(path, pool, rows)
        self.linear = linear
        self._output = output
        self._packed: PackedWeights | None = None
        self._packed_key: tuple[tuple[int, int], ...] = ()
        self._few_rows = _packed_linear(linear)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, which some models read directly."""
        return self.linear.get_parameter("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias, if it has one."""
        return getattr(self.linear, "bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self._rows.logits if self._output else self._rows.tokens
        if groups is None or not groups.active:
            return self._base(x)
        parts = self._pool.parts(self._path)
        if not parts:
            return self._base(x)
        rows = x.reshape(-1, x.shape[-1])
        if parts <= LOW_RANK:  # what most adapters are: no need to look for the rest
            return self._with_low_rank(x, rows, groups)
        rows = self._joined(rows, groups)
        y, planes = self._beside(lambda: self._base(self._input(rows, groups).view_as(x)), rows, groups)
        self._add_adapters(y.view(-1, y.shape[-1]), rows, groups, planes)
        return y

    def _with_low_rank(self, x: torch.Tensor, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        if self._few_rows is not None and len(rows) <= FEW_ROWS and self._rows.overlap is None:
            a, b = self._active(Part.A, groups), self._pool.rows(self._path, Part.B)
            return self._few_rows(x, None if a is None or b is None else (a, b, groups))
        y, planes = self._beside(lambda: self._base(x), rows, groups)
        self._add_low_rank(y.view(-1, y.shape[-1]), rows, groups, planes)
        return y

    def _beside(
        self, product: Callable[[], torch.Tensor], x: torch.Tensor, groups: RowGroups
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What ``product`` returns, and where it pays the first half of the low-rank updates, made at the same time."""
        overlap = self._rows.overlap
        a = self._active(Part.A, groups) if overlap is not None and overlap.pays(groups.num_rows) else None
        if overlap is None or a is None:
            return product(), None
        planes = shrink(x, a, groups, overlap.fork())
        try:
            return product(), planes
        finally:  # after an error as well: x and planes may be freed from here on
            overlap.join()

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        """What the frozen linear makes of ``x``."""
        if self._few_rows is not None and x.numel() <= FEW_ROWS * x.shape[-1]:
            return self._few_rows(x)
        result: torch.Tensor = self.linear(x)
        return result

    def _input(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """What W is given: ``x``, or a copy of it where some row's adapter changes it."""
        gain, rotation = self._active(Part.GAIN_IN, groups), self._active(Part.ROTATE_IN, groups)
        values = self._active(Part.VALUES_IN, groups)
        if gain is not None or values is not None:
            x = x.clone()
        if gain is not None:
            grouped_affine(x, gain, None, groups)
        if rotation is not None:
            straight, x = x, x.clone()
            grouped_rotate(x, straight, rotation, groups)
        if values is not None:
            self._add_prefix(x, values, groups)
        return x

    def _joined(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """``x``, what attention found; where a prefix joins it, a copy."""
        values, joint = self._active(Part.VALUES_JOINT, groups), self._rows.joint
        if values is None:
            return x
        keys, query = self._active(Part.KEYS, groups), self._rows.query
        assert keys is not None and query is not None and joint is not None, "its gates were there before attention"
        self._rows.joint = None
        x = x.clone()
        gated_prefix(x, query, keys, values, groups, joint)
        return x

    def _gates(self, part: Part, gate: SlotRows, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        spans = self._rows.spans
        assert spans is not None, "a batch with gates has spans"
        return mean_gates(x, gate, self._pool.numbers(self._path, part), spans, groups)

    def _add_prefix(self, to: torch.Tensor, values: SlotRows, groups: RowGroups) -> None:
        keys, query = self._active(Part.KEYS, groups), self._rows.query
        assert keys is not None and query is not None, "a prefix has keys, and attention ran before its projection"
        gated_prefix(to, query, keys, values, groups)

    def _add_adapters(
        self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups, planes: torch.Tensor | None = None
    ) -> None:
        turn = self._active(Part.TURN, groups)
        if turn is not None:
            grouped_turn(y, turn, self._pool.numbers(self._path, Part.TURN), groups)
        gain, shift = self._active(Part.GAIN_OUT, groups), self._active(Part.SHIFT, groups)
        if gain is not None or shift is not None:
            grouped_affine(y, gain, shift, groups)
        self._add_low_rank(y, x, groups, planes)
        prototypes = self._active(Part.PROTOTYPES, groups)
        if prototypes is not None:
            a, b = self._active(Part.EXPERT_A, groups), self._active(Part.EXPERT_B, groups)
            assert a is not None and b is not None, "experts have both factors"
            routed_lora(y, x, a, b, prototypes, self._pool.numbers(self._path, Part.PROTOTYPES), groups)
        gate = self._active(Part.GATE, groups)
        if gate is not None:
            a, b = self._active(Part.GATED_A, groups), self._active(Part.GATED_B, groups)
            assert a is not None and b is not None, "gates of a linear have both factors"
            gated_lora(y, x, a, b, gate, self._gates(Part.GATE, gate, x, groups), groups)
        prefix_gate = self._active(Part.PREFIX_GATE, groups)
        if prefix_gate is not None:
            self._rows.prefix_gates = self._gates(Part.PREFIX_GATE, prefix_gate, x, groups)
        delta = self._active(Part.DELTA, groups)
        if delta is not None:
            grouped_delta(y, x, delta, groups)
        sparse = self._active(Part.SPARSE, groups)
        if sparse is not None:
            grouped_sparse(y, x, sparse, groups)
        values = self._active(Part.VALUES_OUT, groups)
        if values is not None:
            self._add_prefix(y, values, groups)
        own = self._active(Part.ROWS, groups)
        if own is not None:
            for slot, start, stop in groups.segments:
                if own.host_counts[slot]:
                    index = groups.order[start:stop].long()
                    y[index[:, None], self._pool.ids(self._path, slot)] = x[index] @ own.of(slot).T

    def _add_low_rank(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups, planes: torch.Tensor | None) -> None:
        a, b = self._active(Part.A, groups), self._pool.rows(self._path, Part.B)
        if a is None or b is None:
            return
        if planes is not None:
            expand(y, planes, b, groups)
        else:
            grouped_lora(y, x, a, b, groups, packing=self._packed_for)

    def _packed_for(self, a: SlotRows, b: SlotRows, active: Sequence[int]) -> PackedWeights:
        """The active slots' factors side by side, kept while neither the slots nor their content change."""
        key = tuple((slot, self._pool.generations[slot]) for slot in active)
        if self._packed is None or key != self._packed_key:
            self._packed = pack(a, b, active)
            self._packed_key = key
        return self._packed


def _packed_linear(linear: nn.Module) -> PackedLinear | None:
    """The linear for few rows, where the machine has something quicker than torch's own."""
    if type(linear) is nn.Linear:
        weight, bias = linear.weight, linear.bias
    elif isinstance(linear, Conv1D):
        weight, bias = linear.weight.T, linear.bias
    else:  # its weight is kept in fewer bits
        return None
    return PackedLinear.pack(weight, bias) if packed_linear_supported(weight) else None
