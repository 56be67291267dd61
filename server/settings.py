"""Settings of ``weft serve``: flags > ``WEFT_…`` environment variables > ``weft.toml`` > defaults. Unknown keys fail.

A field's name is its key in ``weft.toml``; upper-cased behind ``WEFT_`` it is the variable; with dashes it is the flag.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from weft.server.config import ConfigError, EngineConfig

DEMO = "demo"
"""The model name that stands for the embedded demo base and its adapters."""
DEMO_NAME = "weft-demo"
"""Its base's name in the API."""

DEFAULT_FILE = "weft.toml"
SIZE = re.compile(r"\s*(\d+|\d*\.\d+)\s*[A-Za-z]*\s*")
CLIENT_VARIABLES = frozenset({"WEFT_URL"})
"""Variables of the client commands (``weft adapter``, ``weft bench``), which are no settings of the server."""


def default_state_dir() -> Path:
    """Where servers keep their admin key and adapters: ``$XDG_STATE_HOME/weft``, else ``~/.local/state/weft``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "weft"


def parse_adapters(value: object) -> object:
    """``ID=SOURCE`` items, as a list or a comma-separated string, or a table, as a dictionary of sources by id.

    An item may also be vLLM's JSON form, ``{"name": ID, "path": SOURCE}``.
    """
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Iterable):
        raise ValueError(f"must be a list of ID=SOURCE, got {value!r}")
    adapters: dict[str, str] = {}
    for item in value:
        name, source = _adapter(item)
        if name in adapters:
            raise ValueError(f"the id {name!r} is given twice")
        adapters[name] = source
    return adapters


def _adapter(item: object) -> tuple[str, str]:
    if not isinstance(item, str):
        raise ValueError(f"must be ID=SOURCE, got {item!r}")
    if item.lstrip().startswith("{"):
        entry = json.loads(item)
        name, source = entry.get("name"), entry.get("path")
    else:
        name, _, source = (part.strip() for part in item.partition("="))
    if not (isinstance(name, str) and isinstance(source, str) and name and source):
        raise ValueError(f"must be ID=SOURCE, got {item!r}")
    return name, source


def _split_paths(value: object) -> object:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value


def _split_names(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def parse_models(value: object) -> object:
    """``NAME=PATH`` items, as a list or a comma-separated string, or a table, as a dictionary of paths by name."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Iterable):
        raise ValueError(f"must be a list of NAME=PATH, got {value!r}")
    models: dict[str, str] = {}
    for item in value:
        name, _, path = (part.strip() for part in str(item).partition("="))
        if not (name and path):
            raise ValueError(f"must be NAME=PATH, got {item!r}")
        if name in models:
            raise ValueError(f"the name {name!r} is given twice")
        models[name] = path
    return models


@dataclasses.dataclass(frozen=True)
class GivenAdapter:
    """An adapter named at start; ``base``: the proxy model it belongs to, None for the main one."""

    id: str
    source: str
    base: str | None = None


Adapters = Annotated[dict[str, str], NoDecode, BeforeValidator(parse_adapters)]
Models = Annotated[dict[str, str], NoDecode, BeforeValidator(parse_models)]
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_paths)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)]


