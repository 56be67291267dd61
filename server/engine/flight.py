"""Steps that are under way: how they are launched, and what becomes known when they land."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from weft.server.engine.batch import Batch
from weft.server.engine.frozen import FrozenModel
from weft.server.engine.logprobs import PromptReport, prompt_reports
from weft.server.engine.mixing import gather
from weft.server.engine.pending import placeholder
from weft.server.engine.sampler import Chosen, Sample, Sampler
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import Sequence


class Readback:
    """Tensors on their way to the host.

    The copies start at once, behind all that the device has been given to do before; who reads waits for both.
    """

    def __init__(self, tensors: SequenceOf[torch.Tensor], device: torch.device) -> None:
        self._tensors = list(tensors)
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            # Into pinned memory: a copy into any other would hold up the host.
            pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            self._tensors = [host.copy_(own, non_blocking=True) for host, own in zip(pinned, tensors, strict=True)]
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[Any]:
        """Each tensor as a list, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class Flight:
    """A step under way.

    All its requests keep their pages, slots and holds until it has landed, also those that end meanwhile, as the device
    may still be at work with them.

    Attributes:
        batches: of the models that have rows in it.
        seqs: the requests that have rows in it.
        chosen: the tokens it samples; None: it samples none.
        leaving: those of its requests that ended since it was launched, to be released when it has landed.
    """

    def __init__(
        self,
        batches: list[Batch],
        seqs: set[Sequence],
        chosen: Chosen | None,
        prompts: list[PromptReport],
        device: torch.device,
    ) -> None:
        self.batches = batches
        self.seqs = seqs
        self.chosen = chosen
        self.leaving: list[Sequence] = []
        self._prompts = prompts
        own = chosen.tensors() if chosen is not None else []
        self._readback = Readback([*own, *(each.report.values for each in prompts)], device)

    def land(self) -> list[Sample]:
        """Wait for the step; its samples. Log-probabilities of prompts are with their sequences then."""
        values = self._readback.read()
        for each in reversed(self._prompts):
            each.fill_in(values.pop())
        return self.chosen.samples(values) if self.chosen is not None else []


class Launcher:
    """Starts steps: schedule, batch, forward, sample.

    Args:
        models: as the scheduler counts them.
        vocab, ends: of the main model, tokens and end-of-sequence ids.
    """

    def __init__(
        self, scheduler: Scheduler, models: SequenceOf[FrozenModel], vocab: int, ends: tuple[int, ...]
    ) -> None:
        self._scheduler = scheduler
        self._models = models
        self._vocab = vocab
        self._ends = ends
        self._sampler = Sampler(ends)

    def launch(self, before: Flight | None) -> Flight | None:
        """Start a step, without waiting for the device; None if nothing can run.

        Args:
            before: the one that is still under way.
        """
        rows = self._scheduler.schedule()
        sampled = before.chosen.tokens if before is not None and before.chosen is not None else None
        passes = [
            model.forward([row for row in rows if row.seq.lane == model.lane], lane.prompts, sampled)
            for model, lane in zip(self._models, self._scheduler.lanes, strict=True)
        ]
        if not rows:
            return None
        prompts = prompt_reports(passes, self._vocab)
        ready = gather(passes, self._vocab, self._ends)
        chosen = self._sampler.choose(ready.logits, ready.seqs, ready.peaks, sampled) if ready else None
        for row in rows:
            self._scheduler.computed(row)
        for index, seq in enumerate(chosen.seqs if chosen is not None else ()):
            for stream in seq.streams:
                stream.tokens.append(placeholder(index))
            seq.final = len(seq.tokens) >= seq.max_len
        batches = [each.batch for each in passes if each is not None]
        return Flight(batches, {row.seq.owner for row in rows}, chosen, prompts, self._models[0].runner.device)
