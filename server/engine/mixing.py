"""Logit arithmetic: which requests have the logits of all their streams, and the distributions they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from weft.kernels.groups import to_device
from weft.kernels.logit_mix import MixTerms, logit_mix
from weft.server.engine.batch import Batch, Wanted
from weft.server.engine.sequence import Mix, Sequence


@dataclass(frozen=True)
class Pass:
    """One forward pass of one model: its batch, and float32 logits ``[N, vocab]`` as ``batch.wanted`` says."""

    batch: Batch
    logits: torch.Tensor


@dataclass(frozen=True)
class Ready:
    """Requests whose next token can be chosen.

    Attributes:
        logits: float32 ``[len(seqs), vocab]``.
        peaks: ``[len(seqs)]``, not finite where some stream's logits are not numbers; None: ``logits`` tell.
    """

    seqs: list[Sequence]
    logits: torch.Tensor
    peaks: torch.Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What a step says of a part of a prompt.

    Attributes:
        start: the first of the tokens.
        logits: float32 ``[tokens, vocab]``, of each token given those before it.
    """

    seq: Sequence
    start: int
    logits: torch.Tensor


@dataclass(frozen=True)
class Place:
    """A distribution to be made of the streams of a request.

    Attributes:
        rows: of each stream: which of several tensors has its logits, and in which row.
    """

    leader: Sequence
    rows: dict[Sequence, tuple[int, int]]


PIECE = 64
"""Positions of a prompt that are mixed at a time: the float64 that a nucleus takes is eight bytes for each token of
the vocabulary, several times over."""


@torch.inference_mode()
def gather(passes: SequenceOf[Pass | None], vocab: int, ends: SequenceOf[int]) -> Ready | None:
    """What can be sampled after the passes of one step, by lane; None if nothing can.

    Streams of one request may get there in different steps, when prompts are long: who is early keeps its logits.

    Args:
        vocab: of the main model. ends: its end-of-sequence ids.
    """
    arrived: list[dict[Sequence, int]] = [{} for _ in passes]
    plain: dict[Sequence, int] = {}
    for lane, each in enumerate(passes):
        for want in each.batch.wanted if each else ():
            if want.row.samples:
                rows = arrived[lane] if want.row.seq.owner.mix else plain
                rows[want.row.seq] = want.first + want.count - 1
    complete = _complete(arrived, passes)
    if not complete:
        return _plain(plain, passes[0])
    places, sources = _places(complete, arrived, passes)
    mixed = _distributions(places, sources, vocab, ends)
    logits, peaks = mixed, _peaks(places, sources)
    if plain and passes[0] is not None:
        own = passes[0].logits[_index(plain.values(), mixed)]
        logits, peaks = torch.cat([own, mixed]), torch.cat([peaks.new_zeros(len(plain)), peaks])
    return Ready([*plain, *complete], logits, peaks)


def _plain(rows: dict[Sequence, int], main: Pass | None) -> Ready | None:
    """Nothing is copied where every row of the logits is sampled from."""
    if not rows or main is None:
        return None
    if len(rows) == main.logits.shape[0]:
        return Ready(list(rows), main.logits)
    return Ready(list(rows), main.logits[_index(rows.values(), main.logits)])


def _complete(arrived: list[dict[Sequence, int]], passes: SequenceOf[Pass | None]) -> list[Sequence]:
    """The requests of which all streams have arrived; the other streams keep their logits."""
    complete: list[Sequence] = []
    early: list[Sequence] = []
    for leader in dict.fromkeys(seq.owner for rows in arrived for seq in rows):
        there = all(seq in arrived[seq.lane] or seq.logits is not None for seq in leader.streams)
        (complete if there else early).append(leader)
    for leader in early:
        for seq in leader.streams:
            each = passes[seq.lane]
            if each is not None and seq in arrived[seq.lane]:
                seq.logits = each.logits[arrived[seq.lane][seq]].clone()
    return complete


def _places(
    complete: list[Sequence], arrived: list[dict[Sequence, int]], passes: SequenceOf[Pass | None]
) -> tuple[list[Place], list[torch.Tensor]]:
    """Where the streams' logits lie: those of this step, and of each lane those that were kept."""
    sources: list[torch.Tensor] = []
    at: dict[Sequence, tuple[int, int]] = {}
    for lane, each in enumerate(passes):
        streams = [seq for leader in complete for seq in leader.streams if seq.lane == lane]
        now = [seq for seq in streams if seq in arrived[lane]]
        if each is not None and now:
            at |= {seq: (len(sources), arrived[lane][seq]) for seq in now}
            sources.append(each.logits)
        kept = [(seq, seq.logits) for seq in streams if seq.logits is not None]
        if kept:
            at |= {seq: (len(sources), row) for row, (seq, _) in enumerate(kept)}
            sources.append(torch.stack([logits for _, logits in kept]))
        for seq, _ in kept:
            seq.logits = None
    return [Place(leader, {seq: at[seq] for seq in leader.streams}) for leader in complete], sources


