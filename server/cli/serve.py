"""``weft serve``: one flag per field of ``Settings``."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import ByteSize
from pydantic.fields import FieldInfo
from typer.models import ParameterInfo

from weft.server.cli.terminal import failing_clearly
from weft.server.config import ConfigError
from weft.server.settings import Settings

METAVARS: dict[Any, str | None] = {
    int: "INTEGER",
    float: "NUMBER",
    Path: "PATH",
    ByteSize: "SIZE",
    bool: None,
    dict[str, str]: "ID=SOURCE",
    tuple[Path, ...]: "PATH",
    tuple[str, ...]: "TEXT",
}
NAMED_METAVARS = {"proxy_model": "NAME=PATH"}
ALIASES = {"adapter": ("--lora-modules",)}


def command() -> Callable[..., None]:
    """The command's function, with the signature typer makes its options of."""

    def serve(**flags: Any) -> None:
        with failing_clearly(ConfigError):
            settings = Settings.load(**flags)
        run(settings)

    serve.__doc__ = """Serve a model and its adapters over the OpenAI API; without MODEL, the embedded demo.

    Every option is also WEFT_… in the environment (WEFT_MAX_MODEL_LEN) and a key of weft.toml (max_model_len = 4096).
    Options win over the environment, the environment over the file.
    """
    parameters = [_parameter(name, field) for name, field in Settings.model_fields.items()]
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return serve


def spread_lora_modules(args: Sequence[str]) -> list[str]:
    """vLLM's ``--lora-modules a=x b=y``, several values behind one flag, as one flag each."""
    spread: list[str] = []
    inside = False
    for arg in args:
        if arg == "--lora-modules":
            inside = True
        elif inside and not arg.startswith("-") and ("=" in arg or arg.startswith("{")):
            spread += ["--lora-modules", arg]
        else:
            inside = False
            spread.append(arg)
    return spread


def run(settings: Settings) -> None:
    """Serve until told to stop, in the foreground."""
    import asyncio

    from weft.server.cli.launch import serve

    with failing_clearly(ConfigError):
        asyncio.run(serve(settings))


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The command's parameter for a field: text, for ``Settings`` to read, unless it is a switch or can be repeated."""
    kind = get_args(field.annotation)[0] if isinstance(field.annotation, types.UnionType) else field.annotation
    default = field.get_default(call_default_factory=True)
    names = ["--" + name.replace("_", "-"), *ALIASES.get(name, ())]
    annotation: Any = str | None
    metavar = NAMED_METAVARS.get(name) or METAVARS.get(kind, "TEXT")
    if kind is bool:
        annotation = bool | None
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    elif isinstance(default, tuple | dict):
        annotation = list[str] | None
    shown: ParameterInfo = typer.Option(None, *names, metavar=metavar, help=_help(field, default), show_default=False)
    if name == "model":
        shown = typer.Argument(None, metavar="MODEL", help=field.description, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)


def _help(field: FieldInfo, default: object) -> str:
    text = field.description or ""
    if default in (None, (), {}):
        return text
    value = default.human_readable() if isinstance(default, ByteSize) else default
    return f"{text}  [default: {value}]"
