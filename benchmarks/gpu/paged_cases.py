"""Random inputs of the kernels that are not grouped by adapter: attention, experts, logits, composition."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from gpu.cases import SLOTS, Case, Draw, implementations
from weft.kernels.expert_groups import device_groups
from weft.kernels.groups import RowGroups
from weft.kernels.logit_mix import MixTerms
from weft.kernels.paged_attention import AttentionRows, LogSumExp
from weft.kernels.slot_rows import SlotRows
from weft.kernels.testing import random_attention


def attention(draw: Draw) -> Case:
    """Rows that decode, prompts in chunks, and both; windows, soft caps and sinks."""
    most, longest = (3, 60) if draw.small else (draw.rng.choice([1, 8, 64]), draw.rng.choice([64, 600, 3000]))
    rows = draw.rng.randint(1, most)
    query = [draw.rng.choice([1, 1, draw.rng.randint(1, 20 if draw.small else 300)]) for _ in range(rows)]
    kv_heads, group = draw.rng.choice(
        [(1, 1), (2, 2), (2, 3), (1, 7)] if draw.small else [(8, 4), (8, 1), (2, 7), (4, 8)]
    )
    d = draw.rng.choice([16, 20, 33] if draw.small else [64, 80, 96, 128, 256])
    case = random_attention(
        query,
        [count + draw.rng.randint(0, longest) for count in query],
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=d,
        page_size=draw.rng.choice([8, 16, 32]),
        dtype=draw.dtype,
        seed=draw.seed,
    )
    options = {
        "scale": d**-0.5,
        "window": draw.rng.choice([None, None, draw.rng.randint(1, 100)]),
        "softcap": draw.rng.choice([None, None, 30.0]),
        "sinks": draw.rng.choice([None, None, draw.normal(kv_heads * group).to(draw.dtype)]),
    }
    lse = torch.full((sum(query), kv_heads * group), float("nan"))
    args = case.q, case.k_cache, case.v_cache, case.rows, LogSumExp(lse, tuple(range(rows)))
    launch, reference = implementations("paged_attention", "paged_attention")
    return Case(_both(launch), _both(reference), args, (), options)


def _both(function: Any) -> Any:
    """Attention's output and its denominators."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, rows: AttentionRows, lse: LogSumExp, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return function(q, k, v, rows, lse=lse, **options), lse.values

    return run


def write_kv(draw: Draw) -> Case:
    kv_heads, d = (2, 20) if draw.small else (draw.rng.choice([1, 2, 8]), draw.rng.choice([64, 80, 128]))
    pages, page, tokens = 40, 16, draw.rng.randint(1, 200)
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(draw.seed))[:tokens]
    caches = [torch.full((pages, page, kv_heads, d), float("nan"), dtype=draw.dtype) for _ in range(2)]
    new = [draw.normal(kv_heads, tokens, d).to(draw.dtype).transpose(0, 1) for _ in range(2)]
    touched = torch.zeros(pages * page, dtype=torch.bool)
    touched[slots] = True
    mask = touched.view(pages, page, 1, 1).expand_as(caches[0])
    return Case(*implementations("paged_attention", "write_kv"), (*caches, *new, slots), ((0, mask), (1, mask)))


def experts(draw: Draw) -> Case:
    """Pairs of a token and an expert, grouped on the device."""
    slots = draw.slots()
    slots[0] = 0
    tokens, count, chosen = RowGroups.build(slots, "cpu"), draw.rng.choice([2, 8, 32]), draw.rng.randint(1, 3)
    pairs = len(slots) * chosen
    gen = torch.Generator().manual_seed(draw.seed)
    token, expert = torch.randperm(pairs, generator=gen) // chosen, torch.randint(count, (pairs,), generator=gen)
    ranks, (width_in, width_out) = draw.counts(0, 1, 8, 16), (draw.width(2560), draw.width(2560))
    a = _expert_rows(draw, ranks, count, width_in, width_in**-0.5)
    b = _expert_rows(draw, ranks, count, width_out, max(ranks) ** -0.5)
    own = [slots[t] for t in token.tolist()]
    y, x = draw.rows(pairs, width_out), draw.rows(pairs, width_in)
    touched = torch.tensor([slot >= 0 and ranks[slot] > 0 for slot in own])[:, None].expand_as(y)

    grouped, _ = implementations("grouped_lora", "grouped_lora")
    meant = importlib.import_module("weft.kernels.grouped_expert_lora.reference").grouped_expert_lora

    def launch(
        y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, tokens: RowGroups, token: Tensor, expert: Tensor
    ) -> None:
        grouped(y, x, a, b, device_groups(tokens, token, expert, experts=count, num_slots=SLOTS))

    def reference(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, *_: Any) -> None:
        meant(y, x, a, b, own, expert.tolist())

    return Case(launch, reference, (y, x, a, b, tokens, token, expert), ((0, touched),))


def _expert_rows(draw: Draw, ranks: list[int], experts: int, width: int, scale: float) -> SlotRows:
    """Rows of every slot's experts, and an entry without any."""
    rows = draw.pool([rank for rank in ranks for _ in range(experts)] + [0], width, scale)
    return dataclasses.replace(rows, host_counts=tuple(ranks), experts=experts)


def mix(draw: Draw) -> Case:
    """Weighed logits; always fp32."""
    vocab, sources = (700, 5) if draw.small else (draw.rng.choice([32000, 128256, 151936]), 40)
    terms = [
        [(draw.rng.randrange(sources), draw.rng.uniform(-2, 2)) for _ in range(draw.rng.randint(0, 4))]
        for _ in range(draw.rng.randint(1, 6 if draw.small else 32))
    ]
    widths = [draw.rng.choice([vocab, vocab - 3]) for _ in terms]
    out, source = draw.normal(len(terms), vocab), draw.normal(sources, vocab)
    source[:, vocab - 3 :] = torch.where(torch.tensor(widths).amax() < vocab, float("nan"), source[:, vocab - 3 :])
    touched = (torch.arange(vocab) < torch.tensor(widths)[:, None]) & torch.tensor([bool(mine) for mine in terms])[
        :, None
    ]
    args = out, source, MixTerms.build(terms, widths, "cpu")
    return Case(*implementations("logit_mix", "logit_mix"), args, ((0, touched),))


def weighted(draw: Draw) -> Case:
    """Rows of a pool as weighed sums of others of it."""
    rows, terms, width = draw.rng.randint(1, 20), draw.rng.randint(1, 20), draw.width()
    gen = torch.Generator().manual_seed(draw.seed)
    read = max(1, rows * terms // 2)
    places = torch.randperm(rows + read + 3, generator=gen).int()
    where, sources = places[:rows], places[rows : rows + read]
    pool = torch.full((rows + read + 3, width), float("nan"), dtype=draw.dtype)
    pool[sources.long()] = torch.randn(read, width, generator=gen).to(draw.dtype)
    index = sources[torch.randint(read, (rows, terms), generator=gen)]
    index = torch.where(torch.rand(rows, terms, generator=gen) < 0.2, -1, index).int().contiguous()
    index[:, 0] = sources[0]
    touched = torch.zeros(len(pool), dtype=torch.bool)
    touched[where.long()] = True

    def within(function: Any) -> Any:
        return lambda pool, where, index, weights: function(pool, where, pool, index, weights)

    launch, reference = implementations("weighted_sum", "weighted_sum")
    return Case(
        within(launch),
        within(reference),
        (pool, where, index, draw.normal(rows, terms)),
        ((0, touched[:, None].expand_as(pool)),),
    )
