"""An adapter as users see it, and what its id may be."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weft.server.engine.info import AdapterInfo, EngineStats, ModelStats
from weft.server.engine.request import COMPOSED
from weft.server.errors import InvalidRequest

BASE = "__base__"
"""Stands for the base where an adapter's id is expected, as in PEFT; no adapter can have it."""
MAX_ID_LENGTH = 256


class Held(NamedTuple):
    """What the engine knows an adapter by: a version, and the proxy model it is loaded for (None: the main one)."""

    version: str
    base: str | None = None


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter as users see it.

    Attributes:
        version: digest of its content; "" while the first load is in progress.
        created: unix time in seconds of the first load of this id.
        info: how the engine serves it; all empty while the first load is in progress.
        state: "loading" (not served yet), "ready", "draining" (being unloaded), or "failed": it could not be brought
            back after a restart; not served, but remembered, so that the operator replaces or unloads it.
        error: why it failed.
        base: name of the proxy model it belongs to; None: the main one.
    """

    id: str
    version: str
    source: str
    pinned: bool
    created: int
    info: AdapterInfo
    state: str
    error: str | None = None
    base: str | None = None

    @property
    def held(self) -> Held:
        return Held(self.version, self.base)


def residency(record: AdapterRecord, stats: EngineStats) -> tuple[str | None, int]:
    """The tier an adapter is in, None where the engine does not know it, and the live requests on its version."""
    of = stats if record.base is None else stats.proxies.get(record.base, ModelStats())
    return of.tiers.get(record.version), of.refcounts.get(record.version, 0)


def check_id(id: str, base_names: Sequence[str]) -> None:
    """Raises ``InvalidRequest`` unless ``id`` can name an adapter: in a URL's path, a log line and a metrics label."""
    problem = _problem(id, base_names)
    if problem:
        shown = f"{id[:64]!a}{'...' if len(id) > 64 else ''}"
        raise InvalidRequest(f"adapter id {shown} {problem}", param="id")


def _problem(id: str, base_names: Sequence[str]) -> str | None:
    if not 1 <= len(id) <= MAX_ID_LENGTH:
        return f"must have 1 to {MAX_ID_LENGTH} characters"
    if not id.isprintable():  # control and format characters, lone surrogates, separators but the space
        return "must be printable"
    if id != id.strip():
        return "must not begin or end with a space"
    if id == "." or any(part in id for part in ("/", "\\", ",", "..")):
        return "must not be '.' or contain '/', '\\', ',' or '..'"
    if unicodedata.normalize("NFKC", id) != id:
        return "must be in Unicode normal form NFKC, so that two ids do not look the same"
    if id.casefold() == COMPOSED:
        return "is reserved"
    if id.casefold() in {name.casefold() for name in (BASE, *base_names)}:
        return "is a name of a base model"
    return None
