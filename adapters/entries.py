"""What is known of one adapter while it is there: how it is made, where it is, who needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter
from weft.adapters.layout import Layout, Placement

TIERS = ("disk", "host", "loading", "device")
"""From the farthest to the nearest."""


@dataclass(frozen=True)
class Derivation:
    """An adapter that is made of registered ones as a request asks, and forgotten when no request needs it.

    Attributes:
        version: its identity: a function of its parents' and of what was asked for.
        parents: registered versions, which stay while it is there.
        make: compiles it from the folders of its parents, in the background; raises AdapterError.
    """

    version: str
    parents: tuple[str, ...]
    make: Callable[[tuple[Path, ...]], CompiledAdapter]


@dataclass
class Entry:
    """One registered adapter, or a derived one.

    Attributes:
        folder: of a registered one. parents: of a derived one.
        make: compiles it.
        compiled: while it is in host memory.
        outline: what was compiled without its sites, small enough to stay there; None until it was made.
        layout: likewise.
        placement: while it is on the device or on its way.
        ready: whether the placement is published.
        making: a derived one is being made for the first time.
        holds: live requests, waiting or running. pins: running rows.
        fresh: published, and not used since.
        error: why it could not be loaded again.
    """

    version: str
    make: Callable[[], CompiledAdapter]
    folder: Path | None = None
    parents: tuple[str, ...] = ()
    compiled: CompiledAdapter | None = None
    outline: CompiledAdapter | None = None
    layout: Layout | None = None
    nbytes: int = 0
    placement: Placement | None = None
    ready: bool = False
    making: bool = False
    holds: int = 0
    pins: int = 0
    fresh: bool = False
    error: AdapterError | None = None
    used: int = 0

    @property
    def tier(self) -> str:
        if self.placement is not None or self.making:
            return "device" if self.ready else "loading"
        return "host" if self.compiled is not None else "disk"

    def describe(self, compiled: CompiledAdapter, layout: Layout) -> None:
        """Take in what was made."""
        self.compiled, self.layout, self.nbytes = compiled, layout, compiled.nbytes
        self.outline = replace(compiled, sites={})


@dataclass(frozen=True)
class Upload:
    """A load that ended, in the background thread, for the engine's thread to publish.

    Attributes:
        placement: where it went; None: it was only made, which tells how much room it needs.
    """

    entry: Entry
    placement: Placement | None
    error: AdapterError | None
