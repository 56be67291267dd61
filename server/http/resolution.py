"""What a request, or one stream of it, runs with: the one place that turns names into versions, held while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from weft.adapters.choices import Choice
from weft.adapters.composition import Combination, Composition, Member
from weft.server.engine.request import COMPOSED
from weft.server.errors import Conflict, InvalidRequest, NotFound, RequestError
from weft.server.http.state import ServerState
from weft.server.registry.compositions import WeighedId
from weft.server.registry.records import AdapterRecord


@dataclass(frozen=True)
class Wanted:
    """What a stream of tokens names.

    Attributes:
        model: the base, an adapter or a named composition; with ``members``, the base.
        members: adapters to compose for this stream alone; empty: ``model`` says it all.
        field: where it stands in the body, in front of the fields that errors name: "" or "logit_arithmetic[1].".
        base: the proxy model that adapters must belong to; None: the main one.
        at: the field that ``model`` comes from; default: "model" in ``field``.
    """

    model: str
    members: tuple[WeighedId, ...] = ()
    combination: Combination = "lorahub"
    field: str = ""
    base: str | None = None
    at: str | None = None


@dataclass(frozen=True)
class Resolved:
    """What a stream of tokens runs with, each version held.

    Attributes:
        name: under which its traffic is accounted; None: the base.
        adapter: version of the adapter, where it is one. composition: where they are several.
        ids: of the adapters held. Whoever unloads one by force ends the request.
        choices: what it lets requests choose.
    """

    name: str | None = None
    adapter: str | None = None
    composition: Composition | None = None
    ids: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()

    @contextmanager
    def naming(self) -> Iterator[None]:
        """The engine's errors of the members of a named composition, as those of ``model``, which named it."""
        try:
            yield
        except RequestError as error:
            if self.name != COMPOSED and (error.param or "").startswith("adapters"):
                error.param = "model"
            raise


@contextmanager
def resolved(state: ServerState, wanted: Wanted) -> Iterator[Resolved]:
    """As ``leased``, held until the end."""
    with ExitStack() as held:
        yield leased(state, wanted, held)


def leased(state: ServerState, wanted: Wanted, held: ExitStack) -> Resolved:
    """What ``wanted`` stands for at this moment, held by ``held``.

    Raises:
        NotFound, InvalidRequest: naming the field.
        Conflict: a named composition whose member is not served.
    """
    model, at = wanted.model, wanted.at or f"{wanted.field}model"
    plain = state.base_names if wanted.base is None else (wanted.base,)
    if wanted.members:
        if model not in plain:
            raise InvalidRequest(f"with 'adapters', '{at}' must be the base, {state.base_name!r}", param=at)
        composition = _composition(state, wanted, wanted.members, wanted.combination, held)
        return Resolved(COMPOSED, None, composition, _ids(wanted.members))
    if model in plain:
        return Resolved()
    if model in state.client.info.proxies:
        raise InvalidRequest(
            f"{_where(at)}{model!r} is a proxy model, which serves inside 'proxy' and 'logit_arithmetic'",
            param=at,
            code="proxy_model",
        )
    if state.proxies.find(model) is not None:
        raise InvalidRequest(f"'{at}': {model!r} is a proxy itself, and there are no proxies of proxies", param=at)
    named = state.compositions.find(model)
    if named is None:
        record = _adapter(state, model, wanted.base, at, held)
        return Resolved(record.id, record.version, None, (record.id,), record.info.choices)
    _check_base(state, f"composition {model!r}", named.base, wanted.base, at)
    if error := state.compositions.state(named).error:
        message = f"{_where(at)}composition {model!r} is not served: {error}"
        raise Conflict(message, param=at, code="composition_broken")
    composition = _composition(state, wanted, named.members, named.combination, held)
    return Resolved(named.id, None, composition, _ids(named.members))


def _adapter(state: ServerState, id: str, base: str | None, at: str, held: ExitStack) -> AdapterRecord:
    try:
        record = held.enter_context(state.registry.lease(id))
    except NotFound as error:
        raise NotFound(_where(at) + error.message, param=at, code=error.code) from None
    _check_base(state, f"adapter {id!r}", record.base, base, at)
    return record


def _where(at: str) -> str:
    """Which field an error is about, in front of its message; of a request's model that goes without saying."""
    return "" if at == "model" else f"'{at}': "


def _check_base(state: ServerState, what: str, base: str | None, wanted: str | None, at: str) -> None:
    """Raises ``InvalidRequest`` where an adapter or a composition belongs to another model than is wanted."""
    if base == wanted:
        return
    model = repr(base or state.base_name)
    hint = f"give 'model': {model} beside it"
    if at in ("model", "base") or at.startswith("adapters["):
        hint = "what belongs to a proxy model serves inside 'proxy' and 'logit_arithmetic'"
    raise InvalidRequest(
        f"'{at}': {what} belongs to the model {model}, not to {wanted or state.base_name!r}; {hint}",
        param=at,
        code="wrong_base",
    )


def _composition(
    state: ServerState, wanted: Wanted, members: Sequence[WeighedId], combination: Combination, held: ExitStack
) -> Composition:
    field = wanted.field + "adapters[{}].id"
    state.compositions.check_members(members, field)
    records = [
        _adapter(state, member.id, wanted.base, field.format(index), held) for index, member in enumerate(members)
    ]
    weighed = (Member(record.version, member.weight) for record, member in zip(records, members, strict=True))
    return Composition(tuple(weighed), combination)


def _ids(members: Sequence[WeighedId]) -> tuple[str, ...]:
    return tuple(member.id for member in members)
