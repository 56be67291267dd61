"""From a request to its streams: each checked against its model, all of them against each other, and held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace

from weft.server.config import EngineConfig
from weft.server.engine.arithmetic import LogitArithmetic, Term
from weft.server.engine.frozen import FrozenModel
from weft.server.engine.request import EngineRequest
from weft.server.engine.sequence import Mix, Sequence
from weft.server.engine.variants import RunsWith
from weft.server.errors import InvalidRequest, RequestError


@dataclass(frozen=True)
class Stream:
    """One stream of a request that was checked.

    Attributes:
        request: what a request for this stream alone would be.
        room: tokens of output at most.
        term: which of the terms it is; None: the request's own.
    """

    model: FrozenModel
    request: EngineRequest
    runs: RunsWith
    room: int
    weight: float = 1.0
    term: int | None = None


class Intake:
    """Takes requests in.

    Args:
        models: by name; None: the main one.
    """

    def __init__(self, config: EngineConfig, models: dict[str | None, FrozenModel]) -> None:
        self._config = config
        self._models = models

    def check(self, request: EngineRequest) -> list[Stream]:
        """The streams of a request, its own first. Terms of weight 0 are checked like the others, and left out.

        Raises:
            InvalidRequest: naming the field. NotFound: an adapter is not registered.
        """
        arithmetic = request.arithmetic
        own = self._stream(self._models[None], request)
        if arithmetic is None:
            return [own]
        _check_arithmetic(request, arithmetic)
        streams = [replace(own, weight=arithmetic.weight)]
        for index, term in enumerate(arithmetic.terms):
            with _naming(index):
                streams.append(replace(self._term(request, term), weight=term.weight, term=index))
                _check_positions(request, streams[-1].request)
        streams = [stream for stream in streams if stream.weight or stream.term is None]
        room = min([stream.room for stream in streams])
        for model in self._models.values():
            mine = [stream for stream in streams if stream.model is model]
            if len(mine) > 1:
                room = min(room, self._room_together(model, mine))
                if request.params.prompt_logprobs is not None:
                    _check_abreast(model, len(mine), len(request.prompt_token_ids) if any(map(_whole, streams)) else 1)
        return [replace(stream, room=room) for stream in streams]

    def _stream(self, model: FrozenModel, request: EngineRequest) -> Stream:
        runs = model.variants.find(request.adapter, request.composition, request.choices)
        length = model.check(request, runs.outline)
        return Stream(model, request, runs, length - len(request.prompt_token_ids))

    def _term(self, request: EngineRequest, term: Term) -> Stream:
        if not math.isfinite(term.weight):
            raise InvalidRequest(f"'weight' must be a finite number, got {term.weight}", param="weight")
        model = self._models.get(term.model)
        if model is None:
            names = ", ".join(repr(name) for name in self._models if name is not None) or "none"
            raise InvalidRequest(f"there is no further model {term.model!r}; there are: {names}", param="model")
        alone = replace(
            request,
            prompt_token_ids=request.prompt_token_ids if term.prompt_token_ids is None else term.prompt_token_ids,
            params=replace(request.params, prompt_logprobs=None),  # they are the sum's, which the leader has
            adapter=term.adapter,
            adapter_name=term.adapter_name,
            composition=term.composition,
            choices=term.choices,
            arithmetic=None,
        )
        return self._stream(model, alone)

    def _room_together(self, model: FrozenModel, streams: SequenceOf[Stream]) -> int:
        """Tokens of output that several streams on one model have room for."""
        if len(streams) > self._config.max_num_seqs:
            raise InvalidRequest(
                f"{len(streams)} streams run on one model, whose batch has {self._config.max_num_seqs} rows; "
                "raise max_num_seqs",
                param="logit_arithmetic",
            )
        whole = [len(stream.request.prompt_token_ids) for stream in streams if _whole(stream)]
        if sum(whole) > model.max_batched_tokens:
            raise InvalidRequest(
                f"{len(whole)} prompts on one model are computed whole, in one pass of at most "
                f"{model.max_batched_tokens} tokens, and have {sum(whole)}: raise --max-num-batched-tokens",
                param="logit_arithmetic",
                code="context_length_exceeded",
            )
        room = model.room_together([(stream.request, stream.runs.outline) for stream in streams])
        wanted = streams[0].request.params.max_tokens or 1
        if room < wanted:
            raise InvalidRequest(
                f"{len(streams)} streams on one model have room for {max(room, 0)} tokens of output beside their "
                f"prompts, of {wanted} asked for",
                param="logit_arithmetic",
                code="context_length_exceeded",
            )
        return room

    def start(self, streams: SequenceOf[Stream]) -> Sequence:
        """The request's own sequence, with the others as its followers; all hold what they run with.

        Raises:
            NotFound, InvalidRequest: something cannot be held; nothing is then.
        """
        started: list[Sequence] = []
        try:
            for stream in streams:
                with _naming(stream.term):
                    seq = stream.model.start(
                        stream.request, stream.runs, len(stream.request.prompt_token_ids) + stream.room
                    )
                seq.weight = stream.weight
                started.append(seq)
            if len(started) > 1 and self.fit_together(started) is False:
                raise InvalidRequest(NO_FIT, param="logit_arithmetic")
        except RequestError:
            for stream, seq in zip(streams, started, strict=False):
                if seq.adapter is not None:
                    stream.model.adapters.drop(seq.adapter)
            raise
        leader, *followers = started
        arithmetic = leader.request.arithmetic
        top_p = arithmetic.top_p if arithmetic is not None and arithmetic.top_p != 1.0 else None
        if followers or leader.weight != 1.0 or top_p is not None:
            leader.mix = Mix(min(stream.model.info.vocab_size for stream in streams), top_p)
        leader.followers = followers
        for follower in followers:
            follower.leader = leader
        return leader

    def fit_together(self, streams: SequenceOf[Sequence]) -> bool | None:
        """Whether the device has room for what all streams run with; None while that is not known yet."""
        answers = []
        for model in self._models.values():
            adapters = {seq.adapter for seq in streams if seq.lane == model.lane and seq.adapter is not None}
            if len(adapters) > 1:
                answers.append(model.adapters.fit_together(adapters))
        return False if False in answers else None if None in answers else True


NO_FIT = (
    "the adapters of the request's streams do not fit the device at the same time; raise max_adapters or adapter_memory"
)


def _whole(stream: Stream) -> bool:
    """Its prompt is computed in one pass."""
    return stream.runs.outline is not None and stream.runs.outline.whole_prompts


@contextmanager
def _naming(term: int | None) -> Iterator[None]:
    """What is wrong with a term is told as that term's fault."""
    try:
        yield
    except RequestError as error:
        if term is not None:
            field = f"logit_arithmetic[{term}]"
            # Which member of the term's composition is at fault is said too; what else there is, requests share.
            error.param = f"{field}.{error.param}" if (error.param or "").startswith("adapters") else field
            error.message = f"{field}: {error.message}"
            error.args = (error.message,)
        raise


