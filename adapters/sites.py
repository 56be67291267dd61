"""Attaches the forms to a model's modules: linears, norms and the embedding become sites."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from weft.adapters.base import Base
from weft.adapters.linear_site import LinearSite
from weft.adapters.parts import Part
from weft.adapters.site import ActiveRows, Site
from weft.adapters.slots import SlotPool
from weft.adapters.sublayers import SublayerHooks
from weft.kernels.grouped_affine import grouped_affine
from weft.kernels.grouped_rotate import grouped_rotate
from weft.kernels.groups import RowGroups


class NormSite(Site):
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


class EmbeddingSite(Site):
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
