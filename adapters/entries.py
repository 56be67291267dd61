"""What is known of one adapter while it is there: how it is made, where it is, who needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weft.adapters.composing import Recipe, as_adapter
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
        recipe: of a composition, which is not compiled: its rows are made of those of its parents.
    """

    version: str
    parents: tuple[str, ...]
    make: Callable[[tuple[Path, ...]], CompiledAdapter] | None = None
    recipe: Recipe | None = None

    def entry(self, folders: tuple[Path, ...]) -> Entry:
        """Itself, with nothing done yet; ``folders`` of its parents."""
        if self.recipe is not None:
            outline = as_adapter(self.recipe.composition)
            return Entry(
                self.version, parents=self.parents, recipe=self.recipe, layout=self.recipe.layout, outline=outline
            )
        assert self.make is not None, "what is derived is compiled or composed"
        return Entry(self.version, partial(self.make, folders), parents=self.parents)


@dataclass
class Entry:
    """One registered adapter, or a derived one.

    Attributes:
        folder: of a registered one. parents: of a derived one.
        make: compiles it. recipe: of a composition, in its place.
        compiled: while it is in host memory.
        outline: what was compiled without its sites, small enough to stay there; None until it was made.
        layout: likewise.
        placement: while it is on the device or on its way.
        filled: the rows of the placement are written. ready: it is published.
        making: a derived one is being made for the first time.
        holds: live requests, waiting or running. pins: running rows. readers: compositions being made of its rows.
        sources: of a composition being made, where its members are; None: it is made from host memory.
        composed: when a composition was made last (``time.monotonic``), and in how many seconds.
        fresh: published, and not used since.
        error: why it could not be loaded again.
    """

    version: str
    make: Callable[[], CompiledAdapter] | None = None
    folder: Path | None = None
    parents: tuple[str, ...] = ()
    recipe: Recipe | None = None
    compiled: CompiledAdapter | None = None
    outline: CompiledAdapter | None = None
    layout: Layout | None = None
    nbytes: int = 0
    placement: Placement | None = None
    filled: bool = False
    ready: bool = False
    making: bool = False
    holds: int = 0
    pins: int = 0
    readers: int = 0
    sources: Mapping[str, Placement] | None = None
    composed: tuple[float, float] | None = None
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
