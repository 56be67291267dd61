"""``/v1/chat/completions``: from the body to a plan, from deltas to messages."""

from __future__ import annotations

from typing import Any

from weft.server.engine.streams import TextDelta
from weft.server.http.arithmetic import Encode
from weft.server.http.generation import Generation, Plan
from weft.server.http.messages import Message, TemplateOptions
from weft.server.http.render import chat_logprobs, prompt_logprobs
from weft.server.http.schemas import ChatBody
from weft.server.http.steering import TermBody
from weft.server.tokenization import Tokenizer


def encode_chat(tokenizer: Tokenizer, messages: list[Message], options: TemplateOptions) -> list[int]:
    """The prompt of a conversation, as token ids. Raises ``InvalidRequest``."""
    conversation = [message.for_template() for message in messages]
    # Before the template: what it makes is not much longer, and it should not have to render what is refused anyhow.
    tokenizer.check(*(message["content"] for message in conversation), param="messages")
    continued = options.continue_final_message is True
    text = tokenizer.render_chat(
        conversation,
        add_generation_prompt=not continued if options.add_generation_prompt is None else options.add_generation_prompt,
        continue_final_message=continued,
        template_kwargs=options.chat_template_kwargs,
    )
    # A template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=options.add_special_tokens is True, param="messages")


def term_encode(term: TermBody, options: TemplateOptions, *, special: bool) -> Encode | None:
    """How a term's own prompt becomes token ids; None where it has none. ``special``: with the tokens around a text."""
    messages, prompt = term.messages, term.prompt
    if messages is not None:
        return lambda tokenizer: encode_chat(tokenizer, messages, options)
    if isinstance(prompt, str):
        return lambda tokenizer: tokenizer.encode(prompt, add_special_tokens=special)
    return None if prompt is None else lambda tokenizer: prompt


class ChatFormat:
    """How one request to /v1/chat/completions is read and answered."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, body: ChatBody, tokenizer: Tokenizer) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self.tells_ids = body.return_token_ids is True

    def plan(self, request_id: str) -> Plan:
        body, limit = self._body, self._body.token_limit()
        own: dict[str, Any] = {"max_tokens": None if limit is None else max(1, limit)}
        if body.logprobs:
            own["logprobs"] = body.top_logprobs or 0
        return Plan(
            request_id=request_id,
            wanted=body.wanted(),
            asked=body.asked(lambda term: term_encode(term, body, special=body.add_special_tokens is not False)),
            render=lambda tokenizer: encode_chat(tokenizer, body.messages, body),
            encode=lambda: [encode_chat(self._tokenizer, body.messages, body)],
            prompt_param="messages",
            params=body.sampling(**own),
            n=body.choices(),
            no_output=limit == 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            cache_salt=body.cache_salt,
            priority=body.priority or 0,
            choices=body.adapter_choices(),
        )

    def chunks(self, generation: Generation, index: int, delta: TextDelta, *, first: bool) -> list[dict[str, Any]]:
        """The choice objects of the events that tell of ``delta``; a message's role comes before its text."""
        message = {"content": delta.text} if delta.text else {}
        chunk = self._choice(index, "delta", message, delta)
        if not first:
            return [chunk]
        role = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}, chunk]

    def reply(self, generation: Generation, choices: list[TextDelta]) -> dict[str, Any]:
        """What a reply in one piece has besides its head."""
        body = self._body
        reply: dict[str, Any] = {
            "choices": [
                self._choice(index, "message", {"role": "assistant", "content": delta.text, "refusal": None}, delta)
                for index, delta in enumerate(choices)
            ]
        }
        if body.prompt_logprobs is not None:
            reply["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, choices[0].prompt_logprobs or [], body.prompt_logprobs
            )
        return reply | self.first_chunk(generation)

    def first_chunk(self, generation: Generation) -> dict[str, Any]:
        """What the first event of a stream has besides its head."""
        return {"prompt_token_ids": generation.prompts[0]} if self._body.return_token_ids else {}

    def _choice(self, index: int, key: str, message: dict[str, Any], delta: TextDelta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            key: message,
            "logprobs": None if delta.logprobs is None else chat_logprobs(self._tokenizer, delta.logprobs),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice
