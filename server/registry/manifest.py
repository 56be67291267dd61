"""What is remembered between runs, by id, in JSON files that are written atomically."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from weft.server.config import ConfigError
from weft.server.engine.info import AdapterInfo

SCHEMA = 1
FILE = "adapters.json"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One id, as it was asked for.

    Attributes:
        version: digest of the content; the store holds it.
        source: where it was read from.
        created: unix time in seconds of the first load of this id.
        info: how it was served when last loaded.
        base: name of the proxy model it belongs to; None: the main one.
    """

    id: str
    version: str
    source: str
    pinned: bool
    created: int
    info: AdapterInfo
    base: str | None = None


class Named(Protocol):
    """What an entry has at least."""

    @property
    def id(self) -> str: ...


E = TypeVar("E", bound=Named)


class Manifest(Generic[E]):
    """Entries by id. What ``put`` and ``drop`` have returned from is on disk, whatever happens after."""

    def __init__(self, path: Path, key: str, kind: type[E]) -> None:
        """Read ``path``, ``{"schema": 1, key: [entries of kind]}``.

        Raises:
            ConfigError: the file is there and cannot be read as a manifest.
        """
        self._path = path
        self._key = key
        self._lock = asyncio.Lock()
        self.entries: dict[str, E] = {entry.id: entry for entry in _read(path, key, kind)}

    async def put(self, entry: E) -> None:
        """Add or replace an entry. Raises ``OSError``, and then nothing has changed."""
        async with self._lock:
            await self._write({**self.entries, entry.id: entry})

    async def drop(self, id: str) -> None:
        """Remove an entry. Raises ``OSError``, and then nothing has changed."""
        async with self._lock:
            await self._write({key: entry for key, entry in self.entries.items() if key != id})

    async def _write(self, entries: dict[str, E]) -> None:
        await asyncio.to_thread(_replace, self._path, _encode(self._key, entries.values()))
        self.entries = entries


def _encode(key: str, entries: Iterable[object]) -> bytes:
    return msgspec.json.format(msgspec.json.encode({"schema": SCHEMA, key: list(entries)}), indent=2) + b"\n"


def _read(path: Path, key: str, kind: type[E]) -> list[E]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"state_dir: cannot read {path}: {error.strerror}") from error
    fields = [("schema", int), (key, list[kind])]  # type: ignore[valid-type]
    document_type: Any = msgspec.defstruct("Document", fields, forbid_unknown_fields=True)
    try:
        document = msgspec.json.decode(data, type=document_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"state_dir: {path} is damaged ({error}); repair it, or move it away to start afresh"
        ) from None
    if document.schema != SCHEMA:
        raise ConfigError(f"state_dir: {path} has schema {document.schema}, and this version of weft reads {SCHEMA}")
    entries: list[E] = getattr(document, key)
    return entries


def _replace(path: Path, data: bytes) -> None:
    """Either the old or the new content is there, also after a power cut."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
