"""Logit arithmetic: which requests have the logits of all their streams, and the distributions they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from weft.kernels.logit_mix import MixTerms, logit_mix
from weft.server.engine.batch import Batch
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


Source = tuple[torch.Tensor, dict[Sequence, int]]
"""Logits of one model, and which row of them is which stream's."""


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
    sources = _sources(complete, arrived, passes)
    mixed = _weigh(complete, sources, vocab, lambda seq: seq.weight)
    _keep_nuclei(mixed, complete, sources, ends)
    logits, peaks = mixed, _peaks(complete, sources)
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


def _sources(
    complete: list[Sequence], arrived: list[dict[Sequence, int]], passes: SequenceOf[Pass | None]
) -> list[Source]:
    """Where the streams' logits lie: those of this step, and of each lane those that were kept."""
    sources: list[Source] = []
    for lane, each in enumerate(passes):
        streams = [seq for leader in complete for seq in leader.streams if seq.lane == lane]
        now = {seq: arrived[lane][seq] for seq in streams if seq in arrived[lane]}
        if each is not None and now:
            sources.append((each.logits, now))
        kept = [(seq, seq.logits) for seq in streams if seq.logits is not None]
        if kept:
            sources.append((torch.stack([logits for _, logits in kept]), {seq: i for i, (seq, _) in enumerate(kept)}))
        for seq, _ in kept:
            seq.logits = None
    return sources


def _weigh(
    leaders: list[Sequence], sources: list[Source], vocab: int, weight: Callable[[Sequence], float]
) -> torch.Tensor:
    """``[len(leaders), vocab]``: weighed sums over their streams, -inf for tokens that some model does not know."""
    like = sources[0][0]
    out = like.new_zeros(len(leaders), vocab)
    widths = [_mix(leader).width for leader in leaders]
    if min(widths) < vocab:
        beyond = torch.arange(vocab, device=like.device) >= torch.tensor(widths, device=like.device).unsqueeze(1)
        out.masked_fill_(beyond, -torch.inf)
    for logits, rows in sources:
        terms = [[(rows[seq], weight(seq)) for seq in each.streams if seq in rows and weight(seq)] for each in leaders]
        logit_mix(out, logits, MixTerms.build(terms, widths, like.device))
    return out


def _keep_nuclei(mixed: torch.Tensor, leaders: list[Sequence], sources: list[Source], ends: SequenceOf[int]) -> None:
    """Put out of question what lies outside of the nucleus of the leader's own distribution, where one is asked for.

    It is taken among tokens that may come: before ``min_tokens`` no end may, whatever its probability.
    """
    at = [i for i, leader in enumerate(leaders) if _mix(leader).top_p is not None]
    if not at:
        return
    chosen = [leaders[i] for i in at]
    own = _weigh(chosen, sources, mixed.shape[1], lambda seq: float(seq.leader is None))
    for row, leader in zip(own, chosen, strict=True):
        params = leader.request.params
        if leader.output_len < params.min_tokens:
            row[_index([*ends, *params.stop_token_ids], row)] = -torch.inf
    outside = ~nucleus(own, [_mix(leader).top_p or 1.0 for leader in chosen])
    index = _index(at, mixed)
    mixed[index] = mixed[index].masked_fill(outside, -torch.inf)


def nucleus(logits: torch.Tensor, top_p: SequenceOf[float]) -> torch.Tensor:
    """bool ``[rows, vocab]``: the most likely tokens, up to the first with which they weigh more than ``top_p``.

    As DExperts filters its base (Liu et al., 2021): a token stays while those before it do not weigh more than that.
    """
    probs, order = logits.double().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs
    limit = torch.tensor(top_p, dtype=torch.float64, device=logits.device).unsqueeze(1)
    keep = before <= limit
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _peaks(leaders: list[Sequence], sources: list[Source]) -> torch.Tensor:
    """``[len(leaders)]``: sums of the streams' largest logits; what is not a number in one of them shows in the sum."""
    peaks = sources[0][0].new_zeros(len(leaders))
    place = {leader: i for i, leader in enumerate(leaders)}
    for logits, rows in sources:
        largest = logits.amax(dim=-1)[_index(rows.values(), logits)]
        peaks.index_add_(0, _index([place[seq.owner] for seq in rows], logits), largest)
    return peaks


def _mix(leader: Sequence) -> Mix:
    assert leader.mix is not None, "only requests with logit arithmetic are mixed"
    return leader.mix


def _index(rows: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.long, device=like.device)
