"""Waiting requests: a queue per adapter, served fairly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from weft.server.engine.sequence import Sequence

LOOK_AHEAD = 8
"""Compositions at the beginning of a queue of them that are looked at in one step."""
LOOK_AT = 256
"""Requests among which they are looked for: a search for weights asks many of each, one after the other."""


class FairQueues:
    """One queue per adapter name; the adapter that has been served least goes first.

    Service is counted in tokens (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, the virtual
    token counter). An adapter that comes back from idleness starts at the least counter among those waiting, so that
    it neither has to catch up nor can bank credit. Within a queue requests are served by priority, then arrival.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Sequence]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def counts(self) -> dict[str, int]:
        """Waiting requests by adapter name."""
        return {name: len(queue) for name, queue in self._queues.items()}

    def push(self, seq: Sequence) -> None:
        """Add a request behind those of its adapter with the same priority."""
        queue = self._queue(seq.name)
        at = len(queue)
        while at and _order(queue[at - 1]) > _order(seq):
            at -= 1
        queue.insert(at, seq)

    def remove(self, seq: Sequence) -> None:
        """Take a waiting request out."""
        queue = self._queues[seq.name]
        queue.remove(seq)
        if not queue:
            del self._queues[seq.name]

    def charge(self, name: str, tokens: int) -> None:
        """Count ``tokens`` of service to an adapter."""
        self._served[name] = self._served.get(name, 0.0) + tokens

    def next(self, eligible: Callable[[Sequence], bool]) -> Sequence | None:
        """The head to serve next among the queues whose head is ``eligible``; it stays queued.

        Compositions of one name may each be another adapter, so the next few of them are as good as heads: they are
        made at the same time, and none waits for the one before it to be there.
        """
        heads = sorted(
            (seq for queue in self._queues.values() for seq in _heads(queue)),
            key=lambda seq: (seq.request.priority, self._served.get(seq.name, 0.0), seq.arrival),
        )
        return next((seq for seq in heads if eligible(seq)), None)

    def forget(self, name: str) -> None:
        """Drop the counter of an adapter that is gone."""
        if name not in self._queues:
            self._served.pop(name, None)

    def _queue(self, name: str) -> deque[Sequence]:
        if name not in self._queues:
            waiting = [self._served.get(other, 0.0) for other in self._queues]
            self._served[name] = max(self._served.get(name, 0.0), min(waiting, default=0.0))
            self._queues[name] = deque()
        return self._queues[name]


def _heads(queue: deque[Sequence]) -> Iterator[Sequence]:
    """The first request of a queue, or of each of the compositions that it begins with."""
    seen = set()
    for seq in islice(queue, LOOK_AT):
        if seq.adapter not in seen:
            yield seq
        seen.add(seq.adapter)
        if seq.request.composition is None or len(seen) == LOOK_AHEAD:
            return


def _order(seq: Sequence) -> tuple[int, int]:
    return seq.request.priority, seq.arrival
