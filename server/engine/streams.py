"""From token ids to text, token by token: incremental detokenization and stop strings.

    Detokenizer    what a tokenizer knows of its tokens; one per tokenizer, shared by all streams
    TextDecoder    one stream of ids → text, never half a character
    StopStrings    one stream of text → text up to a stop string, whatever the token borders
    TextStream     the two together, on the engine's deltas

The text of a stream is that of ``tokenizer.decode(prompt + output)`` behind the text of the prompt, for every output
that is valid text; each token costs a decode of a few tokens, however long the output is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.server.engine.request import SamplingParams, TokenDelta, TokenLogprobs

REPLACEMENT = "\ufffd"
CONTEXT = 4
"""Prompt tokens decoded in front of the output: a leading space is a space only behind something."""
MAX_CONTEXT = 12
MAX_PENDING = 8
"""Tokens held for an unfinished character. A character has at most 4 bytes, so at most 4 tokens; more is not text."""
UNKNOWN = "token_id:{}"


class Detokenizer:
    """The bytes and the text of a tokenizer's tokens.

    Args:
        tokenizer: a transformers tokenizer, fast or not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # The backend is asked directly: transformers' own wrapper costs several times the decoding of a few tokens.
        self._backend = backend if hasattr(backend, "decoder") else None
        added = tokenizer.added_tokens_decoder
        self._added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._scheme = self._read_scheme()
        self._alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes | None] = {}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of the tokens together."""
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for, a leading space included; None where the tokenizer has no such token."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._read_bytes(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token for people: its text, or ``bytes:\\xe4\\xbd`` for a part of a character, as OpenAI writes it."""
        raw = self.token_bytes(token_id)
        if raw is None:
            return UNKNOWN.format(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, token_ids: Iterable[int]) -> list[int]:
        """Where each token begins in the text of all of them, and where the last ends, in characters.

        A character begins at its first byte. Special tokens have no text.
        """
        offsets, position = [0], 0
        for token_id in token_ids:
            if token_id not in self.special_ids:
                position += sum(byte & 0xC0 != 0x80 for byte in self.token_bytes(token_id) or b"")
            offsets.append(position)
        return offsets

    def _read_scheme(self) -> str:
        """How tokens are written in the vocabulary: "bytes" (GPT-2's alphabet), "metaspace" (sentencepiece) or ""."""
        if self._backend is None or self._backend.decoder is None:
            return ""
        written = self._backend.decoder.__getstate__()
        decoder = json.loads(written)
        kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        if "ByteLevel" in kinds:
            return "bytes"
        return "metaspace" if kinds & {"ByteFallback", "Metaspace"} else ""

    def _read_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._backend is None:
            known = token_id < len(self._tokenizer)
            token: str | None = self._tokenizer.convert_ids_to_tokens(token_id) if known else None
        else:
            token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if self._scheme == "bytes" and all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        if self._scheme == "metaspace":
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            return bytes([int(token[3:5], 16)]) if is_byte else token.replace("\u2581", " ").encode()
        return self.decode([token_id]).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TextDecoder:
    """Ids in, text out. Text that ends within a character waits for the rest of it."""

    def __init__(self, detokenizer: Detokenizer, prompt_token_ids: Sequence[int], *, skip_special: bool) -> None:
        self._detokenizer = detokenizer
        self._skipped = detokenizer.special_ids if skip_special else frozenset[int]()
        # ``_done`` is the text of the window without its last ``_pending`` tokens: the prompt's, or given out.
        self._window: list[int] = self._context(prompt_token_ids)
        self._done = detokenizer.decode(self._window)
        self._pending = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or self._detokenizer.token_bytes(token_id) is None:
            return ""
        self._window.append(token_id)
        self._pending += 1
        text = self._detokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return "" if self._pending <= MAX_PENDING else self._give_up(text)
        new = self._new(text)
        if new:
            # The newest tokens are context enough, and they begin where a character does.
            self._window = self._window[-self._pending :]
            self._done = self._detokenizer.decode(self._window)
            self._pending = 0
        return new

    def flush(self) -> str:
        """What still waits, with U+FFFD for what is not text."""
        new = self._new(self._detokenizer.decode(self._window))
        self._window, self._done, self._pending = [], "", 0
        return new

    def _new(self, text: str) -> str:
        """What the window's ``text`` has beyond what is done. A character the prompt left unfinished is new."""
        done = self._done if text.startswith(self._done) else self._done.rstrip(REPLACEMENT)
        return text[len(done) :]

    def _give_up(self, text: str) -> str:
        """Give out a long run of what is not text, up to where a character may still be unfinished."""
        decode = self._detokenizer.decode
        for keep in range(4, MAX_PENDING):
            front, back = self._window[:-keep], self._window[-keep:]
            before = decode(front)
            if before + decode(back) == text:
                new = self._new(before)
                self._window, self._done, self._pending = back, "", keep
                return new
        return self.flush()

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        tail: list[int] = []
        for token_id in reversed(prompt_token_ids[-2 * MAX_CONTEXT :]):
            if token_id not in self._skipped:
                tail.append(token_id)
                # Not from the middle of a character on: a decoder may take the whole run of bytes for broken.
                if len(tail) >= CONTEXT and not self._detokenizer.decode(tail[::-1]).startswith(REPLACEMENT):
                    break
                if len(tail) == MAX_CONTEXT:
                    break
        return tail[::-1]


