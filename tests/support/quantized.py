"""peft on a base that bitsandbytes has quantised: what the engine must agree with there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.support.adapters import PeftReference
from tests.support.models import tiny_model

SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""What ``--quantization`` stands for, as arguments of ``BitsAndBytesConfig``; fp32 is its default compute dtype."""

WIDTHS: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    "gpt2": {"n_embd": 64},
}
"""Widths in whole blocks of 4-bit weights."""


def wide_model(arch: str, folder: Path, **overrides: Any) -> Path:
    """``tiny_model`` with linears that can be quantised."""
    return tiny_model(arch, folder, **{**WIDTHS[arch], **overrides})


def quantized_model(base: Path, **settings: Any) -> Any:
    """``base`` quantised by transformers with these settings, or as its checkpoint is, in fp32, each row by itself.

    bitsandbytes' shortcut for CPUs with AVX-512 BF16, which calculates in bf16, is off. 8-bit linears are in training
    mode, where bitsandbytes multiplies with the weight and leaves the activations as they are.
    """
    how = {"quantization_config": BitsAndBytesConfig(**settings)} if settings else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}, **how
    )
    return _by_rows(model)


def save_quantized(base: Path, folder: Path, **settings: Any) -> Path:
    """Save ``base``, quantised with these settings, as transformers saves it; returns ``folder``."""
    quantized_model(base, **settings).save_pretrained(folder)
    return folder


class QuantizedReference(PeftReference):
    """The quantised base with at most one adapter.

    Args:
        dequantized: replace the quantised linears by plain ones of their weights first: for methods that peft defines
            by the weight, and does not run on a packed one.
        settings: see ``quantized_model``.
    """

    def __init__(self, base: Path, adapter: Path | None, *, dequantized: bool = False, **settings: Any) -> None:
        model = quantized_model(base, **settings)
        if dequantized:
            model = model.dequantize()
        if adapter is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(model, str(adapter))
        self.model = _by_rows(model)
        self._arguments = {}

    def logits(self, ids: Sequence[int], prompt_len: int | None = None) -> torch.Tensor:
        for module in self.model.modules():
            # On a CPU, peft's DoRA leaves the weight of an 8-bit linear without its scales, which the linear would take
            # over in its next pass: it has them already.
            if isinstance(module, Linear8bitLt) and module.state.CB is not None:
                module.weight.CB = None
        return super().logits(ids, prompt_len)


def _by_rows(model: Any) -> Any:
    for module in model.eval().modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.train()
    return model
