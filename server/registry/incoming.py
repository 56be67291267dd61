"""Fetching the source of an adapter into a folder of its own, which goes again after use."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.adapters.sources import resolve


@dataclass(frozen=True)
class Fetched:
    """A fetched adapter.

    Attributes:
        folder: where it lies.
        scratch: what was downloaded, if anything was.
    """

    folder: Path
    scratch: Path

    async def discard(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self.scratch, ignore_errors=True)


class Incoming:
    """Downloads in progress, in ``root``, which is this server's alone."""

    def __init__(self, root: Path, allowed: Sequence[Path]) -> None:
        """``allowed``: the folders that local sources may lie in."""
        shutil.rmtree(root, ignore_errors=True)  # what an interrupted run left
        self._root = root
        self._allowed = tuple(allowed)

    async def fetch(self, source: str) -> Fetched:
        """When cancelled, nothing stays of a download once its thread has ended. Raises ``AdapterError``."""
        scratch = self._root / uuid.uuid4().hex
        thread = asyncio.ensure_future(asyncio.to_thread(resolve, source, roots=self._allowed, cache=scratch))
        try:
            return Fetched(await asyncio.shield(thread), scratch)
        except BaseException:
            thread.add_done_callback(lambda done: _clean(done, scratch))
            raise


def _clean(thread: asyncio.Future[Path], scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    if not thread.cancelled():
        thread.exception()  # its caller is gone or has it
