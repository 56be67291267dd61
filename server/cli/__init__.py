"""The command line: ``weft serve``, ``weft adapter``, ``weft compose``, ``weft proxy``, ``weft check``, ``weft bench``.

Nothing here imports torch, transformers or the HTTP packages before a command that needs them runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from weft.server.cli import adapter, bench, check, compose, proxy, serve


def create_cli() -> typer.Typer:
    """The whole command line as one typer application."""
    # Plain help: rich's tables cut long option names off, and importing it would double the time to the first line.
    cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    cli.callback()(_weft)
    cli.command("serve")(serve.command())
    cli.add_typer(adapter.create_cli(), name="adapter")
    cli.add_typer(compose.create_cli(), name="compose")
    cli.add_typer(proxy.create_cli(), name="proxy")
    cli.command("check")(check.check)
    cli.command("bench")(bench.bench)
    return cli


def main() -> None:
    """Entry point of the console script."""
    create_cli()(args=serve.spread_lora_modules(sys.argv[1:]), prog_name="weft")


def _version(given: bool) -> None:
    if given:
        from importlib.metadata import version

        typer.echo(f"weft {version('weft')}")
        raise typer.Exit


def _weft(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve many fine-tuned variants of one language model from one process, mixed in one batch."""
