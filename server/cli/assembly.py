"""The HTTP application around a started engine. Apart from ``launch`` because importing it takes seconds."""

from __future__ import annotations

from fastapi import FastAPI

from weft.server.config import ConfigError
from weft.server.http.app import create_app
from weft.server.http.auth import Keyring
from weft.server.http.state import ServerState
from weft.server.observability.metrics import Metrics
from weft.server.registry.registry import AdapterRegistry
from weft.server.runtime.client import EngineClient
from weft.server.settings import Settings
from weft.server.tokenization import Tokenizer


def create_application(settings: Settings, client: EngineClient, registry: AdapterRegistry, admin_key: str) -> FastAPI:
    """The application that ``settings`` describe.

    Raises:
        ConfigError: the model has no tokenizer that can be read.
    """
    config = settings.engine_config()
    tokenizer = Tokenizer.load(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        max_model_len=client.info.max_model_len,
    )
    if tokenizer is None:
        raise ConfigError(f"model: {config.model} has no tokenizer, and the API speaks text")
    api_keys = (settings.api_key.get_secret_value(),) if settings.api_key else ()
    keys = Keyring(admin_key, api_keys)
    return create_app(ServerState(client, registry, tokenizer, Metrics(client, registry), keys, settings.base_names))
