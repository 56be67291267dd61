"""Which rows a batch of llama.cpp has, whose adapter is that of a whole batch; the standard library alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Row:
    """One request under way.

    Attributes:
        index: which request.
        pending: tokens the cache does not have yet: the prompt, then the last token.
        left: tokens still to come.
        sequence: where its cache is; -1 before it has any.
        position: tokens in the cache.
    """

    index: int
    pending: list[int]
    left: int
    sequence: int = -1
    position: int = 0


class Turns:
    """Adapters take turns, those with prompts first; a batch is prompts or a token of every row, all of one adapter.

    Rows of an adapter are kept on neighbouring sequences, as far as they are free: llama.cpp computes those together,
    and others one after another.
    """

    def __init__(self, adapters: Sequence[str | None], sequences: int, batch_tokens: int) -> None:
        self._turn = deque(adapters)
        self._home = {name: number * sequences // len(adapters) for number, name in enumerate(adapters)}
        self._waiting: dict[str | None, deque[Row]] = {name: deque() for name in adapters}
        self._running: dict[str | None, list[Row]] = {name: [] for name in adapters}
        self._free = set(range(sequences))
        self._sequences, self._batch_tokens = sequences, batch_tokens

    def add(self, row: Row, adapter: str | None) -> None:
        """A request; its prompt waits for a sequence."""
        self._waiting[adapter].append(row)

    def next(self) -> tuple[str | None, list[Row]]:
        """The adapter whose turn it is and its rows, by sequence; there must be a request."""
        prompts = [name for name in self._turn if self._waiting[name] and self._free]
        adapter = (prompts or [name for name in self._turn if self._running[name]])[0]
        self._turn.remove(adapter)
        self._turn.append(adapter)
        rows = self._admit(adapter) if prompts else self._running[adapter]
        return adapter, sorted(rows, key=lambda row: row.sequence)

    def end(self, row: Row, adapter: str | None) -> None:
        """A row that has all its tokens gives its sequence back."""
        self._running[adapter].remove(row)
        self._free.add(row.sequence)

    def _admit(self, adapter: str | None) -> list[Row]:
        """As many prompts as a batch and the free sequences hold; one at least."""
        prompts, admitted, tokens = self._waiting[adapter], list[Row](), 0
        while prompts and self._free and tokens + len(prompts[0].pending) <= self._batch_tokens:
            row = prompts.popleft()
            tokens += len(row.pending)
            row.sequence = min(self._free, key=lambda s: (s - self._home[adapter]) % self._sequences)
            self._free.remove(row.sequence)
            admitted.append(row)
        self._running[adapter] += admitted
        return admitted
