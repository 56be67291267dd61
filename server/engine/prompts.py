"""The adapters' own prompts: keys and values computed once per adapter, in pages that all its requests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weft.adapters.forms import PrefixKV, Prompt, SoftPrompt
from weft.server.engine.blocks import BlockPool
from weft.server.engine.request import EngineRequest, SamplingParams
from weft.server.engine.sequence import Sequence


@dataclass
class _Entry:
    """The pages of one adapter's prompt.

    Attributes:
        users: running rows whose first keys and values lie in the pages.
        maker: computes the pages of a soft prompt; None once that is done.
        unwritten: the pages of a prefix are still to be written.
    """

    prompt: Prompt
    blocks: list[int]
    users: int = 0
    maker: Sequence | None = None
    unwritten: bool = False
    used: int = 0

    @property
    def ready(self) -> bool:
        return self.maker is None and not self.unwritten


class PromptPages:
    """Which adapters' prompts are in the KV cache.

    A prompt stands in front of everything and attention is causal, so its keys and values do not depend on the
    request. Prompts nobody uses stay until their pages are needed.

    Args:
        lane: which model they are for, as the scheduler counts them.
    """

    def __init__(self, blocks: BlockPool, block_size: int, lane: int = 0) -> None:
        self._blocks = blocks
        self._block_size = block_size
        self._lane = lane
        self._entries: dict[str, _Entry] = {}
        self._clock = 0
        self.tokens_computed = 0

    def acquire(self, version: str, prompt: Prompt, *, urgent: bool = True) -> list[int] | None:
        """The pages of an adapter's prompt for one more running row; None while they are not computed.

        The last page is not full if the prompt's length is no multiple of the page size.

        Args:
            urgent: prompts that nobody uses may make room for this one.
        """
        entry = self._entries.get(version)
        if entry is None:
            self._start(version, prompt, urgent)
            return None
        if not entry.ready:
            return None
        self._clock += 1
        entry.used = self._clock
        entry.users += 1
        return entry.blocks

    def release(self, version: str) -> None:
        """One running row less."""
        self._entries[version].users -= 1

    def _start(self, version: str, prompt: Prompt, urgent: bool) -> None:
        blocks = self._blocks.allocate(-(-prompt.length // self._block_size))
        while blocks is None and urgent and self.evict():
            blocks = self._blocks.allocate(-(-prompt.length // self._block_size))
        if blocks is None:
            return  # tried again when the request is looked at next
        entry = _Entry(prompt, blocks, unwritten=isinstance(prompt, PrefixKV))
        if isinstance(prompt, SoftPrompt):
            request = EngineRequest(f"prompt of {version}", [0] * prompt.length, SamplingParams(max_tokens=1))
            entry.maker = Sequence.start(request, b"", prompt.length)
            entry.maker.lane = self._lane
            entry.maker.embeddings = prompt.embeddings
            entry.maker.blocks = blocks
        self._entries[version] = entry

    def makers(self) -> list[Sequence]:
        """Sequences of virtual tokens that are still to be computed."""
        return [entry.maker for entry in self._entries.values() if entry.maker is not None]

    def computed(self, maker: Sequence, tokens: int) -> None:
        """Some more tokens of a maker are in its pages."""
        self.tokens_computed += tokens
        if not maker.remaining:
            for entry in self._entries.values():
                if entry.maker is maker:
                    entry.maker = None

    def take_unwritten(self) -> list[tuple[list[int], PrefixKV]]:
        """Prefixes and the pages they must be written to before the next forward pass."""
        writes = []
        for entry in self._entries.values():
            if entry.unwritten and isinstance(entry.prompt, PrefixKV):
                writes.append((entry.blocks, entry.prompt))
                entry.unwritten = False
        return writes

    def evict(self) -> bool:
        """Give back the pages of the least recently used prompt that no row uses; False if there is none."""
        idle = [version for version, entry in self._entries.items() if entry.ready and not entry.users]
        if not idle:
            return False
        self._drop(min(idle, key=lambda version: self._entries[version].used))
        return True

    def prune(self, known: Callable[[str], bool]) -> None:
        """Give back the pages of adapters that are gone."""
        for version in [v for v, e in self._entries.items() if not known(v) and not e.users]:
            self._drop(version)

    def _drop(self, version: str) -> None:
        blocks = self._entries.pop(version).blocks
        self._blocks.forget(blocks)
        self._blocks.release(blocks)

    @property
    def held(self) -> list[list[int]]:
        """The pages of every prompt, for the account of references."""
        return [entry.blocks for entry in self._entries.values()]

    def users(self, version: str) -> int:
        """Running rows on an adapter's prompt."""
        return self._entries[version].users if version in self._entries else 0
