"""The bodies of the admin API, of vLLM's adapter routes and of the tokenizer routes; an adapter as it is shown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, model_validator

from weft.adapters.choices import Choice
from weft.server.engine.info import EngineStats
from weft.server.errors import InvalidRequest
from weft.server.http.messages import Body, Messages, TemplateOptions
from weft.server.http.schemas import TokenId
from weft.server.http.steering import ProxyBody
from weft.server.registry.records import AdapterRecord, residency

MAX_ID = 256
MAX_SOURCE = 4096
MAX_TOKENS = 1 << 22


class AdapterLoad(Body):
    """``POST /admin/adapters``."""

    id: str = Field(min_length=1, max_length=MAX_ID)
    source: str = Field(min_length=1, max_length=MAX_SOURCE)
    base: str | None = Field(
        None, min_length=1, description="The frozen model it belongs to, the base or a proxy model; default: the base."
    )
    pinned: bool = Field(False, description="Keep its weights on the device.")


class AdapterReplace(Body):
    """``PUT /admin/adapters/{id}``."""

    source: str = Field(min_length=1, max_length=MAX_SOURCE)
    pinned: bool | None = Field(None, description="Default: as it was.")


class ProxyReplace(ProxyBody):
    """``PUT /admin/proxies/{id}``."""

    base: str | None = Field(
        None,
        min_length=1,
        description="What is steered: the base, an adapter of it or a composition; default: the base.",
    )


class ProxyCreate(ProxyReplace):
    """``POST /admin/proxies``."""

    id: str = Field(min_length=1, max_length=MAX_ID)


class VllmLoad(Body):
    """``POST /v1/load_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=MAX_ID)
    lora_path: str = Field(min_length=1, max_length=MAX_SOURCE)
    load_inplace: bool = Field(False, description="Replace the adapter of that name, if there is one.")
    base_model_name: str | None = Field(None, min_length=1)


class VllmUnload(Body):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=MAX_ID)
    lora_int_id: int | None = Field(None, description="Ignored.")


class TokenizeBody(TemplateOptions):
    """``POST /tokenize``: a prompt, or messages."""

    model: str | None = Field(None, min_length=1, max_length=1024)
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give one of 'prompt' and 'messages'", param="prompt")
        return self


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = Field(None, min_length=1, max_length=1024)
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


def choices_shown(choices: Iterable[Choice]) -> dict[str, dict[str, int | None]]:
    """What requests choose of an adapter: bounds, both allowed, and the default, null where one must be given."""
    return {choice.name: {"min": choice.low, "max": choice.high, "default": choice.default} for choice in choices}


def adapter_card(record: AdapterRecord, stats: EngineStats) -> dict[str, Any]:
    """An adapter as the admin API shows it: what it is, how it is served, where it is now."""
    info = record.info
    tier, refcount = residency(record, stats)
    return {
        "id": record.id,
        "object": "adapter",
        "version": record.version,
        "source": record.source,
        "base": record.base,
        "created": record.created,
        "state": record.state,
        "error": record.error,
        "pinned": record.pinned,
        "method": info.method,
        "forms": list(info.forms),
        "rank": info.rank,
        "num_sites": info.num_sites,
        "nbytes": info.nbytes,
        "virtual_tokens": info.virtual_tokens,
        "position_offset": info.position_offset,
        "choices": choices_shown(info.choices),
        "invocation": list(info.invocation),
        "whole_prompts": info.whole_prompts,
        "tier": tier,
        "refcount": refcount,
    }
