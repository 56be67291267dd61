"""Loads a base whose linears bitsandbytes keeps in 4 or 8 bits (QLoRA, arXiv 2305.14314), by way of transformers.

``nf4`` is NF4 with double quantisation, as QLoRA has it; products are computed in the serving dtype, which is bfloat16
for most checkpoints. ``int8`` is bitsandbytes' 8 bits per weight with a scale per row, without its 8-bit activations
(see ``Int8Linear``). The head, the embedding and the norms stay as they are. A checkpoint that bitsandbytes has
quantised keeps its own settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.import_utils import is_accelerate_available, is_bitsandbytes_available

from weft.adapters.quantized import Int8Linear, is_quantized
from weft.server.config import ConfigError

_OFFLOAD = "llm_int8_enable_fp32_cpu_offload"
_SAVED_FIELDS = frozenset(
    {
        "_load_in_4bit",
        "_load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "llm_int8_skip_modules",
        "llm_int8_threshold",  # says which activations keep their bits; here all of them do
        "load_in_4bit",
        "load_in_8bit",
        "quant_method",
        _OFFLOAD,  # says where modules may lie; here they lie on one device
    }
)
"""Fields of a saved BitsAndBytesConfig that are honoured, or have no effect; another one must not be set."""


def load_arguments(quantization: str, hf_config: Any, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` must be told besides; empty where the base is not quantised.

    Args:
        quantization: "none" (as the checkpoint is), "nf4" or "int8".
        hf_config: the checkpoint's configuration; offloading is taken out of its ``quantization_config``.

    Raises:
        ConfigError: the checkpoint is quantised in another way, or a package is missing.
    """
    saved = getattr(hf_config, "quantization_config", None)
    if saved is not None:
        saved = dict(saved if isinstance(saved, Mapping) else saved.to_dict())
        _check_saved(saved, quantization)
        _check_packages("the checkpoint's quantization_config")
        hf_config.quantization_config = {key: value for key, value in saved.items() if key != _OFFLOAD}
        return {"device_map": {"": device}}
    if quantization == "none":
        return {}
    _check_packages(f"quantization {quantization!r}")
    return {"quantization_config": _settings(quantization), "device_map": {"": device}}


def settle(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Make the quantised linears of a model that was loaded with ``load_arguments`` compute what they are said to.

    Raises:
        ConfigError: no linear is quantised, or bitsandbytes would multiply with other weights than it says.
    """
    if not arguments:
        return
    settings = arguments.get("quantization_config")
    if settings is not None:
        settings.bnb_4bit_compute_dtype = model.dtype
    for path, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in ("Linear4bit", "Linear8bitLt"):
            _check_loaded(path, module.weight)
        if kind == "Linear8bitLt":
            model.set_submodule(path, _int8(module))
        elif kind == "Linear4bit":
            _settle_4bit(path, module, None if settings is None else model.dtype)
    if not any(is_quantized(module) for module in model.modules()):
        raise ConfigError(f"quantization: {model.config.model_type} has no linear layers that can be quantised")


def quantize_shape(model: PreTrainedModel, quantization: str) -> None:
    """Replace the linears of a model on ``meta`` as ``from_pretrained`` would; their weights stay unknown.

    Raises:
        ConfigError: as the two above.
    """
    arguments = load_arguments(quantization, model.config, torch.device("cpu"))
    if arguments:
        settings = arguments.get("quantization_config") or model.config.quantization_config
        AutoHfQuantizer.from_config(settings).preprocess_model(model, device_map=None)
        settle(model, arguments)


def _settings(quantization: str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _check_saved(saved: Mapping[str, Any], quantization: str) -> None:
    method = saved.get("quant_method")
    if str(getattr(method, "value", method)) != "bitsandbytes":
        raise ConfigError(
            f"the checkpoint's quantization_config.quant_method is {method!r}; only bitsandbytes is served"
        )
    for name, value in saved.items():
        if name not in _SAVED_FIELDS and value:
            raise ConfigError(f"the checkpoint's quantization_config.{name} is {value!r}, which is not served")
    bits = "int8" if saved.get("load_in_8bit") else str(saved.get("bnb_4bit_quant_type", "fp4"))
    if quantization not in ("none", bits):
        raise ConfigError(f"quantization is {quantization!r}, but the checkpoint is quantised already, to {bits}")


def _check_packages(what: str) -> None:
    if not (is_bitsandbytes_available() and is_accelerate_available()):
        raise ConfigError(f"{what} needs bitsandbytes and accelerate: pip install 'weft[quantization]'")


def _check_loaded(path: str, weight: Any) -> None:
    state = (
        getattr(weight, "quant_state", None) if type(weight).__name__ == "Params4bit" else getattr(weight, "SCB", None)
    )
    if state is None and not weight.is_meta:
        raise ConfigError(
            f"the checkpoint's quantization_config covers {path}, but the weight of {path} is not quantised"
        )


def _int8(module: Any) -> Int8Linear:
    weight = module.weight
    if weight.is_meta:
        shape = (module.out_features, module.in_features)
        return Int8Linear(torch.empty(shape, dtype=torch.int8, device="meta"), weight[:, 0], module.bias)
    return Int8Linear(weight.data, weight.SCB.float(), module.bias)


def _settle_4bit(path: str, module: Any, compute_dtype: torch.dtype | None) -> None:
    if compute_dtype is not None:
        module.compute_dtype, module.compute_type_is_set = compute_dtype, True
    # Where the CPU has AVX-512 BF16, bitsandbytes repacks the weight on first use and calculates in bf16 whatever the
    # compute dtype; what peft then reads as the weight (for DoRA) is not the weight any more.
    module.support_avx512bf16_for_cpu = False
    block = module.weight.blocksize
    if module.weight.device.type == "cpu" and module.in_features % block:
        raise ConfigError(
            f"quantization: {path} has {module.in_features} inputs, no multiple of {block}: blocks of 4-bit weights "
            "would lie across rows, which bitsandbytes reads wrongly on a CPU; use int8, or a GPU"
        )