def _check_arithmetic(request: EngineRequest, arithmetic: LogitArithmetic) -> None:
    if not math.isfinite(arithmetic.weight):
        raise InvalidRequest(f"'weight' must be a finite number, got {arithmetic.weight}", param="logit_arithmetic")
    if not any([arithmetic.weight, *(term.weight for term in arithmetic.terms)]):
        raise InvalidRequest("all weights are 0, which leaves no distribution", param="logit_arithmetic")
    if arithmetic.top_p is not None and not 0.0 < arithmetic.top_p <= 1.0:
        raise InvalidRequest(f"'top_p' must be in (0, 1], got {arithmetic.top_p}", param="logit_arithmetic")


def _check_positions(request: EngineRequest, term: EngineRequest) -> None:
    """Log-probabilities of the prompt are of sums, whose terms must all be about the same tokens."""
    own, its = request.prompt_token_ids, term.prompt_token_ids
    if request.params.prompt_logprobs is not None and its != own:
        lengths = f", {len(its)} of them in place of {len(own)}" if len(its) != len(own) else ""
        raise InvalidRequest(
            f"this term has a prompt of other tokens than the request{lengths}, so that their sum has no "
            "log-probabilities of the prompt ('prompt_logprobs', 'echo' with 'logprobs')"
        )


def _check_abreast(model: FrozenModel, streams: int, tokens: int) -> None:
    """Streams that advance together must be able to. ``tokens``: the least that each computes in a step."""
    if streams * tokens > model.max_batched_tokens:
        raise InvalidRequest(
            f"for log-probabilities of the prompt {streams} streams on one model advance together, by {tokens} tokens "
            f"at least, in one pass of at most {model.max_batched_tokens}: raise --max-num-batched-tokens",
            param="logit_arithmetic",
            code="context_length_exceeded",
        )
