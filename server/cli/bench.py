"""``weft bench``: a seeded workload against a live server, or against the engine in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from weft.server.cli.client import local_url
from weft.server.cli.terminal import fail, failing_clearly
from weft.server.config import ConfigError
from weft.server.settings import Settings

if TYPE_CHECKING:
    from weft.server.bench.run import Target
    from weft.server.bench.workload import Popularity

POPULARITIES = ("distinct", "uniform", "skewed", "identical", "zipf", "power")


def bench(
    url: Annotated[
        str | None,
        typer.Option(envvar="WEFT_URL", help="The live server; default: this machine's, by weft's settings."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Its API key; default: WEFT_API_KEY.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="The engine in this process instead of a server.")] = False,
    model: Annotated[str | None, typer.Option(help="Offline: folder or hub id; default: the demo.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable. Live: an id; default: all there are. Offline: ID=FOLDER; default: the demo's."),
    ] = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="The base is one more of the adapters.")] = False,
    requests: Annotated[int, typer.Option(help="How many.")] = 64,
    popularity: Annotated[str, typer.Option(help=f"Spread over adapters: {', '.join(POPULARITIES)}.")] = "uniform",
    alpha: Annotated[float, typer.Option(help="Exponent of zipf and power.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Arrivals per second; default: a closed loop.")] = None,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps between arrivals.")] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight in a closed loop.")] = 16,
    prompt_tokens: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Uniform lengths of prompts.")] = "8:128",
    output_tokens: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Uniform lengths of outputs.")] = "8:128",
    vocab_size: Annotated[int, typer.Option(help="Prompts are random token ids below it.")] = 256,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal requests.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures, machine and versions there as JSON.")] = None,
) -> None:
    """Measure throughput and latencies under a seeded workload.

    S-LoRA's trace: --popularity power --alpha 0.1 --rate 2 --prompt-tokens 8:512 --output-tokens 8:512. Punica's
    patterns: distinct, uniform, skewed, identical.
    """
    from weft.adapters.errors import AdapterError
    from weft.server.bench import report
    from weft.server.bench.live import LiveError
    from weft.server.bench.run import measure
    from weft.server.bench.workload import Workload

    if popularity not in POPULARITIES:
        fail(f"popularity must be one of {', '.join(POPULARITIES)}; got {popularity!r}")
    with failing_clearly(ConfigError, AdapterError, LiveError):
        workload = Workload(
            num_requests=requests,
            popularity=cast("Popularity", popularity),
            alpha=alpha,
            rate=rate,
            cv=cv,
            concurrency=concurrency,
            prompt_tokens=_bounds("prompt_tokens", prompt_tokens),
            output_tokens=_bounds("output_tokens", output_tokens),
            vocab_size=vocab_size,
            seed=seed,
        )
        target = _offline(model, adapter) if offline else _live(url, api_key)
        models = list(target.adapters) if offline or not adapter else adapter
        run = measure(target, workload, [*models, target.base] if with_base or not models else models)
    mode = "offline" if offline else "live"
    results = run["results"]
    typer.echo(report.table({mode: results}))
    for message in results["error_messages"]:
        typer.secho(message, fg="red", err=True)
    if out is not None:
        report.write(out, {**report.environment(sys.argv), "runs": {mode: run}})
    if results["completed"] < requests:
        raise typer.Exit(1)


def _offline(model: str | None, adapter: list[str] | None) -> Target:
    from weft.server.bench.offline import OfflineTarget
    from weft.server.demo import demo_adapters

    settings = Settings.load(model=model, adapter=adapter)
    folders = {id: Path(source) for id, source in settings.adapter.items()}
    return OfflineTarget(settings.engine_config(), folders or (demo_adapters() if settings.is_demo else {}))


def _live(url: str | None, api_key: str | None) -> Target:
    from weft.server.bench.live import LiveTarget

    settings = Settings.load(api_key=api_key)
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return LiveTarget(url or local_url(settings.host, settings.port), api_key=key)


def _bounds(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise ConfigError(f"{name} must be LOW:HIGH, got {text!r}") from None
