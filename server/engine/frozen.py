"""One frozen model that is loaded: what requests for it are held against, and its forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from weft.adapters.errors import AdapterError
from weft.adapters.forms import CompiledAdapter
from weft.adapters.quantized import count_parameters
from weft.server.config import EngineConfig
from weft.server.engine.batch import Batch
from weft.server.engine.blocks import BlockPool, root_key
from weft.server.engine.info import ModelInfo
from weft.server.engine.mixing import Pass
from weft.server.engine.prompts import PromptPages
from weft.server.engine.request import EngineRequest
from weft.server.engine.scheduler import Row
from weft.server.engine.sequence import Sequence
from weft.server.engine.startup import Loaded
from weft.server.engine.variants import RunsWith, Variants, last_occurrence
from weft.server.errors import InvalidRequest


class FrozenModel:
    """A model, its adapters and its pages.

    Args:
        lane: which it is, as the scheduler counts them.

    Attributes:
        max_batched_tokens: in one forward pass.
    """

    def __init__(self, config: EngineConfig, loaded: Loaded, lane: int) -> None:
        self.lane = lane
        self.max_batched_tokens = config.max_num_batched_tokens
        self.runner = loaded.runner
        self.graphs = loaded.graphs
        self.adapters = loaded.adapters
        self.variants = Variants(loaded.adapters, loaded.compile_folder)
        self.blocks = BlockPool(loaded.runner.cache.num_blocks)
        self.info = _describe(config, loaded)

    def register(self, version: str, folder: Path) -> CompiledAdapter:
        """Read, check and compile an adapter. Slow; any thread.

        Raises:
            AdapterError: why it cannot be served; nothing is left behind.
        """
        adapter = self.adapters.register(version, folder)
        try:
            self.runner.side.admit(adapter)
        except AdapterError:
            self.adapters.unregister(version)
            raise
        return adapter

    def prune(self) -> None:
        """Give back what adapters that are gone had beside their slots."""
        if self.runner.side.prune(self.adapters.knows):
            # Were such an adapter to come again, it would find pages of which a part is gone.
            self.blocks.forget(range(self.info.num_blocks))

    def check(self, request: EngineRequest, outline: CompiledAdapter | None) -> int:
        """Refuse what cannot be served; returns the tokens of prompt and output at most.

        Raises:
            InvalidRequest: naming the field.
        """
        ids, params, limit = request.prompt_token_ids, request.params, self.info.max_model_len
        for field, tokens in (
            ("prompt", ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            self._check_tokens(field, tokens)
        if not ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if outline is not None and outline.whole_prompts and len(ids) > self.max_batched_tokens:
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; this model computes a prompt in one pass, of at most "
                f"{self.max_batched_tokens} tokens: raise --max-num-batched-tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        own = _own_length(outline)
        if own % self.info.block_size:
            # The page that the adapter's prompt ends in is copied for every row, and must fit beside the copy.
            limit = min(limit, (self.info.num_blocks - 1) * self.info.block_size)
        room = limit - own - len(ids)
        if room < 1:
            beside = f" beside the adapter's own {own}" if own else ""
            raise InvalidRequest(
                f"the prompt has {len(ids)} tokens; with one to generate, {limit - own - 1} fit the context of {limit}"
                f"{beside}",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"'max_tokens' is {params.max_tokens}, but a prompt of {len(ids)} tokens leaves {room} of {limit}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return len(ids) + (params.max_tokens or room)

    def _check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        size = self.info.vocab_size
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise InvalidRequest(f"'{field}' has token id {wrong}, outside the vocabulary of {size}", param=field)

    def room_together(self, streams: SequenceOf[tuple[EngineRequest, CompiledAdapter | None]]) -> int:
        """Tokens of output for which the pages suffice when these streams of one request are all there is."""
        size = self.info.block_size
        lengths = [_own_length(outline) for _, outline in streams]
        # Each may end in a page of which it uses one token; each prompt's last page may be there twice.
        pages = self.info.num_blocks - sum(length % size > 0 for length in lengths)
        tokens = pages * size - len(streams) * (size - 1)
        return (tokens - sum(lengths) - sum(len(request.prompt_token_ids) for request, _ in streams)) // len(streams)

    def start(self, request: EngineRequest, runs: RunsWith, max_len: int) -> Sequence:
        """A request on what it runs with, which is held, and works from its invocation on, if it has one.

        Raises:
            NotFound, InvalidRequest: what it runs with cannot be held.
        """
        self.variants.hold(runs)
        outline = runs.outline
        root = root_key(self.info.fingerprint, runs.identity, request.cache_salt)
        seq = Sequence.start(request, root, max_len, outline.prompt if outline else None)
        seq.lane = self.lane
        seq.adapter, seq.parents = runs.identity, runs.parents
        seq.whole_prompt = outline is not None and outline.whole_prompts
        if runs.identity is not None and outline is not None and outline.invocation:
            seq.root = root_key(self.info.fingerprint, None, request.cache_salt)
            activation = last_occurrence(request.prompt_token_ids, outline.invocation)
            if activation is None:  # it is not invoked
                self.adapters.drop(runs.identity)
                seq.adapter, seq.parents = None, ()
            else:
                seq.activation, seq.active_root = activation, root
        return seq

    def forward(self, rows: list[Row], prompts: PromptPages, sampled: torch.Tensor | None) -> Pass | None:
        """Launch one forward pass over the rows, if there are any.

        Args:
            sampled: the tokens of the step under way, as in ``to_ids``.
        """
        for blocks, prefix in prompts.take_unwritten():
            self.runner.write_prefix(blocks, prefix)
        if not rows:
            return None
        batch = Batch.build(rows, self.info.block_size, self.runner.device, sampled)
        if self.graphs is not None and self.graphs.serves(batch):
            return Pass(batch, self.graphs.forward(batch))
        return Pass(batch, self.runner.forward(batch))

    def scrub(self, seq: Sequence) -> None:
        """What is not a number must not stay in pages that others may get."""
        self.runner.scrub(self.blocks.exclusive(seq.blocks))
        self.blocks.forget(seq.blocks)


def _own_length(outline: CompiledAdapter | None) -> int:
    """Tokens that an adapter puts in front of every prompt."""
    return outline.prompt.length if outline and outline.prompt else 0


def _describe(config: EngineConfig, loaded: Loaded) -> ModelInfo:
    model, cache = loaded.runner.model, loaded.runner.cache
    return ModelInfo(
        model=loaded.model,
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        fingerprint=loaded.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(loaded.runner.device),
        vocab_size=loaded.vocab_size,
        max_model_len=loaded.max_model_len,
        eos_token_ids=loaded.eos_token_ids,
        num_parameters=count_parameters(model),
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        max_num_seqs=config.max_num_seqs,
        max_adapters=config.max_adapters,
        load_seconds=loaded.seconds,
    )
