"""Fields of OpenAI's and vLLM's API that weft does not serve.

They are accepted where their value cannot change the output, and refused by name where it would.
"""

from __future__ import annotations

from collections.abc import Mapping

from weft.server.errors import InvalidRequest

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""For the caller's own book-keeping: they cannot change the output."""

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Not served: the values, besides null, that ask for nothing."""


def drop_neutral(body: object) -> object:
    """A body without the fields that ask for nothing. Raises ``InvalidRequest`` for those weft does not serve."""
    if not isinstance(body, dict):
        return body
    kept = {}
    for name, value in body.items():
        if name in IGNORED:
            continue
        if name not in NEUTRAL:
            kept[name] = value
        elif value is not None and not any(type(value) is type(ok) and value == ok for ok in NEUTRAL[name]):
            raise InvalidRequest(f"'{name}' is not supported by this server", param=name, code="unsupported_field")
    return kept
