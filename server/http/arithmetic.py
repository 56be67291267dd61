"""From what a request says of logit arithmetic to what the engine is asked: names to versions, held while it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.engine.info import ModelInfo
from weft.server.engine.request import COMPOSED
from weft.server.engine.variants import resolve
from weft.server.errors import Conflict, InvalidRequest, NotFound, RequestError
from weft.server.http.resolution import Resolved, Wanted, leased
from weft.server.http.state import ServerState
from weft.server.registry.proxies import NamedProxy, Stream
from weft.server.tokenization import Tokenizer

Encode = Callable[[Tokenizer], list[int]]
"""A prompt's token ids, as a tokenizer makes them."""


@dataclass(frozen=True)
class AskedTerm:
    """A term as it was asked for.

    Attributes:
        field: where it stands in the body, for errors: "proxy.expert".
        encode: its own prompt; None: the request's.
    """

    field: str
    weight: float
    stream: Stream
    encode: Encode | None = None


@dataclass(frozen=True)
class Asked:
    """s = weight · s_own + Σ term.weight · s_term, as it was asked for in ``field``. ``top_p``: of the own stream."""

    terms: tuple[AskedTerm, ...]
    weight: float = 1.0
    top_p: float | None = None
    field: str = "proxy"


@dataclass(frozen=True)
class Steering:
    """The same with names resolved.

    Attributes:
        field: where it stands in the body. fields: where each term does.
        encodes: each term's own prompt; None: the request's.
        ids: of the adapters held.
    """

    arithmetic: LogitArithmetic
    fields: tuple[str, ...]
    encodes: tuple[Callable[[], list[int]] | None, ...]
    ids: tuple[str, ...]
    field: str

    @contextmanager
    def naming(self) -> Iterator[None]:
        """The engine's errors, which count its own terms, as those of the fields that the request has."""
        try:
            yield
        except RequestError as error:
            where = re.fullmatch(r"(logit_arithmetic(?:\[(\d+)\])?)(\..+)?", error.param or "")
            if where is not None:
                field, rest = self.field, where[3] or ""
                if where[2] is not None:
                    field, term = self.fields[int(where[2])], self.arithmetic.terms[int(where[2])]
                    rest = ".adapter" if rest and term.adapter_name != COMPOSED else rest  # a composition by its name
                error.message = error.message.replace(where[1], field)
                error.param, error.args = field + rest, (error.message,)
            raise

    @property
    def streams(self) -> int:
        """How many streams each of the request's sequences has, its own included."""
        return 1 + len(self.arithmetic.terms)

    def encoded(self) -> Steering:
        """With the terms' own prompts as token ids. Takes as long as tokenizing does. Raises ``InvalidRequest``."""
        terms = []
        for term, encode, field in zip(self.arithmetic.terms, self.encodes, self.fields, strict=True):
            try:
                terms.append(term if encode is None else replace(term, prompt_token_ids=encode()))
            except InvalidRequest as error:
                raise _within(field, error) from None
        return replace(self, arithmetic=replace(self.arithmetic, terms=tuple(terms)))


def asked_proxy(
    expert: Stream, anti_expert: Stream, *, alpha: float = 1.0, top_p: float | None = None, field: str = "proxy."
) -> Asked:
    """Proxy-tuning: s_own + alpha (s_expert - s_anti_expert). Raises ``InvalidRequest`` for one that names nothing."""
    sides = ((f"{field}expert", alpha, expert), (f"{field}anti_expert", -alpha, anti_expert))
    for at, _, stream in sides:
        if stream.names_nothing:
            raise InvalidRequest(f"'{at}' must name a 'model', an 'adapter' or both", param=at)
    return Asked(tuple(AskedTerm(*side) for side in sides), top_p=top_p)


def steering(
    state: ServerState,
    asked: Asked,
    own: Resolved,
    choices: dict[str, int],
    render: Encode | None,
    held: ExitStack,
) -> Steering:
    """What ``asked`` stands for at this moment, each version held by ``held``.

    Args:
        own: what the request itself runs with. choices: what it chooses of that.
        render: the request's messages, as a tokenizer's own template renders them; None: it has no messages.

    Raises:
        NotFound, InvalidRequest, Conflict: naming the field.
    """
    terms, encodes, ids = [], [], list(own.ids)
    for one in asked.terms:
        model = _model(state, one)
        runs = own if one.stream.names_nothing else _resolved(state, one, model, held)
        chosen = one.stream.choices or (choices if runs is own else {})
        try:
            resolve(runs.choices, chosen)
        except InvalidRequest as error:
            raise _within(one.field, error) from None
        terms.append(Term(one.weight, model, runs.adapter, runs.name, runs.composition, chosen))
        encodes.append(_encode(state, one, model, render))
        ids += runs.ids
    arithmetic = LogitArithmetic(tuple(terms), asked.weight, asked.top_p)
    fields = tuple(one.field for one in asked.terms)
    return Steering(arithmetic, fields, tuple(encodes), tuple(ids), asked.field)


