"""Chooses tokens from logits. Every row by its own parameters; no row's choice depends on another row."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from weft.server.engine.mixing import Pass, prompt_scores
from weft.server.engine.request import SamplingParams, TokenLogprobs
from weft.server.engine.sequence import Sequence

BLOCK = 128
"""Values among which ``most_likely`` looks at once."""


@dataclass(frozen=True)
class Sample:
    """The next token of one sequence.

    Attributes:
        token: None when the logits are not numbers.
        logprobs: if asked for.
    """

    seq: Sequence
    token: int | None
    logprobs: TokenLogprobs | None


class Sampler:
    """Samples with OpenAI's and vLLM's parameters, in vLLM's order: bias, minimum length, penalties, temperature,
    min-p, top-k, top-p."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids

    @torch.inference_mode()
    def sample(self, rows: torch.Tensor, seqs: list[Sequence], peaks: torch.Tensor | None = None) -> list[Sample]:
        """The next token of every sequence.

        Args:
            rows: float32 logits ``[len(seqs), vocab]``.
            peaks: ``[len(seqs)]``, not finite where what the logits were made of is no number; None: they tell.
        """
        adjusted = self._adjust(rows, seqs)
        tokens = _choose(adjusted, seqs)
        # One transfer for the whole batch: the tokens, and whether their logits were numbers.
        best = rows.amax(dim=-1)
        if peaks is not None:
            best = best + peaks
        packed = torch.stack([tokens.double(), best.double()]).tolist()
        reports = _logprobs(rows, seqs, tokens)
        return [
            Sample(seq, int(token) if math.isfinite(peak) else None, report)
            for seq, token, peak, report in zip(seqs, *packed, reports, strict=True)
        ]

    def _adjust(self, logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
        """Bias, minimum length and penalties; a copy if anything changes."""
        changes = [i for i, seq in enumerate(seqs) if self._changes(seq)]
        if not changes:
            return logits
        logits = logits.clone()
        for i in changes:
            seq, row = seqs[i], logits[i]
            params = seq.request.params
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=row.device)
                row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)
            if seq.output_len < params.min_tokens:
                ends = [*self._eos, *params.stop_token_ids]
                row[torch.tensor(ends, dtype=torch.long, device=row.device)] = -math.inf
            _penalize(row, seq)
        return logits

    def _changes(self, seq: Sequence) -> bool:
        params = seq.request.params
        return bool(params.logit_bias) or seq.output_len < params.min_tokens or _has_penalties(params)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone: SplitMix64 (Steele et al., OOPSLA 2014)."""
    mask = 0xFFFF_FFFF_FFFF_FFFF
    z = (seed * 0xD1342543DE82EF95 + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _penalize(row: torch.Tensor, seq: Sequence) -> None:
    """Repetition over prompt and output (Keskar et al., 2019); presence and frequency over the output (OpenAI)."""
    params = seq.request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(seq.tokens)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    output = seq.tokens[seq.prompt_len :]
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(output, device=row.device).unique(return_counts=True)
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _choose(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """int64 ``[rows]``: the most likely token, or one drawn."""
    tokens = most_likely(logits)
    drawn = [i for i, seq in enumerate(seqs) if not seq.request.params.greedy]
    # Rows with and without truncation go different ways, so that a row's draw never depends on its company.
    for rows, draw in (
        ([i for i in drawn if not _truncates(seqs[i].request.params)], _draw),
        ([i for i in drawn if _truncates(seqs[i].request.params)], _draw_truncated),
    ):
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = draw(logits[index], [seqs[i] for i in rows])
    return tokens


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """int64 ``[rows]``: the first of the largest values of every row, as ``argmax`` finds it.

    On a CPU torch's ``argmax`` looks at one value at a time, ``amax`` at many: a block is found, then the place in it.
    """
    vocab = logits.shape[1]
    blocks = vocab // BLOCK
    if not logits.is_cpu or blocks < 2:
        return logits.argmax(dim=-1)
    peaks = logits[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(dim=-1)
    if blocks * BLOCK < vocab:
        peaks = torch.cat([peaks, logits[:, blocks * BLOCK :].amax(dim=-1, keepdim=True)], dim=1)
    # Of the last block, which may be short, what lies before it is looked at as well: it is smaller.
    starts = (peaks.argmax(dim=-1, keepdim=True) * BLOCK).clamp_max(vocab - BLOCK)
    chosen: torch.Tensor = starts.squeeze(1) + logits.gather(1, starts + torch.arange(BLOCK)).argmax(dim=-1)
    return chosen


def _truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device).unsqueeze(1)


def _probabilities(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """float64, because the inverse of a cumulative sum over a large vocabulary needs it."""
    temperature = _column([seq.request.params.temperature for seq in seqs], logits)
    return (logits.double() / temperature).nan_to_num(nan=0.0).softmax(dim=-1)


def _invert(cumulative: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """The first index whose cumulative weight exceeds a uniform share of the total, ``[rows]``."""
    draws = _column([uniform(seq.seed, seq.output_len) for seq in seqs], cumulative)
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    return chosen.squeeze(1).clamp_max(cumulative.shape[1] - 1)


def _draw(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    return _invert(_probabilities(logits, seqs).cumsum(dim=-1), seqs)


def _draw_truncated(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Min-p on the whole distribution, then top-k, then top-p on what top-k left."""
    params = [seq.request.params for seq in seqs]
    sorted_probs, order = _probabilities(logits, seqs).sort(dim=-1, descending=True, stable=True)
    vocab = sorted_probs.shape[1]
    keep = sorted_probs >= sorted_probs[:, :1] * _column([p.min_p for p in params], logits)
    top_k = _column([p.top_k if p.top_k > 0 else vocab for p in params], logits)
    keep &= torch.arange(vocab, device=logits.device) < top_k
    kept = sorted_probs * keep
    kept /= kept.sum(dim=-1, keepdim=True)
    # A token stays while the weight before it is below top_p; the most likely one always does.
    keep &= kept.cumsum(dim=-1) - kept < _column([p.top_p for p in params], logits)
    index = _invert((kept * keep).cumsum(dim=-1), seqs)
    return order.gather(1, index.unsqueeze(1)).squeeze(1)


