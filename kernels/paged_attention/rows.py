"""Rows of a batch and where their keys and values lie: the metadata of paged attention, built once per step."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from weft.kernels.groups import to_device

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LogSumExp:
    """Where the logarithms of the softmax's denominators are written, so that more can join a softmax afterwards.

    Attributes:
        values: fp32 [T, heads], contiguous; those of other rows' tokens may be anything.
        rows: on the host, the rows whose tokens' are wanted.
    """

    values: Tensor
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionRows:
    """R rows of one flat batch of T new tokens; row r's tokens are adjacent.

    Attributes:
        query_starts: int32 [R + 1] on the device, where each row's new tokens start in the batch.
        context_lens: int32 [R] on the device, each row's tokens in total, the new ones included.
        page_table: int32 [R, max_pages] on the device; entries beyond a row's pages are 0 and never read.
        slot_mapping: int64 [T] on the device, where each new token lies in the cache: page * page_size + offset.
        positions: int64 [T] on the device, each new token's position in its row.
        query_lens, total_lens, page_tables: the same on the host.
        page_size: tokens of a page.
    """

    query_starts: Tensor
    context_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    positions: Tensor
    query_lens: tuple[int, ...]
    total_lens: tuple[int, ...]
    page_tables: np.ndarray[Any, np.dtype[np.int32]]
    page_size: int
    _plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        page_tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str,
    ) -> "AttentionRows":
        """Builds the metadata of a step on the host; the copies to `device` are asynchronous.

        Args:
            query_lens: new tokens of each row, at least 1.
            context_lens: tokens of each row in total, the new ones included.
            page_tables: pages of each row in the order of its tokens; more than it needs is allowed.
            page_size: tokens of a page.

        Raises:
            ValueError: lengths disagree, or a row has too few pages.
        """
        _check(query_lens, context_lens, page_tables, page_size)
        query, total = np.asarray(query_lens, dtype=np.int64), np.asarray(context_lens, dtype=np.int64)
        tables = np.zeros((len(query), max(map(len, page_tables), default=0)), dtype=np.int32)
        for table, pages in zip(tables, page_tables, strict=True):
            table[: len(pages)] = pages
        starts = np.concatenate([[0], np.cumsum(query)])
        row = np.repeat(np.arange(len(query)), query)
        positions = np.arange(starts[-1]) - starts[row] + (total - query)[row]
        slots = tables[row, positions // page_size].astype(np.int64) * page_size + positions % page_size
        long = to_device(np.concatenate([slots, positions]), device)
        short = to_device(np.concatenate([starts, total, tables.ravel()]).astype(np.int32), device)
        starts_d, total_d, tables_d = short.split([len(starts), len(total), tables.size])
        slots_d, positions_d = long.chunk(2) if len(slots) else (long, long)
        lens = tuple(query.tolist()), tuple(total.tolist())
        return cls(starts_d, total_d, tables_d.view(tables.shape), slots_d, positions_d, *lens, tables, page_size)

    @property
    def num_tokens(self) -> int:
        """New tokens of the batch."""
        return self.slot_mapping.shape[0]

    @property
    def decoding(self) -> bool:
        """Whether every row has one new token."""
        return self.num_tokens == len(self.query_lens)

    def plan(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returned for `key` this step: layers that need the same plan share one."""
        if key not in self._plans:
            self._plans[key] = build()
        plan: T = self._plans[key]
        return plan


def _check(
    query_lens: Sequence[int], context_lens: Sequence[int], page_tables: Sequence[Sequence[int]], page_size: int
) -> None:
    if not len(query_lens) == len(context_lens) == len(page_tables):
        raise ValueError(
            f"query_lens has {len(query_lens)} rows, context_lens {len(context_lens)}, page_tables {len(page_tables)}"
        )
    for row, (query, total, pages) in enumerate(zip(query_lens, context_lens, page_tables, strict=True)):
        if not 1 <= query <= total:
            raise ValueError(f"row {row} has query_lens {query} of context_lens {total}: need 1 <= query <= context")
        if len(pages) * page_size < total:
            raise ValueError(f"row {row} has {len(pages)} pages of {page_size} for {total} tokens")
