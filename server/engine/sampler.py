"""Chooses tokens from logits. Every row by its own parameters; no row's choice depends on another row.

All of it is launched on the device without waiting for it. What depends on the output so far depends on its length,
which the host knows, or on its tokens, of which the newest may be pending.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weft.kernels.groups import to_device
from weft.server.engine.logprobs import Report
from weft.server.engine.pending import to_ids
from weft.server.engine.request import SamplingParams, TokenLogprobs
from weft.server.engine.sequence import Sequence

BLOCK = 128
"""Values among which ``most_likely`` looks at once."""


@dataclass(frozen=True)
class Sample:
    """The next token of one sequence.

    Attributes:
        index: which token of the output it is, from 0 on.
        token: None when the logits are not numbers.
        logprobs: if asked for.
    """

    seq: Sequence
    index: int
    token: int | None
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Chosen:
    """The next tokens of sequences, on the device.

    Attributes:
        indices: which token of its output each is.
        tokens: int64 ``[len(seqs)]``; 0, which every model knows, where the logits are not numbers.
        peaks: ``[len(seqs)]``, finite where they are.
        asked: places of the sequences that ask for log-probabilities. report: theirs; None where nobody asks.
    """

    seqs: list[Sequence]
    indices: list[int]
    tokens: torch.Tensor
    peaks: torch.Tensor
    asked: list[int]
    report: Report | None

    def tensors(self) -> list[torch.Tensor]:
        """What must come to the host."""
        packed = torch.stack([self.tokens.double(), self.peaks.double()])
        return [packed] if self.report is None else [packed, self.report.values]

    def samples(self, values: list[Any]) -> list[Sample]:
        """``tensors`` on the host as one sample for each sequence."""
        tokens, peaks = values[0]
        reports = dict(zip(self.asked, self.report.read(values[1]), strict=True)) if self.report is not None else {}
        return [
            Sample(seq, index, int(token) if math.isfinite(peak) else None, reports.get(place))
            for place, (seq, index, token, peak) in enumerate(zip(self.seqs, self.indices, tokens, peaks, strict=True))
        ]


class Sampler:
    """Samples with OpenAI's and vLLM's parameters, in vLLM's order: bias, minimum length, penalties, temperature,
    min-p, top-k, top-p."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos = eos_token_ids

    @torch.inference_mode()
    def choose(
        self,
        rows: torch.Tensor,
        seqs: list[Sequence],
        peaks: torch.Tensor | None = None,
        sampled: torch.Tensor | None = None,
    ) -> Chosen:
        """The next token of every sequence.

        Args:
            rows: float32 logits ``[len(seqs), vocab]``.
            peaks: ``[len(seqs)]``, not finite where what the logits were made of is no number; None: they tell.
            sampled: the tokens of the step under way, as in ``to_ids``.
        """
        best = rows.amax(dim=-1)
        if peaks is not None:
            best = best + peaks
        # Another step may run with these tokens before the host can see that they are none.
        tokens = _choose(self._adjust(rows, seqs, sampled), seqs).masked_fill_(~best.isfinite(), 0)
        asked = [i for i, seq in enumerate(seqs) if seq.request.params.logprobs is not None]
        report = None
        if asked:
            index = to_device(np.array(asked), rows.device)
            report = Report.build(rows[index], tokens[index], [seqs[i].request.params.logprobs or 0 for i in asked])
        return Chosen(seqs, [seq.output_len for seq in seqs], tokens, best, asked, report)

    def _adjust(self, logits: torch.Tensor, seqs: list[Sequence], sampled: torch.Tensor | None = None) -> torch.Tensor:
        """Bias, minimum length and penalties; a copy if anything changes."""
        changes = [i for i, seq in enumerate(seqs) if self._changes(seq)]
        if not changes:
            return logits
        logits = logits.clone()
        for i in changes:
            seq, row = seqs[i], logits[i]
            params = seq.request.params
            if params.logit_bias:
                bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
                row[to_ids(params.logit_bias, None, row.device)] += to_device(bias, row.device)
            if seq.output_len < params.min_tokens:
                ends = [*self._eos, *params.stop_token_ids]
                row.index_fill_(0, to_ids(ends, None, row.device), -math.inf)
            _penalize(row, seq, sampled)
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


def _penalize(row: torch.Tensor, seq: Sequence, sampled: torch.Tensor | None) -> None:
    """Repetition over prompt and output (Keskar et al., 2019); presence and frequency over the output (OpenAI).

    A token may be there twice, and is written twice with the same value then.
    """
    params = seq.request.params
    if params.repetition_penalty != 1.0:
        seen = to_ids(sorted(set(seq.tokens)), sampled, row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    output = seq.tokens[seq.prompt_len :]
    if output and (params.presence_penalty or params.frequency_penalty):
        ids = to_ids(output, sampled, row.device)
        counts = torch.zeros_like(row, dtype=torch.int64).index_add_(0, ids, torch.ones_like(ids))
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts[ids]


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
            index = to_device(np.array(rows), logits.device)
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
    return to_device(np.array(values, dtype=np.float64), like.device).unsqueeze(1)


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
