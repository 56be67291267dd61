"""How the CPU path cuts a step into buckets of rows: computed once per step and window, shared by all layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import AttentionRows

# Padding a row to its bucket's length gathers and scores tokens that are nobody's; another bucket costs its calls,
# about as much as this many tokens.
TOKENS_PER_BUCKET = 256


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows of one query length that attend together.

    Attributes:
        tokens: their tokens in the batch, row after row; a slice where they are adjacent.
        num_rows: how many they are.
        query_len: new tokens of each.
        pages: int64 [num_rows * pages per row], what to gather from the cache.
        length: keys of the longest row, counted from the first gathered page.
        empty: int64, gathered tokens below `length` that may not be the row's own; None if there are none.
        mask: additive [num_rows or 1, 1, query_len, length], None where nothing is masked or `causal` says it all.
        causal: every row starts at its first key, and sees all up to itself.
    """

    tokens: slice | Tensor
    num_rows: int
    query_len: int
    pages: Tensor
    length: int
    empty: Tensor | None
    mask: Tensor | None
    causal: bool


def plan(rows: AttentionRows, window: int | None, dtype: torch.dtype, *, decode: bool) -> tuple[Bucket, ...]:
    """The buckets of a step, for a sliding window (None: none) and masks of `dtype`; with or without decoding rows."""
    return rows.plan(("cpu", window, dtype, decode), lambda: _build(rows, window, dtype, decode))


def _build(rows: AttentionRows, window: int | None, dtype: torch.dtype, decode: bool) -> tuple[Bucket, ...]:
    decoding = [r for r, query in enumerate(rows.query_lens) if query == 1] if decode else []
    alike: dict[tuple[int, int], list[int]] = {}
    for r, (query, total) in enumerate(zip(rows.query_lens, rows.total_lens, strict=True)):
        if query > 1:
            alike.setdefault((query, total), []).append(r)
    members = [*_by_length(rows, decoding, window), *alike.values()]
    return tuple(_bucket(rows, sorted(chosen), window, dtype) for chosen in members)


def _first_page(rows: AttentionRows, r: int, window: int | None) -> int:
    """The first page that a new token of row r can see into."""
    if window is None:
        return 0
    return max(0, rows.total_lens[r] - rows.query_lens[r] - window + 1) // rows.page_size


def _by_length(rows: AttentionRows, members: list[int], window: int | None) -> list[list[int]]:
    """Buckets of decode rows: longest first, a new one when the padding so far would pay for it."""
    spans = {r: -(-rows.total_lens[r] // rows.page_size) - _first_page(rows, r, window) for r in members}
    buckets: list[list[int]] = []
    longest = wasted = 0
    for r in sorted(members, key=lambda r: -spans[r]):
        wasted += longest - spans[r]
        if not buckets or wasted * rows.page_size > TOKENS_PER_BUCKET:
            buckets.append([])
            longest, wasted = spans[r], 0
        buckets[-1].append(r)
    return buckets


def _bucket(rows: AttentionRows, members: list[int], window: int | None, dtype: torch.dtype) -> Bucket:
    size = rows.page_size
    first = torch.tensor([_first_page(rows, r, window) for r in members])
    total = torch.tensor([rows.total_lens[r] for r in members])
    lengths = total - first * size
    length, query_len = int(lengths.max()), rows.query_lens[members[0]]
    # Padding repeats the row's first gathered page, which holds nothing but the row's own tokens if it has a second.
    wanted = torch.arange(-(-length // size))
    used = wanted * size < lengths[:, None]
    tables = torch.from_numpy(rows.page_tables)[torch.tensor(members)].long()
    pages = tables.gather(1, first[:, None] + wanted * used)
    keys = torch.arange(len(wanted) * size)
    # Only a row's last page can hold what is not its own, and it is repeated only where it is the first one too.
    last = (lengths[:, None] - 1) // size
    foreign = (keys >= lengths[:, None]) & (keys < length) & ((keys // size == last) | (last == 0))
    empty = foreign.flatten().nonzero().flatten()
    at = (lengths - query_len)[:, None, None] + torch.arange(query_len)[:, None]
    seen = keys[:length] <= at
    if window is not None:
        seen &= keys[:length] > at - window
    causal = query_len == length and bool(seen[:, -1].all())
    return Bucket(
        tokens=_tokens(rows, members, query_len),
        num_rows=len(members),
        query_len=query_len,
        pages=pages.flatten(),
        length=length,
        empty=empty if len(empty) else None,
        mask=None if causal or seen.all() else _additive(seen, dtype),
        causal=causal,
    )


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    if len(seen) > 1 and bool((seen == seen[0]).all()):
        seen = seen[:1]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf")).unsqueeze(1)


def _tokens(rows: AttentionRows, members: list[int], query_len: int) -> slice | Tensor:
    starts = rows.query_starts[torch.tensor(members)].long()
    tokens = (starts[:, None] + torch.arange(query_len)).flatten()
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens
