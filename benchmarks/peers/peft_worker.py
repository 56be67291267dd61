"""peft's mixed batches: ``generate(adapter_names=...)`` of transformers' own loop; the base alone without adapters.

It has no continuous batching. Requests are taken in batches of those that wait, as servers around ``generate`` do, and
a batch runs until its last row has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from peers.worker import Request, Setup, Trace, clock, serve

BASE = "__base__"
"""peft's name for rows without an adapter."""


class Clockwork(BaseStreamer):
    """Notes when ``generate`` hands over the tokens of a step, and which they are."""

    def __init__(self, now: Callable[[], float], traces: Sequence[Trace], lengths: Sequence[int]) -> None:
        self._now, self._traces, self._lengths = now, traces, lengths
        self._prompts = True

    def put(self, value: torch.Tensor) -> None:
        """The prompts at first, then the next token of each row."""
        if self._prompts:
            self._prompts = False
            return
        now = self._now()
        for trace, length, token in zip(self._traces, self._lengths, value.tolist(), strict=True):
            if len(trace.tokens) < length:
                trace.record(now, [token])

    def end(self) -> None:
        """There is nothing to flush."""


class Peft:
    """transformers' model, with every adapter of the set-up loaded into it."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._rows = setup.max_num_seqs
        self._adapted = bool(setup.adapters)
        self._model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.dtype)).eval()
        # peft would cast the factors to fp32 whatever the base is, which is slower.
        for name, folder in setup.adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
            else:
                self._model = PeftModel.from_pretrained(
                    self._model, folder, adapter_name=name, autocast_adapter_dtype=False
                )
        self._model.eval()
        self.about = {
            "versions": {"peft": peft.__version__, "transformers": transformers.__version__},
            "settings": {},
        }

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        now, traces = clock(), list[Trace]()
        while len(traces) < len(requests):
            waiting = requests[len(traces) :]
            if concurrency is None:
                time.sleep(max(0.0, waiting[0].time - now()))
                batch = [request for request in waiting if request.time <= now()][: self._rows]
                started = [Trace(request.time) for request in batch]
            else:
                batch = list(waiting[:concurrency])
                started = [Trace(now()) for _ in batch]
            self._generate(batch, started, now)
            traces += started
        return traces

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Request], traces: Sequence[Trace], now: Callable[[], float]) -> None:
        """One batch to its end, prompts padded on the left."""
        longest = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        names = {"adapter_names": [request.model or BASE for request in batch]} if self._adapted else {}
        lengths = [request.max_tokens for request in batch]
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(lengths),
            eos_token_id=None,
            pad_token_id=0,
            streamer=Clockwork(now, traces, lengths),
            **names,
        )


if __name__ == "__main__":
    serve(Peft)
