"""Compiled adapters in host memory, for as long as a budget of bytes has room for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from weft.adapters.forms import CompiledAdapter

Make = Callable[[], CompiledAdapter]
"""Reads an adapter from disk and compiles it; slow; raises AdapterError."""


class HostMemory:
    """Adapters by version; the least recently used ones leave. Any thread.

    Args:
        budget: bytes. One adapter may stay that alone is larger: the one that came last.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._adapters: OrderedDict[str, tuple[CompiledAdapter, int]] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    def __contains__(self, version: str) -> bool:
        return version in self._adapters

    @property
    def nbytes(self) -> int:
        """Of all that are there."""
        return self._used

    def get(self, version: str) -> CompiledAdapter | None:
        """The adapter, if it is there; it then is the most recently used one."""
        with self._lock:
            if version not in self._adapters:
                return None
            self._adapters.move_to_end(version)
            return self._adapters[version][0]

    def put(self, version: str, adapter: CompiledAdapter) -> None:
        """Keep an adapter, in place of those that were not used for longest."""
        if self.get(version) is adapter:
            return
        nbytes = adapter.nbytes
        with self._lock:
            self._drop(version)
            self._adapters[version] = adapter, nbytes
            self._used += nbytes
            while self._used > self._budget and len(self._adapters) > 1:
                self._drop(next(iter(self._adapters)))

    def get_or_make(self, version: str, make: Make) -> CompiledAdapter:
        """The adapter, made if it is not there."""
        adapter = self.get(version)
        if adapter is None:
            adapter = make()
            self.put(version, adapter)
        return adapter

    def discard(self, version: str) -> None:
        """Forget an adapter that may be there."""
        with self._lock:
            self._drop(version)

    def _drop(self, version: str) -> None:
        _, nbytes = self._adapters.pop(version, (None, 0))
        self._used -= nbytes
