"""One line per event, whoever logs it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from weft.server.config import ConfigError
from weft.server.observability import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def test_json_lines_with_request_id_and_traceback() -> None:
    stream = io.StringIO()
    logs.configure(logs.LogConfig("info", "json"), stream=stream)
    log = structlog.get_logger("weft.test")
    with logs.request_context("req-1", adapter="a"):
        log.info("request.done", tokens=3, text="two\nlines \ud800")
        logging.getLogger("uvicorn.error").warning("from %s\nelsewhere", "uvicorn")
    log.debug("hidden")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["tokens"], first["text"]) == ("request.done", 3, "two\nlines \ud800")
    assert (first["request_id"], first["adapter"], first["level"]) == ("req-1", "a", "info")
    assert first["logger"] == "weft.test" and first["timestamp"].endswith("Z")
    assert (second["event"], second["request_id"]) == ("from uvicorn\nelsewhere", "req-1")
    assert "request_id" not in third and third["exception"][0]["exc_value"] == "boom"


def test_console_lines_cannot_be_forged() -> None:
    stream = io.StringIO()
    logs.configure(logs.LogConfig("info", "console"), stream=stream)
    logging.getLogger("a.library").info("GET /\r\n2026-01-01 [info] forged")
    structlog.get_logger().info("loaded", id="a\nforged")
    assert len(stream.getvalue().splitlines()) == 2


def test_auto_is_json_where_nobody_watches() -> None:
    stream = io.StringIO()
    logs.configure(logs.LogConfig(), stream=stream)
    structlog.get_logger().info("hello")
    assert json.loads(stream.getvalue())["event"] == "hello"


@pytest.mark.parametrize("fields", [{"level": "loud"}, {"format": "xml"}])
def test_unknown_settings_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields.values()))):
        logs.LogConfig(**fields)
