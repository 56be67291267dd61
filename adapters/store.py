"""The content-addressed store: a version is the digest of an adapter's files, and a folder of that name holds them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from weft.adapters.errors import AdapterFormatError, AdapterSourceError, AdapterTooLarge
from weft.adapters.files import open_regular, present, size_limit

DOMAIN = b"weft-adapter-v1"
"""Separates these digests from all other uses of SHA-256, and this list of files from later ones."""

_VERSION = re.compile(r"[0-9a-f]{64}")
_INCOMING = ".incoming-"
_CHUNK = 1 << 20


def digest(folder: Path) -> str:
    """The version of the adapter in ``folder``: SHA-256, in hex, over its files' names, sizes and contents.

    Raises:
        AdapterFormatError: it is not an adapter, or holds a link where a file should be.
        AdapterTooLarge: a file is beyond its limit.
    """
    entries = []
    for name in present(folder):
        with open_regular(folder, name) as file:
            entries.append(_hash(name, file))
    return _combine(entries)


class Store:
    """Adapters by version, in ``root/<version>/``. Several threads and processes may share one.

    A version's folder appears complete or not at all, and is never changed after.
    """

    def __init__(self, root: Path) -> None:
        """Create ``root`` if need be, and remove what an interrupted ``add`` or ``remove`` left there."""
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._heal()

    def add(self, source: Path) -> str:
        """Copy the adapter in ``source`` into the store and return its version; at once if it is already there.

        The version is that of the bytes copied, so a source that changes meanwhile is stored as it was read.

        Raises:
            AdapterFormatError, AdapterTooLarge: the source is no adapter, or no room is left for it; see ``digest``.
        """
        with self._incoming() as incoming:
            version = _combine([_copy(name, source, incoming) for name in present(source)])
            if digest(incoming) != version:
                raise OSError(errno.EIO, "what was written into the store reads back differently", str(self.root))
            self._publish(incoming, version)
        return version

    def path(self, version: str) -> Path:
        """The folder of a version.

        Raises:
            AdapterSourceError: the store has no such version.
        """
        folder = self.root / version
        if not _VERSION.fullmatch(version) or not folder.is_dir():
            raise AdapterSourceError(f"the store holds no adapter version {version[:64]!a}", param="version")
        return folder

    def verify(self, version: str) -> None:
        """Read a version's files again.

        Raises:
            AdapterSourceError: the store has no such version.
            AdapterFormatError: its files are not those that were stored.
        """
        found = digest(self.path(version))
        if found != version:
            raise AdapterFormatError(f"the stored adapter {version} is damaged: it is now {found}", param="version")

    def remove(self, version: str) -> None:
        """Delete a version. Files that are open or mapped stay readable.

        Raises:
            AdapterSourceError: the store has no such version.
        """
        self._discard(self.path(version))

    def versions(self) -> list[str]:
        """Every version stored, sorted."""
        return sorted(entry.name for entry in self.root.iterdir() if _VERSION.fullmatch(entry.name))

    def size(self, version: str) -> int:
        """Bytes of a version's files."""
        return sum(file.stat().st_size for file in self.path(version).rglob("*") if file.is_file())

    def _publish(self, incoming: Path, version: str) -> None:
        target = self.root / version
        if target.is_dir():
            if _is_intact(target, version):
                return
            self._discard(target)
        for folder in (*filter(Path.is_dir, incoming.iterdir()), incoming):
            _sync(folder)
        try:
            incoming.rename(target)
        except OSError as error:
            # Another add of the same content was first: its copy is as good.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _is_intact(target, version):
                raise
        _sync(self.root)

    def _discard(self, folder: Path) -> None:
        # Renamed first, so that a version is never seen half deleted.
        with self._incoming() as trash, suppress(FileNotFoundError):
            folder.rename(trash / "old")

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """A fresh folder beside the versions; whatever is still in it at the end goes."""
        # Shared with other adds, while ``_heal`` needs it alone: it must not take the folder away.
        with self._lock(fcntl.LOCK_SH), _room_in(self.root):
            folder = Path(tempfile.mkdtemp(prefix=_INCOMING, dir=self.root))
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _heal(self) -> None:
        try:
            with self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
                for entry in self.root.glob(f"{_INCOMING}*"):
                    shutil.rmtree(entry, ignore_errors=True)
        except BlockingIOError:
            return  # another process adds right now; what is left over waits for the next start


def _copy(name: str, source: Path, target: Path) -> bytes:
    (target / name).parent.mkdir(exist_ok=True)
    with open_regular(source, name) as file, (target / name).open("xb") as copy:
        entry = _hash(name, file, copy)
        copy.flush()
        os.fsync(copy.fileno())
    return entry


def _hash(name: str, file: BinaryIO, copy: BinaryIO | None = None) -> bytes:
    """One file's line of the digest; on the way its bytes go to ``copy``."""
    content, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        content.update(chunk)
        size += len(chunk)
        if size > size_limit(name):
            raise AdapterTooLarge(f"{name} grew beyond {size_limit(name)} bytes while it was read", param=name)
        if copy is not None:
            copy.write(chunk)
    return b"%s %d %s\n" % (name.encode(), size, content.hexdigest().encode())


def _combine(entries: list[bytes]) -> str:
    # Names hold neither spaces nor line breaks (see adapters.files), so the lines cannot be read in two ways.
    return hashlib.sha256(DOMAIN + b"\n" + b"".join(sorted(entries))).hexdigest()


def _is_intact(folder: Path, version: str) -> bool:
    try:
        return digest(folder) == version
    except (AdapterFormatError, AdapterTooLarge):
        return False


@contextmanager
def _room_in(root: Path) -> Iterator[None]:
    """A full disk is an error about the adapter; any other stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"no room is left in the adapter store {root}: {error.strerror}"
        raise AdapterTooLarge(message, param="source") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
