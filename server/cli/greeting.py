"""What ``weft serve`` prints once it serves: commands to copy and paste."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_EXAMPLES = 8
"""Adapters that get a command of their own."""


@dataclass(frozen=True)
class Greeting:
    """What there is to greet with.

    Attributes:
        adapters: ids of those served.
        proxies: of the proxy models: their names, and the ids of the adapters of each.
        prompts: an example prompt by adapter id, where there is one.
        source: of an adapter that the admin API may load.
        client_options: with which ``weft adapter`` finds this server and its key.
        api_key, admin_key: as a shell would write them (``$NAME``), so that no key is shown; no ``api_key``: none is
            needed.
    """

    url: str
    base: str
    adapters: tuple[str, ...]
    prompts: Mapping[str, str]
    source: str
    client_options: tuple[str, ...]
    api_key: str | None
    admin_key: str
    proxies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def text(self) -> str:
        """A request to the base and one to each of the first adapters, then the admin API and the command for it."""
        count = len(self.adapters)
        lines = [f"weft serves {self.base} with {count} adapter{'' if count == 1 else 's'} on {self.url}", ""]
        lines += map(self.completion, (self.base, *self.adapters[:MAX_EXAMPLES]))
        if count > MAX_EXAMPLES:
            lines.append(f"# and {count - MAX_EXAMPLES} more: {self._curl('/v1/models', None, self.api_key)}")
        if self.proxies:
            lines += ["", f"# steer it with the proxy models {', '.join(self.proxies)}"]
            lines += map(self.steered, [name for name, adapters in self.proxies.items() if adapters])
        lines += ["", "# load another adapter, by HTTP or on the command line"]
        lines.append(self._curl("/admin/adapters", {"id": "my-adapter", "source": self.source}, self.admin_key))
        lines.append(shlex.join(["weft", "adapter", "load", "my-adapter", self.source, *self.client_options]))
        return "\n".join(lines)

    def completion(self, model: str) -> str:
        """The command for one completion."""
        body = {"model": model, "prompt": self.prompts.get(model, "Hello"), "max_tokens": 64, "temperature": 0}
        return self._curl("/v1/completions", body, self.api_key)

    def steered(self, proxy: str) -> str:
        """The command for a completion that the first adapter of a proxy model steers."""
        expert = {"model": proxy, "adapter": self.proxies[proxy][0]}
        prompt = self.prompts.get(expert["adapter"], "Hello")
        body = {"model": self.base, "prompt": prompt, "max_tokens": 64, "temperature": 0}
        body["proxy"] = {"expert": expert, "anti_expert": {"model": proxy}, "alpha": 1.0}
        return self._curl("/v1/completions", body, self.api_key)

    def _curl(self, path: str, body: Mapping[str, object] | None, key: str | None) -> str:
        command = f"curl {shlex.quote(self.url + path)}"
        if key is not None:
            command += f' -H "Authorization: Bearer {key}"'
        if body is not None:
            text = shlex.quote(json.dumps(body, ensure_ascii=False))
            command += f" -H 'Content-Type: application/json' -d {text}"
        return command
