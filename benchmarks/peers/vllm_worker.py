"""vLLM's CPU backend through its offline engine; runs in an environment of its own (``make bench-peers``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from peers.worker import Request, Setup, Trace, drive, serve


class Vllm:
    """vLLM as its documentation advises: slots for just these adapters, the least rank that holds them.

    Without adapters LoRA is off, which lets vLLM compile the model. Threads and memory come by the environment
    (``peers/systems.py``).
    """

    def __init__(self, setup: Setup) -> None:
        lora: dict[str, Any] = {}
        if setup.adapters:
            lora = {
                "enable_lora": True,
                "max_loras": len(setup.adapters),
                "max_lora_rank": max(setup.ranks.values()),
            }
        self._llm = LLM(
            setup.model,
            skip_tokenizer_init=True,
            dtype=setup.dtype,
            max_model_len=setup.max_model_len,
            max_num_seqs=setup.max_num_seqs,
            disable_log_stats=True,
            **lora,
        )
        self._adapters = {
            name: LoRARequest(name, number, folder)
            for number, (name, folder) in enumerate(setup.adapters.items(), start=1)
        }
        self._index: dict[str, int] = {}
        self._serial = 0
        self.about = {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "settings": lora}

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        return drive(self, requests, concurrency)

    def add(self, index: int, request: Request) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._serial += 1
        name = str(self._serial)
        self._index[name] = index
        self._llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": request.prompt},
            params,
            lora_request=None if request.model is None else self._adapters[request.model],
        )

    def step(self) -> Iterator[tuple[int, Sequence[int], bool]]:
        for output in self._llm.llm_engine.step():
            index = self._index.pop(output.request_id) if output.finished else self._index[output.request_id]
            yield index, list(output.outputs[0].token_ids), output.finished


if __name__ == "__main__":
    serve(Vllm)
