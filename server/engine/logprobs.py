"""Log-probabilities of the model's own distribution: made on the device, read when they have come to the host."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch

from weft.server.engine.mixing import Pass, prompt_scores
from weft.server.engine.pending import to_ids
from weft.server.engine.request import TokenLogprobs
from weft.server.engine.sequence import Sequence


@dataclass(frozen=True)
class Report:
    """What is said of some positions.

    Attributes:
        values: float64 ``[positions, 3 + 2 * most]`` on the device: the token, its log-probability and its rank, then
            the most likely tokens and theirs. Whole numbers and float32 are exact in it; one tensor is one transfer.
        counts: of the most likely tokens, how many each position asks for.
    """

    values: torch.Tensor
    counts: list[int]

    @classmethod
    def build(cls, logits: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> Report:
        """Log-probability and rank of ``tokens`` ``[rows]`` and the ``counts`` most likely ones of each row.

        Args:
            logits: float32 ``[rows, vocab]``.
        """
        logprobs = logits.log_softmax(dim=-1)
        chosen = logprobs.gather(1, tokens.unsqueeze(1))
        ranks = (logprobs > chosen).sum(dim=-1, keepdim=True) + 1
        values, ids = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1)
        columns = (tokens.unsqueeze(1), chosen, ranks, ids, values)
        return cls(torch.cat([column.double() for column in columns], dim=1), counts)

    def read(self, values: list[list[float]]) -> list[TokenLogprobs]:
        """``values`` on the host as what requests are answered with."""
        return [_entry(row, count) for row, count in zip(values, self.counts, strict=True)]


def _entry(row: list[float], count: int) -> TokenLogprobs:
    most = (len(row) - 3) // 2
    top = zip(row[3 : 3 + count], row[3 + most : 3 + most + count], strict=True)
    # What cannot come at all is not among the most likely tokens.
    likely = [(int(token), logprob) for token, logprob in top if logprob > -math.inf]
    return TokenLogprobs(int(row[0]), row[1], int(row[2]), likely)


@dataclass(frozen=True)
class PromptReport:
    """What a step says of the tokens of a prompt from ``start`` on."""

    seq: Sequence
    start: int
    report: Report

    def fill_in(self, values: Any) -> None:
        """Give the sequence what has come to the host."""
        assert self.seq.prompt_logprobs is not None, "asked for"
        entries = self.report.read(values)
        self.seq.prompt_logprobs[self.start : self.start + len(entries)] = entries


@torch.inference_mode()
def prompt_reports(passes: SequenceOf[Pass | None], vocab: int) -> list[PromptReport]:
    """Of sequences that ask for it, the log-probabilities of those of their prompt's tokens that a step is about."""
    reports = []
    for scores in prompt_scores(passes, vocab):
        seq, count = scores.seq, len(scores.logits)
        tokens = to_ids(seq.tokens[scores.start : scores.start + count], None, scores.logits.device)
        top = seq.request.params.prompt_logprobs or 0
        reports.append(PromptReport(seq, scores.start, Report.build(scores.logits, tokens, [top] * count)))
    return reports
