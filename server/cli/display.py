"""What a terminal shows while a server loads. Where standard error is no terminal, the log says it instead."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self, TextIO, cast

import structlog
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

log = structlog.get_logger(__name__)


class Display:
    """A bar for each stage of loading, and a line that stays for each adapter. A context, which takes the bar away.

    Attributes:
        stream: standard error, for the log, whose lines go above the bar.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True)
        self.stream = cast(TextIO, FileProxy(self._console, sys.stderr)) if self._live else sys.stderr

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:  # elsewhere rich would print an empty line
            self._bars.stop()

    def stage(self, name: str, parts: int | None = None) -> None:
        """Loading has come to another stage, of so many parts if that is known."""
        if not self._live:
            log.info("server.loading", stage=name)
            return
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._bars.add_task(name, total=parts)

    def adapter(self, id: str, how: str) -> None:
        """One adapter more is served, and ``how``. The log has it from the registry."""
        if self._live:
            for task in self._bars.task_ids:
                self._bars.advance(task)
            self._console.print(f"adapter {id}: {how}", highlight=False, markup=False)
