"""transformers' continuous batching of the base; it has none for adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from peers.worker import Request, Setup, Trace, serve


class Transformers:
    """A manager that stays up, with pages for as many rows as the other systems decode at once."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.dtype)).eval()
        pages = ContinuousBatchingConfig(page_size=16)
        blocks = setup.max_num_seqs * -(-setup.max_model_len // pages.page_size)
        config = ContinuousBatchingConfig(
            page_size=pages.page_size,
            num_blocks=blocks,
            max_batch_tokens=2048,
            max_requests_per_batch=setup.max_num_seqs,
        )
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), config
        )
        self._manager.start()
        self._serial = 0
        self.about = {"versions": {"transformers": transformers.__version__}, "settings": {"num_blocks": blocks}}

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        start = time.perf_counter()
        results: dict[str, tuple[int, float]] = {}
        traces: dict[int, Trace] = {}
        waiting = list(enumerate(requests))[::-1]
        while waiting or results:
            while waiting and self._is_due(waiting[-1][1], start, len(results), concurrency):
                index, request = waiting.pop()
                arrival = request.time if concurrency is None else time.perf_counter() - start
                self._serial += 1
                results[f"job-{self._serial}"] = (index, arrival)
                self._manager.add_request(
                    request.prompt,
                    f"job-{self._serial}",
                    max_new_tokens=request.max_tokens,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            result = self._manager.get_result(timeout=0.005)
            if result is not None:
                index, arrival = results.pop(result.request_id)
                traces[index] = _trace(result, arrival, start)
            elif self._manager.background_thread_status.fatal_error is not None:
                raise self._manager.background_thread_status.fatal_error
        return [traces[index] for index in range(len(requests))]

    def _is_due(self, request: Request, start: float, running: int, concurrency: int | None) -> bool:
        return request.time <= time.perf_counter() - start if concurrency is None else running < concurrency


def _trace(result: GenerationOutput, arrival: float, start: float) -> Trace:
    if result.error is not None or result.timestamps is None:
        raise RuntimeError(result.error or "the manager kept no times")
    times = [stamp - start for stamp in result.timestamps]
    return Trace(arrival, times, [1] * len(times), list(result.generated_tokens))


if __name__ == "__main__":
    serve(Transformers)
