"""Named compositions: adapters weighed against each other under an id of their own, now and after a restart.

They name the *ids* of adapters. After a member was replaced, new requests see its new version; while one is not served,
the composition is listed as broken, and works again when the member is back.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from weft.adapters.composition import Combination
from weft.server.errors import InvalidRequest, NotFound
from weft.server.registry.aliases import Aliases
from weft.server.registry.named import Named
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
        base: the proxy model that its members belong to; None: the main one.
    """

    id: str
    members: tuple[WeighedId, ...]
    combination: Combination
    created: int
    description: str | None = None
    provenance: dict[str, Any] | None = None
    base: str | None = None

    @property
    def revision(self) -> str:
        """A digest of what requests see of it, for ``If-Match``."""
        content = (self.combination, [(member.id, member.weight) for member in self.members], self.base)
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


@dataclass(frozen=True)
class State:
    """Whether a composition can be served: "ready", or "broken" for the reason in ``error``."""

    state: str
    error: str | None = None


class Compositions(Named[NamedComposition]):
    """Named compositions by id. All methods on one event loop."""

    def __init__(self, folder: Path, registry: AdapterRegistry) -> None:
        """Read what ``folder``, this server's alone, has of earlier runs. Raises ``ConfigError`` if it is damaged."""
        super().__init__("composition", folder / FILE, NamedComposition, registry)

    def state(self, composition: NamedComposition) -> State:
        """Whether all its members are served now, by its model."""
        for member in composition.members:
            try:
                record = self.registry.get(member.id)
            except NotFound:
                return State("broken", f"its member {member.id!r} is not served")
            if record.state != "ready":
                return State("broken", f"its member {member.id!r} is not served ({record.state})")
            if record.base != composition.base:
                return State("broken", f"its member {member.id!r} belongs to the model {self._name(record.base)} now")
        return State("ready")

    async def create(
        self,
        id: str,
        members: Sequence[WeighedId],
        combination: Combination,
        *,
        description: str | None = None,
    ) -> NamedComposition:
        """Keep a new one.

        Raises:
            InvalidRequest, Conflict: the id cannot be used, or is taken; the members are of several models.
            NotFound: a member is not served, naming it.
            OSError: it cannot be written, and then there is none.
        """
        base = self.model_of(members)
        made = NamedComposition(id, tuple(members), combination, int(time.time()), description, base=base)
        return await self.keep(made)

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
        """Have ``id`` mean something else, of the same model, as ``change`` does.

        Raises:
            InvalidRequest: the members are of another model.
            NotFound, Conflict, OSError: as ``change`` and ``create`` do.
        """

        def changed(old: NamedComposition) -> NamedComposition:
            self.check_replacement(old, members)
            return NamedComposition(id, tuple(members), combination, old.created, description, base=old.base)

        return await self.change(id, changed, if_match)

    def check_replacement(self, old: NamedComposition, members: Sequence[WeighedId]) -> None:
        """As ``model_of``; and raises ``InvalidRequest`` where the members are of another model than ``old``."""
        if (base := self.model_of(members)) != old.base:
            raise InvalidRequest(
                f"'adapters[0].id': adapter {members[0].id!r} belongs to the model {self._name(base)}, and composition "
                f"{old.id!r} to {self._name(old.base)}; name a new one",
                param="adapters[0].id",
                code="wrong_base",
            )

    def model_of(self, members: Sequence[WeighedId], field: str = "adapters[{}].id") -> str | None:
        """The proxy model that all members belong to; None: the main one.

        Raises:
            NotFound, InvalidRequest: naming the member's ``field``, as ``check_members``; or where it is of another
                model than the first.
        """
        self.check_members(members, field)
        first, *others = (self.registry.get(member.id).base for member in members)
        for index, base in enumerate(others, 1):
            if base != first:
                param = field.format(index)
                raise InvalidRequest(
                    f"'{param}': adapter {members[index].id!r} belongs to the model {self._name(base)}, and "
                    f"{members[0].id!r} to {self._name(first)}; a composition is of adapters of one model",
                    param=param,
                    code="wrong_base",
                )
        return first

    def check_members(self, members: Sequence[WeighedId], field: str = "adapters[{}].id") -> None:
        """Raises ``NotFound``, ``InvalidRequest``, naming the member's ``field``, unless every member is served."""
        for index, member in enumerate(members):
            id, param = member.id, field.format(index)
            kind = self.registry.names.kind_of(id)
            if kind not in (None, Aliases.kind):
                rest = "; name its members" if kind == self.kind else ", and adapters are what is composed"
                raise InvalidRequest(f"'{param}': {id!r} is a {kind} itself{rest}", param=param)
            try:
                record = self.registry.get(id)
            except NotFound as error:
                raise NotFound(f"'{param}': {error.message}", param=param) from None
            if record.state != "ready":
                raise NotFound(f"'{param}': adapter {id!r} is not served ({record.state})", param=param)

    def _name(self, base: str | None) -> str:
        """A model's name as errors show it."""
        return repr(base or self.registry.names.base_names[0])
