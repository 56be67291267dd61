"""What is known of one adapter while it is there: how it is made, where it is, who needs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weft.adapters.composing import Recipe, as_adapter
from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter
from weft.adapters.host_memory import Make
from weft.adapters.layout import Layout, Placement
from weft.adapters.loader import Load

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
            outline, layout = as_adapter(self.recipe.composition), self.recipe.layout
            return Entry(self.version, self.recipe, parents=self.parents, outline=outline, layout=layout)
        assert self.make is not None, "what is derived is compiled or composed"
        return Entry(self.version, partial(self.make, folders), parents=self.parents)


@dataclass(eq=False)
class Entry:
    """One registered adapter, or a derived one.

    Attributes:
        make: compiles it; of a composition, what it is made of.
        folder: of a registered one. parents: of a derived one.
        outline: what was compiled without its sites; None until it was made. layout: likewise.
        placement: while it is on the device or on its way.
        load: that brings it there, or makes it for the first time.
        holds: live requests, waiting or running. pins: running rows. readers: compositions being made of its rows.
        composed: when a composition was made last (``time.monotonic``), and in how many seconds.
        fresh: on the device, and not used since it came.
        error: why it could not be loaded again.
        used: the larger, the later.
    """

    version: str
    make: Make | Recipe
    folder: Path | None = None
    parents: tuple[str, ...] = ()
    outline: CompiledAdapter | None = None
    layout: Layout | None = None
    placement: Placement | None = None
    load: Load | None = None
    holds: int = 0
    pins: int = 0
    readers: int = 0
    composed: tuple[float, float] | None = None
    fresh: bool = False
    error: AdapterError | None = None
    used: int = 0

    @property
    def ready(self) -> bool:
        """Requests can run with it."""
        return self.placement is not None and self.load is None

    @property
    def absent(self) -> bool:
        """Neither on the device nor on its way, and nothing is known to be wrong with it."""
        return self.placement is None and self.load is None and self.error is None
