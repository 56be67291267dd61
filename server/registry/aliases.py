"""What each id of an adapter stands for now, and which requests hold that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from weft.server.errors import Conflict, NotFound
from weft.server.registry.records import AdapterRecord
from weft.server.registry.versions import Versions


@dataclass
class Alias:
    """An id that is loaded.

    Attributes:
        holds_version: whether the id itself holds ``record.version`` (not, where that could not be restored).
        leases: requests in flight under this id, on whatever version. idle: set while there are none.
        drain: the unloading in progress.
    """

    record: AdapterRecord
    holds_version: bool = True
    leases: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    drain: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.idle.set()


class Aliases:
    """The ids of adapters. All methods on one event loop.

    Attributes:
        loaded: by id.
        pending: what is being loaded or replaced, as it is to be shown meanwhile; by id.
    """

    kind = "adapter"

    def __init__(self, versions: Versions) -> None:
        self.loaded: dict[str, Alias] = {}
        self.pending: dict[str, AdapterRecord] = {}
        self._versions = versions

    def get(self, id: str) -> AdapterRecord:
        """Raises ``NotFound``."""
        alias = self.loaded.get(id)
        record = alias.record if alias else self.pending.get(id)
        if record is None:
            raise _not_found(id)
        return record

    def list(self) -> list[AdapterRecord]:
        """Oldest first."""
        served = {id: alias.record for id, alias in self.loaded.items()}
        return sorted((self.pending | served).values(), key=lambda record: (record.created, record.id))

    def ids(self) -> Iterator[str]:
        """As ``Names`` asks for them."""
        yield from self.loaded.keys() | self.pending.keys()

    def describe(self, id: str) -> str | None:
        """As ``Names`` asks for it."""
        taken = id in self.loaded or id in self.pending
        return f"adapter {id!r} exists already ({self.get(id).state})" if taken else None

    def settled(self, id: str) -> Alias:
        """What is loaded under an id that nobody is changing.

        Raises:
            NotFound, Conflict: no such id, or it is being loaded, replaced or unloaded.
        """
        if id in self.pending:
            raise Conflict(
                f"adapter {id!r} is being loaded; try again when it is done", param="id", code="adapter_busy"
            )
        alias = self.loaded.get(id)
        if alias is None or alias.drain is not None:
            raise _not_found(id)
        return alias

    def pinned(self, base: str | None) -> set[str]:
        """The versions of a base that pinned ids stand for."""
        held = (alias.record for alias in self.loaded.values() if alias.holds_version)
        return {record.version for record in held if record.pinned and record.base == base}

    @contextmanager
    def lease(self, id: str) -> Iterator[AdapterRecord]:
        """Hold the version that ``id`` stands for, from a request's beginning to its end.

        Raises:
            NotFound: no such id, or it is not ready.
        """
        record = self.get(id)
        if record.state != "ready":
            raise _not_found(id, f" ({record.state}{': ' + record.error if record.error else ''})")
        alias = self.loaded[id]
        alias.leases += 1
        alias.idle.clear()
        self._versions.hold(record.held)
        try:
            yield record
        finally:
            self._versions.release(record.held)
            alias.leases -= 1
            if alias.leases == 0:
                alias.idle.set()


def _not_found(id: str, why: str = "") -> NotFound:
    return NotFound(f"adapter {id!r} is not served{why}", param="model")
