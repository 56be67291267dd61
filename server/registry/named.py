"""What is named beside adapters: entries under ids of their own, made, replaced and deleted, kept between runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from weft.server.errors import Conflict, NotFound
from weft.server.registry.manifest import Manifest
from weft.server.registry.registry import AdapterRegistry


class Revised(Protocol):
    """What an entry has at least: its id, when that was first taken, and a digest of what requests see of it."""

    @property
    def id(self) -> str: ...

    @property
    def created(self) -> int: ...

    @property
    def revision(self) -> str: ...


E = TypeVar("E", bound=Revised)


class Named(Generic[E]):
    """Entries of one kind by id. All methods on one event loop.

    Attributes:
        kind: what errors call an entry, and what their codes begin with.
        registry: of the adapters that entries are made of.
    """

    def __init__(self, kind: str, path: Path, entry: type[E], registry: AdapterRegistry) -> None:
        """Read what ``path``, in a folder that is this server's alone, has of earlier runs, under its own name.

        Raises:
            ConfigError: it is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.kind = kind
        self.registry = registry
        self._manifest = Manifest(path, path.stem, entry)
        self._coming: dict[str, str] = {}  # ids being taken, and by what
        self._writing = asyncio.Lock()
        registry.names.join(self)

    def ids(self) -> Iterable[str]:
        """As ``Names`` asks for them."""
        return [*self._manifest.entries, *self._coming]

    def describe(self, id: str) -> str | None:
        """As ``Names`` asks for it."""
        if id in self._manifest.entries:
            return f"{self.kind} {id!r} exists already"
        return f"{self.kind} {id!r} is being made by {self._coming[id]}" if id in self._coming else None

    def find(self, id: str) -> E | None:
        return self._manifest.entries.get(id)

    def get(self, id: str) -> E:
        """Raises ``NotFound``."""
        found = self.find(id)
        if found is None:
            raise NotFound(f"there is no {self.kind} {id!r}", param="id", code=f"{self.kind}_not_found")
        return found

    def list(self) -> list[E]:
        """Oldest first."""
        return sorted(self._manifest.entries.values(), key=lambda entry: (entry.created, entry.id))

    @contextmanager
    def reserved(self, id: str, by: str) -> Iterator[None]:
        """Keep ``id`` for what is to be made by ``by``. Raises ``InvalidRequest``, ``Conflict``."""
        self.registry.names.check_free(id)
        self._coming[id] = by
        try:
            yield
        finally:
            del self._coming[id]

    async def keep(self, entry: E) -> E:
        """Keep a new one, which the caller has checked.

        Raises:
            InvalidRequest, Conflict: the id cannot be used, or is taken.
            OSError: it cannot be written, and then there is none.
        """
        with self.reserved(entry.id, "another request"):
            await self._manifest.put(entry)
        return entry

    async def change(self, id: str, changed: Callable[[E], E], if_match: str | None = None) -> E:
        """Have ``id`` mean something else for new requests; those under way finish on what they started with.

        Args:
            changed: the new entry, of the old one, whose ``created`` it keeps; what it raises, this raises.
            if_match: the revision that ``id`` must be at.

        Raises:
            NotFound, Conflict: no such id, or another revision than ``if_match``.
            OSError: it cannot be written, and the old one stays.
        """
        async with self._writing:
            old = self.get(id)
            if if_match is not None and if_match != old.revision:
                raise Conflict(
                    f"{self.kind} {id!r} is at revision {old.revision}, not {if_match[:64]!a}",
                    param="if_match",
                    code="precondition_failed",
                )
            new = changed(old)
            await self._manifest.put(new)
            return new

    async def delete(self, id: str) -> None:
        """Forget one; requests under way finish. Raises ``NotFound``, ``OSError``."""
        async with self._writing:
            self.get(id)
            await self._manifest.drop(id)
        for hook in self.registry.on_unloaded:
            hook(id)
