"""Messages between the server and the engine process, and their encoding.

Both ends exchange msgpack over one zmq PAIR socket on a Unix domain socket. The engine's own dataclasses travel as
they are. Errors travel as their class names, message and fields, and are raised on the other side as what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from weft.adapters.errors import AdapterError
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine.info import AdapterInfo, EngineStats, ModelInfo
from weft.server.engine.request import EngineRequest, TokenDelta
from weft.server.errors import RequestError
from weft.server.observability.logs import LogConfig

_ROOTS: tuple[type[Exception], ...] = (RequestError, AdapterError, ConfigError)


class RemoteError(RuntimeError):
    """Something unexpected went wrong in the engine process; its log has the traceback."""


class WireError(msgspec.Struct, frozen=True):
    """An exception on its way.

    Attributes:
        classes: its class and that class's bases by name, nearest first; the receiver takes the first it knows.
        fields: plain attributes (``param``, ``code``, ``retry_after``).
    """

    classes: tuple[str, ...]
    message: str
    fields: dict[str, str | int | float | bool | None] = {}

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        if not isinstance(error, _ROOTS):
            return cls((), f"{type(error).__name__}: {error}")
        fields = {**vars(error), "code": error.code} if hasattr(error, "code") else vars(error)
        plain = {k: v for k, v in fields.items() if v is None or isinstance(v, str | int | float | bool)}
        return cls(tuple(c.__name__ for c in type(error).__mro__), str(error), plain)

    def exception(self) -> Exception:
        """The exception it was, or ``RemoteError`` where it was not one of weft's own trees."""
        known = {c.__name__: c for root in _ROOTS for c in _tree(root)}
        found = next((known[name] for name in self.classes if name in known), None)
        if found is None:
            return RemoteError(self.message)
        error = found.__new__(found)  # not __init__: a subclass may ask for more than is known here
        error.args = (self.message,)
        vars(error).update(self.fields)
        return error


def _tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


# --- server to engine ---------------------------------------------------------------------------------------------


class Boot(msgspec.Struct, tag=True, frozen=True):
    """The first message: what to load."""

    config: EngineConfig
    logging: LogConfig


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Answered by ``Refused``, or by deltas up to one with a finish reason."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Ends a request; its terminal delta still comes."""

    request_id: str


class Register(msgspec.Struct, tag=True, frozen=True):
    """Answered by ``Registered`` or ``CallFailed`` of the same call.

    Attributes:
        model: name of the further model it is for; None: the main one.
    """

    call: int
    version: str
    folder: str
    model: str | None = None


class Unregister(msgspec.Struct, tag=True, frozen=True):
    """Answered by ``Done`` or ``CallFailed`` of the same call."""

    call: int
    version: str
    model: str | None = None


class Pin(msgspec.Struct, tag=True, frozen=True):
    """These versions, and no others, stay on the device. Answered by ``Done`` or ``CallFailed`` of the same call."""

    call: int
    versions: list[str]
    model: str | None = None


class Refresh(msgspec.Struct, tag=True, frozen=True):
    """Answered by a ``Snapshot`` of the same call."""

    call: int


Command: TypeAlias = Boot | Submit | Abort | Register | Unregister | Pin | Refresh


# --- engine to server ---------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, tag=True, frozen=True):
    """What loading is busy with."""

    stage: str


class Started(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded; commands are served from here on."""

    info: ModelInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine could not load, or cannot go on; the process ends after this."""

    error: WireError


class Deltas(msgspec.Struct, tag=True, frozen=True):
    """What one step added, for all requests."""

    deltas: list[TokenDelta]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request was not accepted; nothing more comes for it."""

    request_id: str
    error: WireError


class Registered(msgspec.Struct, tag=True, frozen=True):
    call: int
    info: AdapterInfo


class Done(msgspec.Struct, tag=True, frozen=True):
    call: int


class CallFailed(msgspec.Struct, tag=True, frozen=True):
    call: int
    error: WireError


class Snapshot(msgspec.Struct, tag=True, frozen=True):
    """The engine's counters and gauges; ``call`` is set where it answers a ``Refresh``."""

    stats: EngineStats
    call: int | None = None


Event: TypeAlias = Progress | Started | Failed | Deltas | Refused | Registered | Done | CallFailed | Snapshot

_ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """Raises ``OverflowError`` for an integer beyond 64 bits and ``UnicodeEncodeError`` for a lone surrogate."""
    return _ENCODER.encode(message)


def decode_command(data: bytes) -> Command:
    return _COMMANDS.decode(data)


def decode_event(data: bytes) -> Event:
    return _EVENTS.decode(data)
