"""Log-probabilities and usage as OpenAI and vLLM write them, and what both kinds of completion share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.server.engine.request import TokenLogprobs
from weft.server.engine.streams import Detokenizer
from weft.server.http.generation import Usage

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; vLLM's number."""


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def usage_dict(usage: Usage) -> dict[str, Any]:
    written: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.compose_seconds is not None:
        written["weft"] = {"compose_ms": round(usage.compose_seconds * 1000, 3)}
    return written


def completion_logprobs(
    detokenizer: Detokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
) -> dict[str, Any]:
    """The ``logprobs`` of /v1/completions: four lists, one item per token; the first prompt token has none."""
    text = detokenizer.token_text
    top: list[dict[str, float] | None] = []
    for entry in entries:
        if entry is None:
            top.append(None)
            continue
        alternatives = {text(token_id): finite(logprob) for token_id, logprob in entry.top[:num_top]}
        # The token that stands there is always among them, and as the same float: clients compare the two.
        alternatives[text(entry.token_id)] = finite(entry.logprob)
        top.append(alternatives)
    return {
        "tokens": [text(token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": top,
        "text_offset": list(offsets),
    }


def chat_logprobs(detokenizer: Detokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The ``logprobs`` of /v1/chat/completions."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.token_bytes(token_id)
        return {
            "token": detokenizer.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": None if raw is None else list(raw),
        }

    content = [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*top) for top in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    detokenizer: Detokenizer, entries: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's ``prompt_logprobs``: per prompt token, by token id; None for the first."""

    def alternative(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": detokenizer.token_text(token_id)}

    return [
        None
        if entry is None
        else {
            **{str(t): alternative(t, logprob, rank) for rank, (t, logprob) in enumerate(entry.top[:num_top], 1)},
            str(entry.token_id): alternative(entry.token_id, entry.logprob, entry.rank),
        }
        for entry in entries
    ]
