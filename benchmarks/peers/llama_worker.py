"""llama.cpp through its batches of several sequences; runs in an environment of its own (``make bench-peers``).

An adapter is set on a whole context, so rows are decoded adapter by adapter, as llama.cpp's own server does. It stays
with the adapter of its first busy slot; here adapters take turns (``turns.py``), which keeps nobody waiting.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from peers.gguf_files import read_config, write_adapter, write_model
from peers.turns import Row, Turns
from peers.worker import Request, Setup, Trace, drive, serve

BATCH_TOKENS = 2048
"""llama.cpp's own default."""


class LlamaCpp:
    """A context with a cache of its own for each sequence, flash attention, and its defaults for the rest.

    With a model in bf16 the cache is of fp16 and the factors of adapters of fp32: the defaults of llama.cpp and of its
    converter, and factors in bf16 are slower. With a model in fp32 all is of fp32.
    """

    def __init__(self, setup: Setup) -> None:
        llama_cpp.llama_backend_init()
        self._folder = tempfile.TemporaryDirectory()
        self._vocab_size: int = read_config(Path(setup.model))["vocab_size"]
        self._model = self._load_model(setup)
        self._adapters: dict[str | None, tuple[Any, int, Any]] = {None: (None, 0, None)}
        for name in setup.adapters:
            self._adapters[name] = self._load_adapter(setup, name)
        params = self._params(setup)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError("llama.cpp made no context")
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        self._turns = Turns(list(self._adapters), params.n_seq_max, params.n_batch)
        self.about = {
            "versions": {"llama-cpp-python": llama_cpp.__version__},
            "settings": {
                "n_ctx": llama_cpp.llama_n_ctx(self._context),
                **{name: getattr(params, name) for name in ("n_batch", "n_ubatch", "n_seq_max")},
                "system": llama_cpp.llama_print_system_info().decode(),
            },
        }

    def run(self, requests: Sequence[Request], concurrency: int | None) -> list[Trace]:
        return drive(self, requests, concurrency)

    def add(self, index: int, request: Request) -> None:
        self._turns.add(Row(index, request.prompt, request.max_tokens), request.model)

    def step(self) -> Iterator[tuple[int, Sequence[int], bool]]:
        adapter, rows = self._turns.next()
        for row, token in zip(rows, self._decode(adapter, rows), strict=True):
            row.position += len(row.pending)
            row.pending, row.left = [token], row.left - 1
            if row.left == 0:
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), row.sequence, -1, -1)
                self._turns.end(row, adapter)
            yield row.index, row.pending, row.left == 0

    def _decode(self, adapter: str | None, rows: Sequence[Row]) -> list[int]:
        """The greedy next token of each row."""
        llama_cpp.llama_set_adapters_lora(self._context, *self._adapters[adapter])
        batch, at = self._batch, 0
        for row in rows:
            for offset, token in enumerate(row.pending):
                batch.token[at] = token
                batch.pos[at] = row.position + offset
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row.sequence
                batch.logits[at] = offset == len(row.pending) - 1
                at += 1
        batch.n_tokens = at
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits(self._context)
        tokens: list[int] = np.ctypeslib.as_array(logits, (len(rows), self._vocab_size)).argmax(axis=1).tolist()
        return tokens

    def _load_model(self, setup: Setup) -> Any:
        path = Path(self._folder.name) / "model.gguf"
        write_model(Path(setup.model), path, setup.dtype)
        model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if model is None:
            raise RuntimeError(f"llama.cpp could not load {setup.model}")
        return model

    def _load_adapter(self, setup: Setup, name: str) -> tuple[Any, int, Any]:
        """What ``llama_set_adapters_lora`` takes: an array of adapters, its length, their scales."""
        path = Path(self._folder.name) / "adapter.gguf"
        write_adapter(Path(setup.adapters[name]), read_config(Path(setup.model)), path)
        adapter = llama_cpp.llama_adapter_lora_init(self._model, bytes(path))
        if adapter is None:
            raise RuntimeError(f"llama.cpp could not load {name}")
        return (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)

    def _params(self, setup: Setup) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = setup.max_num_seqs
        params.n_ctx = setup.max_num_seqs * setup.max_model_len  # llama.cpp rounds up the part of each sequence
        params.n_batch = max(BATCH_TOKENS, setup.max_model_len)
        # Only a row's last token has logits; room for those of all tokens would be reserved anew with every adapter.
        params.n_outputs_max = setup.max_num_seqs
        params.n_threads = params.n_threads_batch = setup.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if setup.dtype == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        return params


if __name__ == "__main__":
    serve(LlamaCpp)
