"""``weft check``: can this adapter be served exactly? The base's weights are read only where a method needs them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.server.cli.terminal import bytes_text, failing_clearly
from weft.server.config import ConfigError, check_quantization
from weft.server.settings import DEMO

if TYPE_CHECKING:
    from weft.adapters.base import Base
    from weft.adapters.errors import AdapterError


def check(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The adapter's folder.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Folder or hub id of its base, or demo; default: the base the adapter names.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run modelling code from the base's folder.")] = False,
    quantization: Annotated[
        str, typer.Option(help="How the base is served: none (as it is), nf4 or int8.", show_default=True)
    ] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say whether and how an adapter can be served, or exactly what prevents it (exit code 1)."""
    from weft.adapters.errors import AdapterError, BaseWeightsNeeded

    try:
        with failing_clearly(ConfigError):
            model = base or named_base(adapter)
            check_quantization(quantization)
            how: Any = {"trust_remote_code": trust_remote_code, "quantization": quantization}
            try:
                report = examine(adapter, describe_base(model, **how))
            except BaseWeightsNeeded:
                report = examine(adapter, load_base(model, **how))
    except AdapterError as error:
        report = {"servable": False, "adapter": str(adapter), "base": model, "error": _error(error)}
    else:
        report = {"servable": True, "adapter": str(adapter), "base": model, **report}
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report), err=not (report["servable"] or as_json))
    if not report["servable"]:
        raise typer.Exit(1)


def describe_base(model: str, *, trust_remote_code: bool = False, quantization: str = "none") -> Base:
    """The sites of ``model``, from its configuration alone: its modules are made without memory for weights.

    Raises:
        ConfigError: there is no such model, it is no causal language model, or it cannot be quantised so.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from weft.adapters.base import Base
    from weft.server.engine.quantization import quantize_shape

    try:
        config = AutoConfig.from_pretrained(_source(model), trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(
                config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"base: cannot read {model} as a causal language model: {error}") from error
    quantize_shape(shape, quantization)
    return Base.of(shape)


def load_base(model: str, *, trust_remote_code: bool = False, quantization: str = "none") -> Base:
    """``model`` with its weights on the CPU, for adapters whose forms follow from them.

    Raises:
        ConfigError: its weights cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from weft.adapters.base import Base
    from weft.server.engine.quantization import load_arguments, settle

    try:
        config = AutoConfig.from_pretrained(_source(model), trust_remote_code=trust_remote_code)
        quantized = load_arguments(quantization, config, torch.device("cpu"))
        loaded = AutoModelForCausalLM.from_pretrained(
            _source(model), config=config, dtype="auto", trust_remote_code=trust_remote_code, **quantized
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"base: what the adapter does follows from the weights of {model}, which cannot be read: {error}"
        ) from error
    settle(loaded, quantized)
    return Base.of(loaded)


def _source(model: str) -> str:
    from weft.server.demo import demo_model

    return str(demo_model()) if model == DEMO else model


def examine(adapter: Path, base: Base) -> dict[str, Any]:
    """How ``adapter`` would be served on ``base``.

    Raises:
        AdapterError: it would not; the message names the field or tensor.
    """
    from weft.adapters.methods import compile_adapter
    from weft.adapters.store import digest

    compiled = compile_adapter(adapter, base, version=digest(adapter), dtype=None)
    return {
        "version": compiled.version,
        "method": compiled.method,
        "forms": list(compiled.forms),
        "rank": compiled.rank,
        "sites": {path: {"forms": list(forms.names), "rank": forms.rank} for path, forms in compiled.sites.items()},
        "nbytes": compiled.nbytes,
        "virtual_tokens": compiled.prompt.length if compiled.prompt else 0,
        "position_offset": compiled.prompt.position_offset if compiled.prompt else 0,
        "choices": {
            choice.name: {"min": choice.low, "max": choice.high, "default": choice.default}
            for choice in compiled.choices
        },
        "invocation": list(compiled.invocation),
        "whole_prompts": compiled.whole_prompts,
    }


def named_base(adapter: Path) -> str:
    """The base that the adapter's own configuration names.

    Raises:
        ConfigError: it names none.
    """
    from weft.adapters.files import CHAIN, CONFIG, ROUTER

    folder = adapter if (adapter / CONFIG).exists() or not (adapter / ROUTER).is_dir() else adapter / ROUTER
    try:
        if (adapter / CHAIN).exists():  # the first link was trained on the base, the others on what it made of it
            folder = adapter / json.loads((adapter / CHAIN).read_text())["links"][0]
        config = json.loads((folder / CONFIG).read_text())
        # peft's name for it, and AdapterHub's.
        names = ("base_model_name_or_path", "model_name") if isinstance(config, dict) else ()
        named = next((config[name] for name in names if config.get(name)), None)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"adapter: cannot read its adapter_config.json: {error}") from error
    if not isinstance(named, str) or not named:
        raise ConfigError("base: the adapter names no base model; pass --base")
    return named


def _error(error: AdapterError) -> Mapping[str, object]:
    return {"code": error.code, "param": error.param, "message": error.message}


def _text(report: Mapping[str, Any]) -> str:
    names = f"{report['adapter']} on {report['base']}"
    if not report["servable"]:
        error = report["error"]
        return typer.style(f"{names} cannot be served: {error['message']} ({error['code']})", fg="red")
    lines = [
        typer.style(f"{names} can be served", fg="green"),
        f"method   {report['method']}",
        f"forms    {', '.join(report['forms'])}",
        f"rank     {report['rank']}",
        f"size     {bytes_text(report['nbytes'])}",
        f"version  {report['version']}",
        f"sites    {len(report['sites'])}",
    ]
    if report["virtual_tokens"]:
        lines.insert(
            4, f"prompt   {report['virtual_tokens']} virtual tokens, the first real one at {report['position_offset']}"
        )
    for name, choice in report["choices"].items():
        default = "must be given" if choice["default"] is None else f"default {choice['default']}"
        lines.insert(-1, f"choice   {name} from {choice['min']} to {choice['max']}, {default}")
    if report["whole_prompts"]:
        lines.insert(-1, "prompts  are computed in one pass, of at most --max-num-batched-tokens tokens")
    if report["invocation"]:
        lines.insert(-1, f"works    from the last occurrence of the tokens {report['invocation']} on")
    # One line for all layers that are alike.
    alike = Counter(
        (re.sub(r"\.\d+\.", ".*.", path), "+".join(site["forms"]), site["rank"])
        for path, site in report["sites"].items()
    )
    lines += [f"  {path}  {forms}, rank {rank}  (×{count})" for (path, forms, rank), count in alike.items()]
    return "\n".join(lines)
