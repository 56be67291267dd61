"""The members of a composition, as bodies have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from weft.server.http.messages import Body, unfit
from weft.server.registry.compositions import MAX_MEMBERS, MAX_WEIGHT, WeighedId


class WeighedAdapter(Body):
    """A member of a composition."""

    id: str = Field(min_length=1, max_length=256, description="Of an adapter.")
    weight: float = Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)


def _check_members(members: list[WeighedAdapter]) -> list[WeighedAdapter]:
    seen: set[str] = set()
    for index, member in enumerate(members):
        if member.id in seen:
            raise unfit(f"{member.id[:64]!r} is named twice; add the weights up", index, "id")
        seen.add(member.id)
    return members


WeighedAdapters = Annotated[
    list[WeighedAdapter], Field(min_length=1, max_length=MAX_MEMBERS, fail_fast=True), AfterValidator(_check_members)
]
"""The members of a composition; each id once."""


def weighed_ids(members: Iterable[WeighedAdapter]) -> tuple[WeighedId, ...]:
    return tuple(WeighedId(member.id, member.weight) for member in members)
