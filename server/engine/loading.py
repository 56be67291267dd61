"""Loads the base model from a Hugging Face checkpoint and settles what "auto" means."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import quantization
from weft.server.engine.attention import UnsupportedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def resolve_device(name: str) -> torch.device:
    """The device to serve on; "auto" is a GPU if there is one.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use --device cpu")
    return torch.device(name)


def load_config(config: EngineConfig) -> Any:
    """The checkpoint's transformers configuration.

    Raises:
        ConfigError: it cannot be read.
        UnsupportedModel: the architecture cannot be served exactly.
    """
    try:
        hf_config = AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {config.model!r} cannot be loaded: {_first_line(error)}") from error
    check_architecture(hf_config)
    return hf_config


def check_architecture(hf_config: Any) -> None:
    """Refuse what is known not to work, before any weight is read.

    Raises:
        UnsupportedModel: naming the setting.
    """
    model_type = hf_config.model_type
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{model_type} is an encoder-decoder model; weft serves causal language models")
    others = set(getattr(hf_config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise UnsupportedModel(
            f"{model_type} has layers of type {', '.join(sorted(others))}, which weft does not serve"
        )
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    if "dynamic" in _rope_types(rope):
        raise UnsupportedModel(
            f"{model_type} uses dynamic RoPE scaling, whose angles depend on the longest row of a batch"
        )
    if getattr(hf_config, "use_bidirectional_attention", False):
        raise UnsupportedModel(f"{model_type} has use_bidirectional_attention set; weft serves causal models")


def _rope_types(rope: dict[str, Any]) -> set[str]:
    """The kinds of RoPE in a configuration: one for all layers, or one per layer type."""
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {table["rope_type"] for table in tables if "rope_type" in table}


def max_model_len(config: EngineConfig, hf_config: Any) -> int:
    """Tokens of prompt and output together that the model can place.

    Raises:
        ConfigError: more are asked for than the model has positions.
    """
    limit = getattr(hf_config, "max_position_embeddings", None) or getattr(hf_config, "n_positions", None)
    rope = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(
        hf_config, "original_max_position_embeddings", None
    )
    if "longrope" in _rope_types(rope) and original:
        # Past it transformers turns every position of a batch by other angles, so rows would depend on each other.
        limit = min(limit or original, original)
    if limit is None:
        if config.max_model_len is None:
            raise ConfigError("the model's configuration has no max_position_embeddings; give --max-model-len")
        return config.max_model_len
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(f"max_model_len is {config.max_model_len}, but the model has {limit} positions")
    return config.max_model_len or int(limit)


def load_model(config: EngineConfig, hf_config: Any, device: torch.device) -> PreTrainedModel:
    """The frozen base on ``device``, in eval mode, quantised if so configured, with transformers' own plain attention.

    Raises:
        ConfigError: the checkpoint cannot be loaded, or lacks weights.
    """
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    quantized = quantization.load_arguments(config.quantization, hf_config, device)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            config.model,
            config=hf_config,
            dtype=dtype,
            attn_implementation="eager",
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **quantized,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"model {config.model!r} cannot be loaded: {_first_line(error)}") from error
    model: PreTrainedModel
    info: dict[str, Any]
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        # transformers fills them with random numbers and warns; a server must not serve those.
        raise ConfigError(f"the checkpoint of {config.model!r} lacks {len(missing)} weights, first {missing[0]!r}")
    if info.get("mismatched_keys"):
        raise ConfigError(f"the checkpoint of {config.model!r} has weights of other shapes: {info['mismatched_keys']}")
    quantization.settle(model, quantized)
    # Nothing is padded; where the token is known, some models look for it in the ids of every step, which waits for the
    # device.
    model.config.pad_token_id = None
    model.eval().requires_grad_(False)
    if not quantized:  # else it was loaded there
        move: Any = model  # its ``to`` is typed for the class alone
        move.to(device)
    return model


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Every id that ends a text, from the generation configuration, else the model's."""
    generation: GenerationConfig | None = model.generation_config
    found = generation.eos_token_id if generation is not None else None
    if found is None:
        found = getattr(model.config, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def fingerprint(model: PreTrainedModel) -> str:
    """Digest of what the model computes: its configuration, serving dtype and the identity of its weights.

    Of the weights it takes names, shapes and a strided sample of the values: enough to tell two checkpoints apart
    without reading gigabytes.
    """
    digest = hashlib.sha256(b"weft-model-v1")
    settings = model.config.to_diff_dict()
    settings.pop("_name_or_path", None)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name}:{tuple(tensor.shape)}:".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
