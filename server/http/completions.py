"""``/v1/completions``: from the body to a plan, from deltas to choices."""

from __future__ import annotations

from typing import Any

from weft.server.engine.request import TokenLogprobs
from weft.server.engine.streams import TextDelta
from weft.server.http.chat import term_encode
from weft.server.http.generation import Generation, Plan
from weft.server.http.messages import TemplateOptions
from weft.server.http.render import completion_logprobs, prompt_logprobs
from weft.server.http.schemas import CompletionBody
from weft.server.tokenization import Tokenizer

DEFAULT_MAX_TOKENS = 16


class CompletionFormat:
    """How one request to /v1/completions is read and answered."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, body: CompletionBody, tokenizer: Tokenizer) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self.tells_ids = body.return_token_ids is True
        given = body.prompt
        self._texts: list[str] | None = None
        if isinstance(given, str):
            self._texts = [given]
        elif isinstance(given[0], str):
            self._texts = [text for text in given if isinstance(text, str)]
        self._echoed: dict[int, tuple[str, list[int]]] = {}

    def plan(self, request_id: str) -> Plan:
        body = self._body
        limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        own: dict[str, Any] = {"max_tokens": max(1, limit), "logprobs": body.logprobs}
        if body.echo and body.logprobs is not None:
            own["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        special = body.add_special_tokens is not False
        return Plan(
            request_id=request_id,
            wanted=body.wanted(),
            asked=body.asked(lambda term: term_encode(term, TemplateOptions.model_validate({}), special=special)),
            encode=self._encode,
            prompt_param="prompt",
            params=body.sampling(**own),
            n=body.choices(),
            no_output=limit == 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            cache_salt=body.cache_salt,
            priority=body.priority or 0,
            choices=body.adapter_choices(),
        )

    def choice(self, generation: Generation, index: int, delta: TextDelta, *, first: bool) -> dict[str, Any]:
        """A choice, or a part of one; ``first``: the part that comes with what is known of the prompt."""
        body, prompt = self._body, generation.prompt_of(index)
        echo, echo_offsets = self._echo(index // generation.plan.n, prompt) if body.echo else ("", [])
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + delta.text if first else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.logprobs is not None and delta.logprobs is not None:
            token_ids = delta.token_ids
            entries: list[TokenLogprobs | None] = [*delta.logprobs]
            offsets = [len(echo) + offset for offset in delta.offsets]
            if body.echo and first:
                token_ids, offsets = [*prompt, *token_ids], [*echo_offsets, *offsets]
                entries = [*(delta.prompt_logprobs or []), *entries]
            choice["logprobs"] = completion_logprobs(self._tokenizer, token_ids, entries, offsets, body.logprobs)
        if first and body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, delta.prompt_logprobs or [], body.prompt_logprobs
            )
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = prompt if first else None
        return choice

    def chunks(self, generation: Generation, index: int, delta: TextDelta, *, first: bool) -> list[dict[str, Any]]:
        """The choice objects of the events that tell of ``delta``."""
        return [self.choice(generation, index, delta, first=first)]

    def reply(self, generation: Generation, choices: list[TextDelta]) -> dict[str, Any]:
        """What a reply in one piece has besides its head."""
        return {"choices": [self.choice(generation, i, choice, first=True) for i, choice in enumerate(choices)]}

    def first_chunk(self, generation: Generation) -> dict[str, Any]:
        """What the first event of a stream has besides its head."""
        return {}

    def _encode(self) -> list[list[int]]:
        prompt, special = self._body.prompt, self._body.add_special_tokens is not False
        if self._texts is not None:
            return [self._tokenizer.encode(text, add_special_tokens=special) for text in self._texts]
        if isinstance(prompt[0], int):
            return [[token_id for token_id in prompt if isinstance(token_id, int)]]
        return [token_ids for token_ids in prompt if isinstance(token_ids, list)]

    def _echo(self, position: int, prompt: list[int]) -> tuple[str, list[int]]:
        """The text of a prompt, as it was given if it was given as text, and where its tokens begin in it."""
        if position not in self._echoed:
            if self._texts is not None:
                text = self._texts[position]
            else:
                text = self._tokenizer.decode(prompt, skip_special_tokens=self._body.skip_special_tokens is not False)
            *offsets, end = self._tokenizer.offsets(prompt)
            # A decoder drops the space in front of the first word; the tokens still have it.
            dropped = max(0, end - len(text))
            self._echoed[position] = text, [max(0, offset - dropped) for offset in offsets]
        return self._echoed[position]
