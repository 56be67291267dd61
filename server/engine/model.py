"""Runs the base model over flat batches: transformers' own module, weft's attention, adapters at every linear."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from weft.adapters.forms import PrefixKV
from weft.adapters.overlap import Overlap
from weft.adapters.site import ActiveRows
from weft.kernels.groups import to_device
from weft.kernels.paged_attention import paged_attention
from weft.kernels.paged_attention.backends import Attend
from weft.server.engine.attention import AttentionContext
from weft.server.engine.batch import Batch
from weft.server.engine.kv_cache import KVCache
from weft.server.engine.side import SideNetworks


class ModelRunner:
    """The model, its KV cache and its adapter sites.

    Args:
        rows: what the sites look at, from ``attach_sites``.
        side: the networks that run beside it.
        attend: computes paged attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        rows: ActiveRows,
        side: SideNetworks,
        device: torch.device,
        attend: Attend = paged_attention,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self.side = side
        self._rows = rows
        self._attend = attend

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """One forward pass; returns float32 logits ``[N, vocab]`` of the wanted positions."""
        self._copy_pages(batch.copies)
        return self.compute(batch).float()

    @torch.inference_mode()
    def compute(self, batch: Batch, overlap: Overlap | None = None) -> torch.Tensor:
        """``forward`` without what a captured step has no part in: the logits are of the model's dtype.

        Args:
            overlap: for captured steps. In others the host is what a step waits for, and parting gives it more to do.
        """
        context = AttentionContext(batch.attention, self.cache.keys, self.cache.values, self._rows, self._attend)
        self._rows.tokens, self._rows.logits, self._rows.embeddings = batch.tokens, batch.logits, batch.embeddings
        self._rows.spans, self._rows.overlap = batch.spans, overlap
        try:
            self.side.begin(batch)
            output: Any = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_indices,
                weft=context,
            )
        finally:
            self._rows.clear()
            self.side.end()
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def write_prefix(self, blocks: list[int], prefix: PrefixKV) -> None:
        """Put an adapter's own keys and values into pages."""
        size = self.cache.block_size
        at = torch.arange(prefix.length)
        index = (torch.tensor(blocks)[at // size] * size + at % size).to(self.device)
        for caches, tensors in ((self.cache.keys, prefix.keys), (self.cache.values, prefix.values)):
            for cache, tensor in zip(caches, tensors, strict=True):
                cache.flatten(0, 1).index_copy_(0, index, tensor.to(cache))

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        if copies:
            source, target = to_device(np.array(copies), self.device).T
            for cache in (*self.cache.keys, *self.cache.values, *self.side.tensors()):
                cache.index_copy_(0, target, cache.index_select(0, source))

    def scrub(self, blocks: list[int]) -> None:
        """Zero pages, so that what is not a number in them cannot reach whoever gets them next."""
        index = to_device(np.array(blocks, dtype=np.int64), self.device)
        for cache in (*self.cache.keys, *self.cache.values, *self.side.tensors()):
            cache.index_fill_(0, index, 0)
