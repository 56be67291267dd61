"""The ids of one server: adapters, and what is named beside them, share one namespace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from weft.server.errors import Conflict
from weft.server.registry.records import check_id


class Holder(Protocol):
    """One kind of named things, such as "adapter"."""

    @property
    def kind(self) -> str: ...

    def ids(self) -> Iterable[str]:
        """Those in use, or being taken."""
        ...

    def describe(self, id: str) -> str | None:
        """What stands under ``id``, for an error ("adapter 'a' exists already"); None: nothing of this kind."""
        ...


class Names:
    """Who has which id. Every kind of named things joins once, and asks before it takes an id."""

    def __init__(self, base_names: Sequence[str]) -> None:
        self.base_names = tuple(base_names)
        self._holders: list[Holder] = []

    def join(self, holder: Holder) -> None:
        self._holders.append(holder)

    def check(self, id: str) -> None:
        """Raises ``InvalidRequest`` unless ``id`` can name anything here."""
        check_id(id, self.base_names)

    def check_free(self, id: str) -> None:
        """Raises ``InvalidRequest`` as ``check`` does, and ``Conflict`` where the id is taken."""
        self.check(id)
        for holder in self._holders:
            if taken := holder.describe(id):
                raise Conflict(taken, param="id", code=f"{holder.kind}_exists")

    def kind_of(self, id: str) -> str | None:
        """What kind of thing has ``id``, or is being made under it; None: nothing."""
        return next((holder.kind for holder in self._holders if holder.describe(id)), None)

    def known(self, id: str) -> bool:
        return self.kind_of(id) is not None

    def ids(self) -> list[str]:
        """All of them, of whatever kind."""
        return [id for holder in self._holders for id in holder.ids()]
