"""Before serving: does weft's flat, paged, chunked forward compute what transformers' own forward computes?

An architecture that goes its own way (another attention path, positions of its own, state between tokens) is found
here and refused, whatever its name.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from weft.kernels.paged_attention.backends import Layer
from weft.server.engine.attention import PROBE, UnsupportedModel
from weft.server.engine.batch import Batch
from weft.server.engine.model import ModelRunner
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.scheduler import Row
from weft.server.engine.sequence import Sequence

_LENGTHS = (40, 9)
_CHUNK = 17  # not a multiple of any page size
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest relative difference of the logits (Frobenius norm, centred). A wrong mask or position is off by 0.1 to 1."""


def attention_layers(model: PreTrainedModel) -> list[Layer]:
    """What each layer asks of attention, seen in a forward pass of one token.

    Configurations spell head sizes in a dozen ways; what arrives at the attention function is the truth.

    Raises:
        UnsupportedModel: a layer does not go through transformers' attention interface.
    """
    seen: dict[int, Layer] = {}
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.set_attn_implementation(PROBE)
    with torch.inference_mode():
        model(input_ids=zero, position_ids=zero, use_cache=False, weft=seen)
    layers = model.config.num_hidden_layers
    if sorted(seen) != list(range(layers)):
        raise UnsupportedModel(
            f"{model.config.model_type}: {len(seen)} of {layers} layers attend through transformers' attention "
            "interface; weft serves models where all do"
        )
    return [seen[layer] for layer in range(layers)]


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, max_model_len: int) -> list[torch.Tensor]:
    """float32 logits ``[T, vocab]`` of the check's prompts, each alone, by transformers' own attention.

    Raises:
        UnsupportedModel: transformers itself cannot run the checkpoint.
    """
    logits = []
    for ids in _prompts(model.config.vocab_size, max_model_len):
        try:
            output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        except Exception as error:  # whatever a checkpoint's own code may raise
            raise UnsupportedModel(f"transformers' own forward fails on this checkpoint: {error}") from error
        logits.append(output.logits[0].float())
    return logits


def verify(runner: ModelRunner, reference: list[torch.Tensor], max_model_len: int) -> None:
    """Compare weft's forward with ``reference_logits``: two rows in one batch, the first in chunks.

    Raises:
        UnsupportedModel: they differ by more than rounding explains.
    """
    seqs = []
    first_block = 0
    for ids in _prompts(runner.model.config.vocab_size, max_model_len):
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)  # asks for the logits of every position
        seq = Sequence.start(EngineRequest("selfcheck", ids, params), b"", len(ids) + 1)
        blocks = -(-len(ids) // runner.cache.block_size)
        seq.blocks = list(range(first_block, first_block + blocks))
        first_block += blocks
        seqs.append(seq)
    long, short = seqs
    cut = min(_CHUNK, len(long.tokens) - 1)
    parts = [
        _forward(runner, [Row(long, 0, cut)]),
        _forward(runner, [Row(short, 0, len(short.tokens)), Row(long, cut, len(long.tokens))]),
    ]
    head = len(short.tokens)
    got = [torch.cat([parts[0], parts[1][head:]]), parts[1][:head]]
    for ours, theirs in zip(got, reference, strict=True):
        error = _relative_error(ours, theirs)
        tolerance = _TOLERANCE[runner.model.dtype]
        if not error <= tolerance:  # also when it is NaN
            raise UnsupportedModel(
                f"{runner.model.config.model_type}: weft's forward differs from transformers' own by {error:.1e} "
                f"(relative, at most {tolerance:.0e}); this architecture cannot be served exactly"
            )


def _forward(runner: ModelRunner, rows: list[Row]) -> torch.Tensor:
    return runner.forward(Batch.build(rows, runner.cache.block_size, runner.device))


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    centred = theirs - theirs.mean(dim=-1, keepdim=True)
    return float((ours - theirs).norm() / centred.norm().clamp_min(1e-12))


def _prompts(vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Fixed token ids, spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    lengths = [max(2, min(length, max_model_len - 1)) for length in _LENGTHS]
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
