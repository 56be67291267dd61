"""What the commands for a running server share: their options, their connection, how they print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from weft.server.cli.client import RemoteError, Server, connect
from weft.server.cli.terminal import fail, failing_clearly
from weft.server.config import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="WEFT_URL", help="The server; default: this machine's, by weft's settings.", show_default=False
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--admin-key",
        help="Default: WEFT_ADMIN_KEY, else the key a server on this machine has kept.",
        show_default=False,
    ),
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where that server keeps its key.", show_default=False)
]
IfMatch = Annotated[
    str | None,
    typer.Option(
        "--if-match",
        metavar="VERSION",
        help="Only if this is the version or revision served now.",
        show_default=False,
    ),
]


@contextmanager
def connected(url: str | None, key: str | None, state_dir: Path | None) -> Iterator[Server]:
    """The server that a command is for; what it refuses ends the command."""
    with failing_clearly(ConfigError, RemoteError), connect(url, key, state_dir) as server:
        yield server


def busy(text: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


def path_of(collection: str, id: str) -> str:
    """The route of one thing of a collection, such as "/admin/adapters"."""
    return f"{collection}/{quote(id, safe='')}"


def matching(if_match: str | None) -> dict[str, str]:
    """The headers of a replacement."""
    return {} if if_match is None else {"If-Match": f'"{if_match}"'}


def finite(option: str, value: float) -> float:
    """``value``; ends the command where JSON cannot say it."""
    return value if math.isfinite(value) else fail(f"{option}: {value} is not a finite number")


def print_answer(answer: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(answer, indent=2) if as_json else text)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, not str: brackets in an id are no markup
    # Elsewhere than on a terminal rich takes 80 columns, and breaks the rows for it.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