class Settings(BaseSettings):
    """Everything ``weft serve`` can be told. Sizes are bytes or written with a unit: ``4GiB``, ``512MB``."""

    model_config = SettingsConfigDict(env_prefix="WEFT_", extra="forbid", frozen=True, env_ignore_empty=True)

    config: Path | None = Field(None, description=f"Settings file; default: {DEFAULT_FILE} here, if there is one.")
    model: str = Field(DEMO, description="Folder or hub id of a causal language model; default: the embedded demo.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run modelling code from the checkpoint.")
    adapter: Adapters = Field(
        {}, description="An adapter to serve, PROXY:ID=SOURCE for one of a proxy model; repeatable."
    )
    adapter_root: Folders = Field((), description="Folder that sources of the admin API may lie in; repeatable.")

    proxy_model: Models = Field(
        {}, description="Name and path or hub id of a further frozen model, for proxy-tuning; repeatable."
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    served_model_name: Names = Field((), description="Name of the base in the API; repeatable.")
    api_key: SecretStr | None = Field(None, min_length=1, description="Key clients must send; default: none needed.")
    admin_key: SecretStr | None = Field(
        None, min_length=1, description="Key of the admin API; default: generated and kept in the state directory."
    )
    state_dir: Path = Field(default_factory=default_state_dir, description="Where adapters and the admin key are kept.")
    drain_timeout: float = Field(30.0, ge=0, allow_inf_nan=False, description="Seconds to finish requests at shutdown.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe log line shown.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )

    device: str = Field("auto", description="auto, cpu or cuda.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    quantization: str = Field("none", description="Bits of the base's weights: none (as they are), nf4 or int8.")
    max_model_len: int | None = Field(None, description="Tokens of prompt and output together; default: the model's.")
    max_num_seqs: int = Field(64, description="Requests decoding at once.")
    max_num_batched_tokens: int = Field(2048, description="Tokens in one forward pass.")
    block_size: int = Field(16, description="Tokens in one page of the KV cache.")
    kv_cache_memory: ByteSize | None = Field(None, description="Memory for the KV cache; default: by what is free.")
    gpu_memory_utilization: float = Field(0.9, description="Share of the GPU's memory to use.")
    cuda_graphs: bool = Field(True, description="On a GPU, replay recorded decode steps.")
    attention_backend: str = Field("auto", description="On a GPU: auto, triton, varlen or flashinfer.")
    async_scheduling: bool | None = Field(
        None, description="Launch a step before the last one's tokens are known; default: on a GPU."
    )
    enable_prefix_caching: bool = Field(True, description="Share the KV cache of equal beginnings of prompts.")
    adapter_memory: ByteSize | None = Field(None, description="Device memory for adapters; default: by the device.")
    adapter_host_memory: ByteSize = Field(ByteSize(4 << 30), description="Host memory for adapters.")
    max_adapters: int = Field(64, description="Most distinct adapters in one batch.")
    max_queued_requests: int = Field(1024, description="Waiting requests before new ones are refused with 429.")

    @field_validator("kv_cache_memory", "adapter_memory", "adapter_host_memory", mode="before")
    @classmethod
    def _check_size(cls, value: object) -> object:
        # pydantic reads what a text begins with: "1,5GiB" would be one byte.
        if isinstance(value, str) and not SIZE.fullmatch(value):
            raise ValueError(f"must be bytes, or a number with a unit such as 4GiB or 512MB; got {value!r}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        given = init_settings().get("config") or env_settings().get("config")
        if given is not None and not Path(given).is_file():
            raise ConfigError(f"config: there is no file {given}")
        file_settings = TomlConfigSettingsSource(settings_cls, Path(given or DEFAULT_FILE))
        if "config" in file_settings():
            raise ConfigError("config: a settings file cannot name another one")
        return init_settings, env_settings, file_settings

    @classmethod
    def load(cls, **flags: Any) -> Settings:
        """Merge the sources. ``flags`` holds those that were given; None stands for one that was not.

        Raises:
            ConfigError: one line per problem, each naming the key and where its value came from.
        """
        flags = {name: value for name, value in flags.items() if value is not None}
        _refuse_unknown_variables(cls.model_fields)
        try:
            return cls(**flags)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config: not valid TOML: {error}") from error
        except ValidationError as error:
            raise ConfigError("\n".join(_problem(e["loc"], e["msg"], flags) for e in error.errors())) from None

    @property
    def is_demo(self) -> bool:
        return self.model == DEMO

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base in the API: those given, else the hub id, or the folder's own name."""
        if self.served_model_name:
            return self.served_model_name
        if self.is_demo:
            return (DEMO_NAME,)
        return (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model,)

    @property
    def adapters(self) -> tuple[GivenAdapter, ...]:
        """Those of ``adapter``; ``small:x`` is the adapter ``x`` of ``small`` where a proxy model has that name.

        Raises:
            ConfigError: two of them have one id.
        """
        given: dict[str, GivenAdapter] = {}
        for name, source in self.adapter.items():
            base = max((model for model in self.proxy_model if name.startswith(f"{model}:")), key=len, default=None)
            id = name if base is None else name[len(base) + 1 :]
            if not id or id in given:
                raise ConfigError(f"adapter: the id {id!r} of {name}={source} is {'given twice' if id else 'empty'}")
            given[id] = GivenAdapter(id, source, base)
        return tuple(given.values())

    def engine_config(self) -> EngineConfig:
        """The engine's part. The demo's model is resolved to its folder.

        Raises:
            ConfigError: naming the setting.
        """
        names = {field.name for field in dataclasses.fields(EngineConfig)} - {"proxy_models"}
        values = {name: getattr(self, name) for name in names}
        # Plain integers: the engine's process need not know pydantic.
        values = {name: int(value) if isinstance(value, ByteSize) else value for name, value in values.items()}
        values["proxy_models"] = tuple(self.proxy_model.items())
        if self.is_demo:
            from weft.server.demo import demo_model

            values["model"] = str(demo_model())
        return EngineConfig(**values)


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _refuse_unknown_variables(fields: Iterable[str]) -> None:
    known = {f"WEFT_{name.upper()}" for name in fields} | CLIENT_VARIABLES
    for name in sorted(os.environ):
        if name.startswith("WEFT_") and name not in known:
            hint = _near(name, known)
            if "WEFT_SERVICE_HOST" in os.environ:
                hint = "; Kubernetes sets it for a Service named weft: set enableServiceLinks to false for the pod"
            raise ConfigError(f"unknown environment variable {name}{hint}")


def _problem(loc: tuple[int | str, ...], message: str, flags: Mapping[str, object]) -> str:
    """One validation error, as a line that says where the value came from."""
    name = str(loc[0])
    if name not in Settings.model_fields:
        return f"unknown key {name!r} in the settings file{_near(name, Settings.model_fields)}"
    if name in flags:
        origin = "--" + name.replace("_", "-")
    elif f"WEFT_{name.upper()}" in os.environ:
        origin = f"WEFT_{name.upper()}"
    else:
        origin = f"{name!r} in the settings file"
    return f"{'.'.join(map(str, loc))}: {message.removeprefix('Value error, ')} (from {origin})"
