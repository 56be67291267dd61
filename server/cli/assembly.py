"""The HTTP application around a started engine. Apart from ``launch`` because importing it takes seconds."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI

from weft.server.config import ConfigError
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
from weft.server.http.state import ServerState
from weft.server.observability.metrics import Metrics
from weft.server.registry.compositions import Compositions
from weft.server.registry.proxies import Proxies
from weft.server.runtime.client import EngineClient
from weft.server.settings import Settings
from weft.server.tokenization import Tokenizer, Workers, check_vocabulary


@dataclass(frozen=True)
class Tokenizers:
    """Of the main model, and of the proxy models by name."""

    main: Tokenizer
    proxies: dict[str, Tokenizer]


def read_tokenizers(settings: Settings) -> Tokenizers:
    """The tokenizers of all models.

    Raises:
        ConfigError: a model has none that can be read, or a proxy model has another than the main one.
    """
    config = settings.engine_config()
    main = _tokenizer("model", config.model, config.revision, trust_remote_code=config.trust_remote_code)
    proxies = {}
    for name, model in config.proxy_models:
        proxies[name] = _tokenizer("proxy_model", model, None, trust_remote_code=config.trust_remote_code)
        check_vocabulary(name, proxies[name], main)
    return Tokenizers(main, proxies)


def create_application(
    settings: Settings,
    client: EngineClient,
    compositions: Compositions,
    proxies: Proxies,
    tokenizers: Tokenizers,
    admin_key: str,
) -> FastAPI:
    """The application that ``settings`` describe, on a started engine."""
    limit = client.info.max_model_len
    registry = compositions.registry
    api_keys = (settings.api_key.get_secret_value(),) if settings.api_key else ()
    state = ServerState(
        client=client,
        registry=registry,
        tokenizer=Tokenizer(tokenizers.main.backend, max_model_len=limit),
        metrics=Metrics(client, registry),
        keys=Keyring(admin_key, api_keys),
        base_names=settings.base_names,
        compositions=compositions,
        proxies=proxies,
        proxy_tokenizers={
            name: Tokenizer(tokenizer.backend, max_model_len=limit) for name, tokenizer in tokenizers.proxies.items()
        },
        # The engine's queue is what refuses: as many as it takes may come at once.
        workers=Workers(max_waiting=settings.max_num_seqs + settings.max_queued_requests),
    )
    return create_app(state)


def _tokenizer(setting: str, model: str, revision: str | None, *, trust_remote_code: bool) -> Tokenizer:
    tokenizer = Tokenizer.load(model, revision=revision, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ConfigError(f"{setting}: {model} has no tokenizer, and the API speaks text")
    return tokenizer
