"""Requests that run together on an engine in this process, until all of them have ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.server.engine.engine import Engine
from weft.server.engine.request import EngineRequest, TokenDelta, TokenLogprobs
from weft.server.engine.streams import TextStream
from weft.server.errors import InvalidRequest, RequestError
from weft.server.tokenization import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One generated continuation.

    Attributes:
        text: without special tokens; empty where the model has no tokenizer.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or stop token id that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[TokenLogprobs] | None


@dataclass
class Stream:
    """A request under way and what it has produced. ``text``: makes text of its tokens; None without a tokenizer."""

    request: EngineRequest
    text: TextStream | None
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def take(self, delta: TokenDelta) -> bool:
        """What came of the last step. True if that ended the request, and the engine is still to be told."""
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.error = delta.error
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs or []
        if self.text is None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
            return False
        text = self.text.push(delta)
        self.pieces.append(text.text)
        self.finish_reason, self.stop_reason = text.finish_reason, text.stop_reason
        return self.text.stopped and delta.finish_reason is None

    def completion(self, index: int) -> Completion:
        """What it has produced, as the ``index``-th continuation of its prompt."""
        logprobs = self.logprobs if self.request.params.logprobs is not None else None
        text = "".join(self.pieces)
        return Completion(index, text, self.tokens, self.finish_reason or "stop", self.stop_reason, logprobs)


class Generation:
    """Requests for one engine, which nobody else has requests on. ``tokenizer``: None where the model has none."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._streams: dict[str, Stream] = {}

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError."""
        text = None
        if self._tokenizer is not None:
            text = TextStream(self._tokenizer, request.prompt_token_ids, request.params)
        elif request.params.stop:
            raise InvalidRequest("the model has no tokenizer; use stop_token_ids", param="stop")
        self._engine.add(request)
        self._streams[request.request_id] = Stream(request, text)

    def run(self) -> list[Stream]:
        """Step until all have ended; in the order in which they were added.

        Raises:
            RequestError: one of them failed.
        """
        while self._engine.has_work:
            before = self._engine.steps
            deltas = self._engine.step()
            if not deltas and self._engine.steps == before and self._engine.has_work:
                self._engine.wait(0.05)  # all wait for adapters; a piece of a long prompt gives no delta either
            for delta in deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None and stream.finish_reason is None and stream.take(delta):
                    self._engine.abort(delta.request_id)
        streams = list(self._streams.values())
        failed = next((stream for stream in streams if stream.error is not None), None)
        if failed is not None:
            on_adapters = failed.request.adapter or failed.request.composition
            raise RequestError(failed.error or "", param="adapter" if on_adapters else None)
        return streams

    def abandon(self) -> None:
        """Leave nothing of a failed call behind in the engine."""
        for request_id in self._streams:
            self._engine.abort(request_id)
        if self._engine.has_work:
            self._engine.step()
