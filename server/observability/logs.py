"""Structured logs: one line per event, JSON for machines or a pretty console for people, on standard error.

Everything goes through the root logger, so that uvicorn's and transformers' records come out in the same form. A
request's id is bound once (``request_context``) and stands in every line logged while it is handled.
"""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from weft.server.config import ConfigError

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "json", "console")


@dataclass(frozen=True)
class LogConfig:
    """How to log.

    Attributes:
        level: "debug", "info", "warning" or "error".
        format: "json", "console", or "auto": console where standard error is a terminal.
    """

    level: str = "info"
    format: str = "auto"

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f"log level must be one of {', '.join(LEVELS)}; got {self.level!r}")
        if self.format not in FORMATS:
            raise ConfigError(f"log format must be one of {', '.join(FORMATS)}; got {self.format!r}")


def configure(config: LogConfig, *, stream: TextIO | None = None) -> None:
    """Set up logging of this process. Run uvicorn with ``log_config=None`` so that it logs through this."""
    target = stream or sys.stderr
    as_json = config.format == "json" or (config.format == "auto" and not target.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(as_json, target)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def request_context(request_id: str, **fields: object) -> AbstractContextManager[None]:
    """Every line logged inside, in this task and those it starts, carries ``request_id`` and ``fields``."""
    return structlog.contextvars.bound_contextvars(request_id=request_id, **fields)


def _renderers(as_json: bool, target: TextIO) -> list[Processor]:
    if as_json:
        return [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    return [_escape_newlines, structlog.dev.ConsoleRenderer(colors=target.isatty())]


def _escape_newlines(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """What a client sent must not be able to forge a line of its own."""
    event["event"] = str(event["event"]).replace("\r", "\\r").replace("\n", "\\n")
    return event