class StopStrings:
    """Passes text on until a stop string ends. Text that a stop string may begin with is held back.

    The stop string that ends first wins, and of those that end together the longest: what comes out does not depend on
    how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self._blind = 0  # so many characters of ``_held`` came before stop strings counted

    def push(self, text: str, *, active: bool = True) -> tuple[str, str | None]:
        """Text that is certain, and the stop string, if one ended. ``active``: one may end within ``text``."""
        if not self._stops:
            return text, None
        text = self._held + text
        if not active:
            self._blind = len(text)
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := self._find(text, stop)) >= 0]
        if ends:
            end, start, stop = min(ends)
            return text[: end if self._include else start], stop
        certain = min((_begins(text, stop) for stop in self._stops), default=len(text))
        self._held = text[certain:]
        self._blind = max(0, self._blind - certain)
        return text[:certain], None

    def release(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, stop: str) -> int:
        return text.find(stop, max(0, self._blind - len(stop) + 1))


def _begins(text: str, stop: str) -> int:
    """Where in ``text`` the stop string may have begun; ``len(text)`` where it cannot have."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)


@dataclass(slots=True)
class TextDelta:
    """What one delta of the engine added to a stream of text.

    Attributes:
        text: new text; a token's text may come with a later token.
        token_ids, logprobs, prompt_logprobs, cached_tokens, error: the engine's, cut behind a stop string.
        offsets: where each token begins in the output's text, in characters.
        finish_reason: the engine's, or "stop" where a stop string ended the text.
        stop_reason: the stop string or stop token id that ended it.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached_tokens: int = 0


class TextStream:
    """Turns the engine's deltas of one request into text.

    Attributes:
        stopped: a stop string ended the text; the engine does not know, so the caller must abort the request.
        num_tokens: tokens so far.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = TextDecoder(detokenizer, prompt_token_ids, skip_special=skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._length = 0
        self.num_tokens = 0
        self.stopped = False

    def push(self, delta: TokenDelta) -> TextDelta:
        text, offsets = "", []
        last = len(delta.token_ids) - 1
        stop: int | str | None = None
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            offsets.append(self._length)
            # The token that ended the output is no part of the text.
            ends = position == last and delta.finish_reason == "stop"
            certain, stop = self._feed("" if ends else self._decoder.push(token_id))
            text += certain
            if stop is not None:
                break
        if stop is None and delta.finish_reason is not None:
            certain, stop = self._feed(self._decoder.flush())
            text += certain if stop is not None else certain + self._stops.release()
        self.stopped = stop is not None
        kept = len(offsets)
        return TextDelta(
            text=text,
            token_ids=delta.token_ids[:kept],
            logprobs=delta.logprobs[:kept] if delta.logprobs is not None else None,
            prompt_logprobs=delta.prompt_logprobs,
            offsets=offsets,
            finish_reason="stop" if stop is not None else delta.finish_reason,
            stop_reason=stop if stop is not None else delta.stop_reason,
            error=delta.error,
            cached_tokens=delta.cached_tokens,
        )

    def _feed(self, text: str) -> tuple[str, str | None]:
        self._length += len(text)
        return self._stops.push(text, active=self.num_tokens > self._min_tokens)