def prompt_scores(passes: SequenceOf[Pass | None], vocab: int) -> Iterator[Scores]:
    """What a step says of prompts that log-probabilities are asked of.

    The logits at a position speak of the token after it. Streams of one request are at the same positions of one
    prompt (``Sequence.abreast``), and its sums are made piece by piece.

    Args:
        vocab: of the main model.
    """
    mixed: dict[Sequence, dict[Sequence, Wanted]] = {}
    for each in passes:
        for want in each.batch.wanted if each else ():
            seq = want.row.seq
            stop = min(want.stop, seq.prompt_len - 1)
            if not each or not seq.scored or want.start >= stop:
                continue
            if seq.owner.mix is None:
                yield Scores(seq, want.start + 1, each.logits[want.first : want.first + stop - want.start])
            else:
                mixed.setdefault(seq.owner, {})[seq] = want
    for leader, wants in mixed.items():
        yield from _mixed_scores(leader, wants, passes, vocab)


def _mixed_scores(
    leader: Sequence, wants: dict[Sequence, Wanted], passes: SequenceOf[Pass | None], vocab: int
) -> Iterator[Scores]:
    start, stop = wants[leader].start, min(wants[leader].stop, leader.prompt_len - 1)
    assert all((want.start, want.count) == (start, wants[leader].count) for want in wants.values()), "abreast"
    assert len(wants) == len(leader.streams), "all streams are there"
    lanes = sorted({seq.lane for seq in wants})
    sources = [each.logits for lane in lanes if (each := passes[lane]) is not None]
    for first in range(start, stop, PIECE):
        places = [
            Place(leader, {seq: (lanes.index(seq.lane), want.first + i - start) for seq, want in wants.items()})
            for i in range(first, min(first + PIECE, stop))
        ]
        yield Scores(leader, first + 1, _distributions(places, sources, vocab))


def _distributions(
    places: list[Place], sources: list[torch.Tensor], vocab: int, ends: SequenceOf[int] | None = None
) -> torch.Tensor:
    """``[len(places), vocab]``: the weighed sums, without what lies outside of the nuclei that are asked for.

    Args:
        ends: end-of-sequence ids, where tokens are to be chosen, which ``min_tokens`` holds for.
    """
    mixed = _weigh(places, sources, vocab, lambda seq: seq.weight)
    _keep_nuclei(mixed, places, sources, ends)
    return mixed


def _weigh(
    places: list[Place], sources: list[torch.Tensor], vocab: int, weight: Callable[[Sequence], float]
) -> torch.Tensor:
    """``[len(places), vocab]``: weighed sums over their streams, -inf for tokens that some model does not know."""
    like = sources[0]
    out = like.new_zeros(len(places), vocab)
    widths = [_mix(place.leader).width for place in places]
    if min(widths) < vocab:
        beyond = torch.arange(vocab, device=like.device) >= _index(widths, like).unsqueeze(1)
        out.masked_fill_(beyond, -torch.inf)
    for index, logits in enumerate(sources):
        terms = [
            [(row, weight(seq)) for seq, (at, row) in place.rows.items() if at == index and weight(seq)]
            for place in places
        ]
        logit_mix(out, logits, MixTerms.build(terms, widths, like.device))
    return out


def _keep_nuclei(
    mixed: torch.Tensor, places: list[Place], sources: list[torch.Tensor], ends: SequenceOf[int] | None
) -> None:
    """Put out of question what lies outside of the nucleus of the leader's own distribution, where one is asked for.

    It is taken among tokens that may come: before ``min_tokens`` no end may, whatever its probability. Those of a
    prompt are there already.
    """
    at = [i for i, place in enumerate(places) if _mix(place.leader).top_p is not None]
    if not at:
        return
    chosen = [places[i] for i in at]
    own = _weigh(chosen, sources, mixed.shape[1], lambda seq: float(seq.leader is None))
    for row, place in zip(own, chosen, strict=True):
        params = place.leader.request.params
        if ends is not None and place.leader.output_len < params.min_tokens:
            row.index_fill_(0, _index([*ends, *params.stop_token_ids], row), -torch.inf)
    outside = ~nucleus(own, [_mix(place.leader).top_p or 1.0 for place in chosen])
    index = _index(at, mixed)
    mixed[index] = mixed[index].masked_fill(outside, -torch.inf)


def nucleus(logits: torch.Tensor, top_p: SequenceOf[float]) -> torch.Tensor:
    """bool ``[rows, vocab]``: the most likely tokens, up to the first with which they weigh more than ``top_p``.

    As DExperts filters its base (Liu et al., 2021): a token stays while those before it do not weigh more than that.
    """
    probs, order = logits.double().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs
    limit = to_device(np.array(top_p, dtype=np.float64), logits.device).unsqueeze(1)
    keep = before <= limit
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _peaks(places: list[Place], sources: list[torch.Tensor]) -> torch.Tensor:
    """``[len(places)]``: sums of the streams' largest logits; what is not a number in one of them shows in the sum."""
    peaks = sources[0].new_zeros(len(places))
    for index, logits in enumerate(sources):
        rows = [(i, row) for i, place in enumerate(places) for at, row in place.rows.values() if at == index]
        largest = logits.amax(dim=-1)[_index([row for _, row in rows], logits)]
        peaks.index_add_(0, _index([i for i, _ in rows], logits), largest)
    return peaks


def _mix(leader: Sequence) -> Mix:
    assert leader.mix is not None, "only requests with logit arithmetic are mixed"
    return leader.mix


def _index(rows: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return to_device(np.array(list(rows), dtype=np.int64), like.device)
