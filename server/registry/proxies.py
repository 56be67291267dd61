"""Named proxies: a base, or an adapter of it, steered by the logits of others, under an id of its own.

They name *ids*. After a member was replaced, new requests see its new version; while one is not served, the proxy is
listed as broken, and works again when the member is back.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from weft.adapters.composition import Combination
from weft.server.registry.compositions import WeighedId
from weft.server.registry.named import Named
from weft.server.registry.registry import AdapterRegistry

FILE = "proxies.json"


class Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one stream of tokens runs with, by name.

    Attributes:
        model: a proxy model, or a name of the base; None: the base.
        adapter: an adapter of that model, or a named composition.
        members, combination: adapters composed for this stream alone.
        task_id, lora_rank: what it chooses of its adapter.
        own_template: it reads the request's messages as its model's own chat template renders them.
    """

    model: str | None = None
    adapter: str | None = None
    members: tuple[WeighedId, ...] = ()
    combination: Combination = "lorahub"
    task_id: int | None = None
    lora_rank: int | None = None
    own_template: bool = False

    @property
    def names_nothing(self) -> bool:
        """Neither a model nor an adapter: it runs with what the request itself runs with."""
        return self.model is None and self.adapter is None and not self.members

    @property
    def choices(self) -> dict[str, int]:
        given = {"task_id": self.task_id, "lora_rank": self.lora_rank}
        return {name: value for name, value in given.items() if value is not None}


class NamedProxy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A proxy as it was asked for, and as it is kept: s = s_base + alpha (s_expert - s_anti_expert).

    Attributes:
        created: unix time in seconds.
        base: what is steered: a name of the base, an adapter of it or a composition; None: the base.
        base_top_p: only tokens in the base's own nucleus of this size are kept; None: all.
    """

    id: str
    created: int
    expert: Stream
    anti_expert: Stream
    base: str | None = None
    alpha: float = 1.0
    base_top_p: float | None = None

    @property
    def revision(self) -> str:
        """A digest of what requests see of it, for ``If-Match``."""
        content = (self.expert, self.anti_expert, self.base, self.alpha, self.base_top_p)
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


class Proxies(Named[NamedProxy]):
    """Named proxies by id. All methods on one event loop."""

    def __init__(self, folder: Path, registry: AdapterRegistry) -> None:
        """Read what ``folder``, this server's alone, has of earlier runs. Raises ``ConfigError`` if it is damaged."""
        super().__init__("proxy", folder / FILE, NamedProxy, registry)