def steered_by(
    state: ServerState, proxy: NamedProxy, choices: dict[str, int] | None, render: Encode | None, held: ExitStack
) -> tuple[Resolved, Steering]:
    """What a request runs with that names ``proxy``, and the streams that steer it.

    The arguments are as in ``steering``; ``choices`` None: they are not checked.

    Raises:
        Conflict: the proxy cannot be served now, with the reason.
        InvalidRequest: it needs messages, or what the request chooses has no meaning.
    """
    if render is None and (proxy.expert.own_template or proxy.anti_expert.own_template):
        raise InvalidRequest(f"proxy {proxy.id!r} reads messages: use /v1/chat/completions", param="model")
    try:
        own = leased(state, Wanted(proxy.base or state.base_name, at="base"), held)
        asked = asked_proxy(proxy.expert, proxy.anti_expert, alpha=proxy.alpha, top_p=proxy.base_top_p, field="")
        steered = steering(state, asked, own, {}, render, held)
    except (NotFound, InvalidRequest, Conflict) as error:
        reason = f"proxy {proxy.id!r} is not served: {error.message}"
        raise Conflict(reason, param="model", code="proxy_broken") from error
    if choices is not None:
        resolve(own.choices, choices)
    return own, replace(steered, field="model")


def problem(state: ServerState, proxy: NamedProxy) -> str | None:
    """Why a proxy cannot be served now; None where it can."""
    try:
        with ExitStack() as held:
            steered_by(state, proxy, None, any_messages, held)
    except Conflict as error:
        return error.message
    return None


def any_messages(tokenizer: Tokenizer) -> list[int]:
    """Stands for a request's messages where names are resolved and nothing is generated."""
    return []


def check_terms(steered: Steering, prompts: Sequence[Sequence[int]], wanted: int | None, info: ModelInfo) -> None:
    """Refuse, with ``InvalidRequest``, prompts that a further stream could not be given. ``wanted``: new tokens."""
    for term, field in zip(steered.arithmetic.terms, steered.fields, strict=True):
        model = info if term.model is None else info.proxies[term.model]
        for prompt in prompts if term.prompt_token_ids is None else [term.prompt_token_ids]:
            if not prompt:
                raise InvalidRequest(f"the prompt of '{field}' has no tokens", param=field)
            if max(prompt) >= model.vocab_size:
                raise InvalidRequest(
                    f"'{field}' would be given token id {max(prompt)}, and its model has {model.vocab_size}",
                    param=field,
                )
            total = len(prompt) + (1 if wanted is None else wanted)
            if total > model.max_model_len:
                raise InvalidRequest(
                    f"the maximum context length of the model of '{field}' is {model.max_model_len} tokens, but "
                    f"{total} were requested ({len(prompt)} in the prompt)",
                    param=field,
                    code="context_length_exceeded",
                )


def _model(state: ServerState, one: AskedTerm) -> str | None:
    """The proxy model that a term names; None for the main one."""
    name, at = one.stream.model, f"{one.field}.model"
    if name is None or name in state.base_names:
        return None
    if name in state.client.info.proxies:
        return name
    if state.proxies.find(name) is not None:
        raise InvalidRequest(f"'{at}': {name!r} is a proxy itself, and there are no proxies of proxies", param=at)
    if state.registry.names.known(name):
        raise InvalidRequest(f"'{at}': {name!r} is not a model; name it as 'adapter'", param=at)
    known = ", ".join(map(repr, (state.base_name, *state.client.info.proxies)))
    raise NotFound(f"'{at}': there is no model {name[:64]!a}; there are {known}", param=at)


def _resolved(state: ServerState, one: AskedTerm, model: str | None, held: ExitStack) -> Resolved:
    adapter, at = one.stream.adapter, f"{one.field}.adapter"
    if adapter is not None and (adapter in state.base_names or adapter in state.client.info.proxies):
        raise InvalidRequest(f"'{at}': {adapter!r} is a model; name it as 'model'", param=at)
    name = adapter or model or state.base_name
    wanted = Wanted(name, one.stream.members, one.stream.combination, f"{one.field}.", base=model, at=at)
    return leased(state, wanted, held)


def _encode(
    state: ServerState, one: AskedTerm, model: str | None, render: Encode | None
) -> Callable[[], list[int]] | None:
    """A term's own prompt. The main model's tokenizer and template serve, unless its own model's are asked for."""
    own = one.stream.own_template
    tokenizer = state.proxy_tokenizers[model] if own and model is not None else state.tokenizer
    encode = one.encode
    if encode is None and own:
        if render is None:
            at = f"{one.field}.own_template"
            raise InvalidRequest(f"'{at}' needs messages: use /v1/chat/completions", param=at)
        encode = render
    return None if encode is None else lambda: encode(tokenizer)


def _within(field: str, error: InvalidRequest) -> InvalidRequest:
    """The same error, of something inside ``field``."""
    param = f"{field}.{error.param}" if error.param else field
    return InvalidRequest(f"in '{field}': {error.message}", param=param, code=error.code)
