"""What the commands share: how they print, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


def fail(message: str) -> NoReturn:
    """Print one red line to stderr and end with exit code 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(1)


@contextmanager
def failing_clearly(*kinds: type[Exception]) -> Iterator[None]:
    """End the command with the message, not a traceback, where one of ``kinds`` is raised inside."""
    try:
        yield
    except kinds as error:
        fail(str(error))


def bytes_text(count: int) -> str:
    """``count`` bytes for people: ``12.3 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
