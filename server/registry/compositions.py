"""Named compositions: adapters weighed against each other under an id of their own, now and after a restart.

They name the *ids* of adapters. After a member was replaced, new requests see its new version; while one is not served,
the composition is listed as broken, and works again when the member is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from weft.adapters.composition import Combination
from weft.server.errors import Conflict, InvalidRequest, NotFound
from weft.server.registry.manifest import Manifest
from weft.server.registry.registry import AdapterRegistry

FILE = "compositions.json"
MAX_MEMBERS = 64
MAX_WEIGHT = 1000.0
"""Of a weight's size. LoRAHub searches within 1.5; far beyond this, products overflow in half precision."""


class WeighedId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member: the id of an adapter, and its weight."""

    id: str
    weight: float


class NamedComposition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A composition as it was asked for, and as it is kept.

    Attributes:
        created: unix time in seconds.
        provenance: how its weights were found, where a search found them.
    """

    id: str
    members: tuple[WeighedId, ...]
    combination: Combination
    created: int
    description: str | None = None
    provenance: dict[str, Any] | None = None

    @property
    def revision(self) -> str:
        """A digest of what requests see of it, for ``If-Match``."""
        content = (self.combination, [(member.id, member.weight) for member in self.members])
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


@dataclass(frozen=True)
class State:
    """Whether a composition can be served: "ready", or "broken" for the reason in ``error``."""

    state: str
    error: str | None = None


class Compositions:
    """Named compositions by id. All methods on one event loop."""

    kind = "composition"

    def __init__(self, folder: Path, registry: AdapterRegistry) -> None:
        """Read what ``folder``, this server's alone, has of earlier runs. Raises ``ConfigError`` if it is damaged."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._manifest = Manifest(folder / FILE, "compositions", NamedComposition)
        self.registry = registry
        self._coming: dict[str, str] = {}  # ids being taken, and by what
        self._writing = asyncio.Lock()
        registry.names.join(self)

    def ids(self) -> Iterable[str]:
        """As ``Names`` asks for them."""
        return [*self._manifest.entries, *self._coming]

    def describe(self, id: str) -> str | None:
        """As ``Names`` asks for it."""
        if id in self._manifest.entries:
            return f"composition {id!r} exists already"
        return f"composition {id!r} is being made by {self._coming[id]}" if id in self._coming else None

    def find(self, id: str) -> NamedComposition | None:
        return self._manifest.entries.get(id)

    def get(self, id: str) -> NamedComposition:
        """Raises ``NotFound``."""
        found = self.find(id)
        if found is None:
            raise NotFound(f"there is no composition {id!r}", param="id", code="composition_not_found")
        return found

    def list(self) -> list[NamedComposition]:
        """Oldest first."""
        return sorted(self._manifest.entries.values(), key=lambda entry: (entry.created, entry.id))

    def state(self, composition: NamedComposition) -> State:
        """Whether all its members are served now."""
        for member in composition.members:
            try:
                record = self.registry.get(member.id)
            except NotFound:
                return State("broken", f"its member {member.id!r} is not served")
            if record.state != "ready":
                return State("broken", f"its member {member.id!r} is not served ({record.state})")
        return State("ready")

    @contextmanager
    def reserved(self, id: str, by: str) -> Iterator[None]:
        """Keep ``id`` for what is to be made by ``by``. Raises ``InvalidRequest``, ``Conflict``."""
        self.registry.names.check_free(id)
        self._coming[id] = by
        try:
            yield
        finally:
            del self._coming[id]

    async def create(
        self,
        id: str,
        members: Sequence[WeighedId],
        combination: Combination,
        *,
        description: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> NamedComposition:
        """Keep a new one.

        Raises:
            InvalidRequest, Conflict: the id cannot be used, or is taken.
            NotFound: a member is not served, naming it.
            OSError: it cannot be written, and then there is none.
        """
        with self.reserved(id, "another request"):
            return await self.put_reserved(
                NamedComposition(id, tuple(members), combination, int(time.time()), description, provenance)
            )

    async def put_reserved(self, composition: NamedComposition) -> NamedComposition:
        """Keep one whose id the caller has reserved; else as ``create``."""
        self.check_members(composition.members)
        await self._manifest.put(composition)
        return composition

    async def replace(
        self,
        id: str,
        members: Sequence[WeighedId],
        combination: Combination,
        *,
        description: str | None = None,
        if_match: str | None = None,
    ) -> NamedComposition:
        """Have ``id`` mean something else for new requests; those under way finish on what they started with.

        Raises:
            NotFound, Conflict: no such id or member, or another revision than ``if_match``.
            OSError: it cannot be written, and the old one stays.
        """
        async with self._writing:
            old = self.get(id)
            if if_match is not None and if_match != old.revision:
                raise Conflict(
                    f"composition {id!r} is at revision {old.revision}, not {if_match[:64]!a}",
                    param="if_match",
                    code="precondition_failed",
                )
            self.check_members(members)
            new = NamedComposition(id, tuple(members), combination, old.created, description)
            await self._manifest.put(new)
            return new

    async def delete(self, id: str) -> None:
        """Forget one; requests under way finish. Raises ``NotFound``, ``OSError``."""
        async with self._writing:
            self.get(id)
            await self._manifest.drop(id)
        for hook in self.registry.on_unloaded:
            hook(id)

    def check_members(self, members: Sequence[WeighedId], field: str = "adapters[{}].id") -> None:
        """Raises ``NotFound``, ``InvalidRequest``, naming the member's ``field``, unless every member is served."""
        for index, member in enumerate(members):
            id, param = member.id, field.format(index)
            if id in self.ids():
                raise InvalidRequest(f"'{param}': {id!r} is a composition itself; name its members", param=param)
            try:
                record = self.registry.get(id)
            except NotFound as error:
                raise NotFound(f"'{param}': {error.message}", param=param) from None
            if record.state != "ready":
                raise NotFound(f"'{param}': adapter {id!r} is not served ({record.state})", param=param)
