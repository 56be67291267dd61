"""How requests ask for logit arithmetic: the bodies of ``proxy`` and ``logit_arithmetic``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from weft.adapters.composition import Combination
from weft.server.errors import InvalidRequest
from weft.server.http.arithmetic import Asked, AskedTerm, Encode, asked_proxy
from weft.server.http.members import WeighedAdapters, weighed_ids
from weft.server.http.messages import Body, Messages, unfit
from weft.server.registry.proxies import Stream

MAX_TERMS = 16
MAX_WEIGHT = 100.0
"""Of a weight's size. Logits are of the order of ten: far beyond this, one term alone would decide."""

NUCLEUS = (
    "Keep only the tokens in the nucleus of this size of the request's own distribution, before adding (DExperts)."
)

Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
TopP = Annotated[float, Field(gt=0, le=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _kind(value: object) -> str:
    return "(tokens)" if isinstance(value, list) else "(text)"


TermPrompt = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag("(tokens)")],
    Discriminator(_kind),
]


class StreamBody(Body):
    """What a further stream of a request runs with."""

    model: str | None = Field(
        None, min_length=1, max_length=1024, description="A proxy model's name, or the base's; default: the base's."
    )
    adapter: str | None = Field(
        None, min_length=1, max_length=1024, description="The id of an adapter of that model, or of a composition."
    )
    adapters: WeighedAdapters | None = Field(None, description="Composed for this stream, in place of 'adapter'.")
    combination: Combination | None = Field(None, description="Of 'adapters', as in a request.")
    task_id: int | None = Field(None, ge=0, lt=2**31, description="As in a request, for this stream's adapter.")
    lora_rank: int | None = Field(None, ge=1, lt=2**31, description="As in a request, for this stream's adapter.")
    own_template: bool | None = Field(
        None,
        description="Give it the request's messages as its own model's chat template renders them; default: it gets "
        "the same token ids as the request.",
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> StreamBody:
        if self.combination is not None and self.adapters is None:
            raise unfit("it needs 'adapters'", "combination")
        if self.adapter is not None and self.adapters is not None:
            raise unfit("'adapter' and 'adapters' exclude each other", "adapters")
        return self

    def stream(self) -> Stream:
        """The same as plain data."""
        return Stream(
            model=self.model,
            adapter=self.adapter,
            members=weighed_ids(self.adapters or ()),
            combination=self.combination or "lorahub",
            task_id=self.task_id,
            lora_rank=self.lora_rank,
            own_template=self.own_template is True,
        )


class TermBody(StreamBody):
    """A term of ``logit_arithmetic``."""

    weight: Weight = Field(description="What its logits count. Of the request's own stream it is 1 by default.")
    prompt: TermPrompt | None = Field(None, description="Its own prompt, in place of the request's.")
    messages: Messages | None = Field(None, description="Its own conversation, in place of the request's prompt.")

    @model_validator(mode="after")
    def _check_prompt(self) -> TermBody:
        if self.prompt is not None and self.messages is not None:
            raise unfit("'prompt' and 'messages' of a term exclude each other")
        return self

    @property
    def is_own(self) -> bool:
        """It says no more than what the request's own stream counts."""
        return self.stream() == Stream() and self.prompt is None and self.messages is None


class ProxyBody(Body):
    """Proxy-tuning: s = s_own + alpha (s_expert - s_anti_expert)."""

    expert: StreamBody
    anti_expert: StreamBody
    alpha: Weight | None = Field(None, description="Default 1.")
    base_top_p: TopP | None = Field(None, description=NUCLEUS)

    def asked(self, field: str = "proxy.") -> Asked:
        """As plain data; ``field`` is in front of the fields that errors name. Raises ``InvalidRequest``."""
        alpha = 1.0 if self.alpha is None else self.alpha
        return asked_proxy(
            self.expert.stream(), self.anti_expert.stream(), alpha=alpha, top_p=self.base_top_p, field=field
        )


Terms = Annotated[list[TermBody], Field(min_length=1, max_length=MAX_TERMS, fail_fast=True)]


def asked_terms(terms: Sequence[TermBody], top_p: float | None, encode: Callable[[TermBody], Encode | None]) -> Asked:
    """``logit_arithmetic`` as plain data. Raises ``InvalidRequest`` where two terms are the request's own stream."""
    asked, own_weight = [], None
    for index, term in enumerate(terms):
        field = f"logit_arithmetic[{index}]"
        if not term.is_own:
            asked.append(AskedTerm(field, term.weight, term.stream(), encode(term)))
        elif own_weight is None:
            own_weight = term.weight
        else:
            raise InvalidRequest(
                f"'{field}' is the request's own stream a second time; add the weights up", param=field
            )
    return Asked(tuple(asked), 1.0 if own_weight is None else own_weight, top_p, "logit_arithmetic")