def _logprobs(logits: torch.Tensor, seqs: list[Sequence], tokens: torch.Tensor) -> list[TokenLogprobs | None]:
    """Of the model's own distribution, for the rows that ask."""
    reports: list[TokenLogprobs | None] = [None] * len(seqs)
    asked = [i for i, seq in enumerate(seqs) if seq.request.params.logprobs is not None]
    if asked:
        index = torch.tensor(asked, device=logits.device)
        counts = [seqs[i].request.params.logprobs or 0 for i in asked]
        for i, report in zip(asked, _report(logits[index], tokens[index], counts), strict=True):
            reports[i] = report
    return reports


def _report(logits: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Log-probability and rank of ``tokens`` ``[rows]`` and the ``counts`` most likely ones of each row."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, ids = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1)
    table = zip(
        tokens.tolist(), chosen.squeeze(1).tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts, strict=True
    )
    return [
        TokenLogprobs(token, logprob, rank, _possible(top_ids[:count], top[:count]))
        for token, logprob, rank, top_ids, top, count in table
    ]


def _possible(ids: list[int], logprobs: list[float]) -> list[tuple[int, float]]:
    """What cannot come at all is not among the most likely tokens."""
    return [(token, logprob) for token, logprob in zip(ids, logprobs, strict=True) if logprob > -math.inf]


@torch.inference_mode()
def fill_prompt_logprobs(passes: SequenceOf[Pass | None], vocab: int) -> None:
    """Give sequences that ask for it the log-probabilities of those of their prompt's tokens that a step is about."""
    for scores in prompt_scores(passes, vocab):
        seq, count = scores.seq, len(scores.logits)
        assert seq.prompt_logprobs is not None, "asked for"
        tokens = torch.tensor(seq.tokens[scores.start : scores.start + count], device=scores.logits.device)
        top = seq.request.params.prompt_logprobs or 0
        seq.prompt_logprobs[scores.start : scores.start + count] = _report(scores.logits, tokens, [top] * count)
