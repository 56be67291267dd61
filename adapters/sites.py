"""Attaches forms to a model's modules: every linear becomes a site that adds what each row's adapter asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from weft.adapters.base import Base
from weft.adapters.overlap import Overlap
from weft.adapters.parts import Part
from weft.adapters.slots import SlotPool
from weft.adapters.sublayers import SublayerHooks
from weft.kernels.gated_lora import gated_lora
from weft.kernels.gated_prefix import Joint, gated_prefix
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
from weft.kernels.spans import Spans

LOW_RANK = frozenset({Part.A, Part.B})


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


class _Site(nn.Module):
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


class LinearSite(_Site):
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
        if self._few_rows is not None and len(rows) <= FEW_ROWS:
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


class NormSite(_Site):
    """A norm of the base, and adapters that have a weight or bias of their own for it."""

    def __init__(self, norm: nn.Module, path: str, pool: SlotPool, rows: ActiveRows) -> None:
        super().__init__(path, pool, rows)
        self.norm = norm

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, which some models read directly."""
        return self.norm.get_parameter("weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x)
        groups = self._rows.tokens
        if groups is None:
            return y
        own = {part: rows for part in (Part.WEIGHT, Part.BIAS) if (rows := self._active(part, groups)) is not None}
        if not own:
            return y
        # Norms within attention see several vectors of a token, one a head, before or behind the dimension of tokens.
        # Where there are as many heads as tokens, the tokens are further apart in memory.
        tokens = max((dim for dim in range(x.ndim - 1) if x.shape[dim] == groups.num_rows), key=x.stride)
        inputs, outputs = x.movedim(tokens, 0), y.movedim(tokens, 0)
        for slot, start, stop in groups.segments:
            # A norm applies its weight in a way of its own (Gemma's is an offset from 1), so it is asked itself.
            tensors = {part.value: rows.of(slot)[0] for part, rows in own.items() if rows.host_counts[slot]}
            if tensors:
                index = groups.order[start:stop].long()
                outputs.index_copy_(0, index, functional_call(self.norm, tensors, (inputs[index],)))
        return y


class EmbeddingSite(_Site):
    """The token embedding of the base, what adapters change about it, and virtual tokens, which have no id."""

    def __init__(self, embedding: nn.Module, path: str, pool: SlotPool, rows: ActiveRows) -> None:
        super().__init__(path, pool, rows)
        self.embedding = embedding

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, which some models read directly."""
        return self.embedding.get_parameter("weight")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.embedding(ids)
        groups = self._rows.tokens
        if groups is not None and groups.active:
            self._add_adapters(vectors.view(-1, vectors.shape[-1]), ids.flatten(), groups)
        if self._rows.embeddings is not None:
            places, virtual = self._rows.embeddings
            vectors.view(-1, vectors.shape[-1]).index_copy_(0, places, virtual.to(vectors.dtype))
        return vectors

    def _add_adapters(self, vectors: torch.Tensor, ids: torch.Tensor, groups: RowGroups) -> None:
        gain, a, b, own = (self._active(part, groups) for part in (Part.GAIN_OUT, Part.A, Part.B, Part.ROWS))
        rotation = self._active(Part.ROTATE_IN, groups)
        if rotation is not None:
            grouped_rotate(vectors, vectors.clone(), rotation, groups)
        if gain is None and a is None and own is None:
            return
        grouped_affine(vectors, gain, None, groups)
        for slot, start, stop in groups.segments:
            index = groups.order[start:stop].long()
            tokens = ids[index]
            if a is not None and b is not None and a.host_counts[slot]:
                # The input is one-hot, so the product with A is a choice of its columns.
                vectors.index_add_(0, index, a.of(slot)[:, tokens].T @ b.of(slot))
            if own is not None and own.host_counts[slot]:
                known = self._pool.ids(self._path, slot)
                at = torch.searchsorted(known, tokens).clamp_(max=len(known) - 1)
                found = (known[at] == tokens).unsqueeze(1)
                vectors.index_copy_(0, index, torch.where(found, own.of(slot)[at], vectors[index]))


def attach_sites(model: PreTrainedModel, base: Base, pool: SlotPool) -> ActiveRows:
    """Replace every linear of ``model`` by a site; returns what the sites look at during a forward pass.

    The base's weights are neither copied nor changed.
    """
    rows = ActiveRows()
    output = model.get_output_embeddings()
    for path in base.sites:
        linear = model.get_submodule(path)
        model.set_submodule(path, LinearSite(linear, path, pool, rows, output=linear is output))
    for path in base.norms:
        model.set_submodule(path, NormSite(model.get_submodule(path), path, pool, rows))
    for path, sublayer in base.sublayers.items():
        SublayerHooks(path, pool, rows).attach(model.get_submodule(sublayer.norm), model.get_submodule(path))
    assert base.embedding is not None, "a base that is loaded has an embedding"
    model.set_input_embeddings(EmbeddingSite(model.get_input_embeddings(), base.embedding.path, pool, rows))
    return rows
