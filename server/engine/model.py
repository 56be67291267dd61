"""Runs the base model over flat batches: transformers' own module, weft's attention, adapters at every linear."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from weft.adapters.sites import ActiveRows
from weft.server.engine.attention import AttentionContext
from weft.server.engine.batch import Batch
from weft.server.engine.kv_cache import KVCache


class ModelRunner:
    """The model, its KV cache and its adapter sites.

    Args:
        rows: what the sites look at, from ``attach_sites``.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache, rows: ActiveRows, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._rows = rows

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """One forward pass; returns float32 logits ``[N, vocab]`` of the wanted positions."""
        context = AttentionContext(batch.attention, self.cache.keys, self.cache.values)
        self._rows.tokens, self._rows.logits = batch.tokens, batch.logits
        try:
            output: Any = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.logit_indices,
                weft=context,
            )
        finally:
            self._rows.tokens = self._rows.logits = None
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def scrub(self, blocks: list[int]) -> None:
        """Zero pages, so that what is not a number in them cannot reach whoever gets them next."""
        index = torch.tensor(blocks, device=self.device)
        for cache in (*self.cache.keys, *self.cache.values):
            cache.index_fill_(0, index, 0)
