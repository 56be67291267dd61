"""The messages of a conversation, as bodies have them, and how they become a prompt; what every body keeps to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from weft.server.errors import InvalidRequest

MAX_MESSAGES = 4096
UNFIT = "unfit"
"""The type of the errors that ``unfit`` makes, among pydantic's own."""


def unfit(reason: str, *where: str | int) -> ValidationError:
    """What a validator raises of a value that may stand anywhere in a body: pydantic puts its place in front.

    Args:
        reason: what follows the field's name and a colon in the message.
        where: from the value that is validated to the field at fault; nothing: itself.
    """
    kind = PydanticCustomError(UNFIT, "{reason}", {"reason": reason})
    return ValidationError.from_exception_data("body", [InitErrorDetails(type=kind, loc=where, input=None)])


class Body(BaseModel):
    """What every body keeps to."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


def text_kind(value: object) -> str:
    return "(list)" if isinstance(value, list) else "(text)"


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True), Tag("(list)")],
    Discriminator(text_kind),
]


class FunctionCall(Body):
    """What an assistant's message called."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, message: object) -> object:
        # Clients send back what they were given, empty fields included.
        empty = {"annotations", "audio", "function_call", "reasoning_content", "refusal"}
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if value or key not in empty}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise unfit(f"one of role {self.role!r} needs it", "content")
        if self.tool_calls and self.role != "assistant":
            raise unfit("only an assistant's have them", "tool_calls")
        return self

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text content, arguments of calls as objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.text()}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class TemplateOptions(Body):
    """How a conversation becomes a prompt."""

    add_generation_prompt: bool | None = Field(None, description="Begin the assistant's message; default true.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message; default false.")
    add_special_tokens: bool | None = Field(
        None, description="With the tokens the model expects around a text; default true for text, false for messages."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)

    @model_validator(mode="after")
    def _check_continue(self) -> TemplateOptions:
        if self.continue_final_message and self.add_generation_prompt:
            message = "'continue_final_message' and 'add_generation_prompt' exclude each other"
            raise InvalidRequest(message, param="continue_final_message")
        return self


def _arguments(written: str) -> Any:
    try:
        return orjson.loads(written or "{}")
    except orjson.JSONDecodeError as error:
        message = "'arguments' of a tool call in 'messages' must be JSON"
        raise InvalidRequest(message, param="messages") from error
