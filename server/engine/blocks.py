"""Pages of the KV cache as the scheduler sees them: numbers, reference counts and what their content is.

The identity of a cached block is a digest over (model, adapter version or composition, cache salt, token ids), never
over names: two adapters, two versions or two salts can never share a block, two requests on the base always can.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def root_key(fingerprint: str, adapter: str | None, salt: str | None) -> bytes:
    """The key every block of such a request descends from.

    Each part is length-prefixed and tagged, so that no adapter, salt or absence of one can be mistaken for another.
    """
    digest = hashlib.sha256(b"weft-kv-v1")
    for tag, part in ((b"model", fingerprint), (b"adapter", adapter), (b"salt", salt)):
        if part is not None:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(b"%s:%d:" % (tag, len(data)) + data)
    return digest.digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block holding ``tokens``, after the block (or root) with key ``parent``."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


def activated_key(parent: bytes, root: bytes, activation: int) -> bytes:
    """What the block descends from in which an adapter starts to work, after blocks of the base.

    The same tokens with the adapter on from another token on are another content, so its place is part of the key.

    Args:
        root: of the adapter. activation: the first token it works on.
    """
    return hashlib.sha256(b"weft-kv-activation" + parent + root + activation.to_bytes(8, "little")).digest()


class BlockPool:
    """Reference-counted pages with an index by content.

    A page nobody refers to is *free*; it keeps its key, and can be found again, until it is handed out for new
    content. Free pages without a key are handed out first, then the least recently freed.

    Invariant: a page is in ``_free`` exactly when its reference count is 0.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def exclusive(self, blocks: Sequence[int]) -> list[int]:
        """Those of ``blocks`` that have a single reference."""
        return [block for block in blocks if self._refs[block] == 1]

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each, or None when there are not as many."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached prefix of ``keys``, without taking references."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more reference to each page."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each page of a row, in the row's order."""
        # The tail is freed first, so that the head of a prefix, which more requests share, is evicted last.
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._keys:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Make a full page findable. The first page with a key stays the findable one."""
        if key not in self._by_key:
            self._forget(block)
            self._keys[block] = key
            self._by_key[key] = block

    def forget(self, blocks: Sequence[int]) -> None:
        """Make the pages unfindable, for content that must not be used again."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]

    def check_integrity(self, holders: Sequence[Sequence[int]]) -> None:
        """Every reference belongs to one of ``holders`` (page lists of live rows), and the indices agree.

        Raises:
            AssertionError: saying what does not hold.
        """
        counted = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counted[block] += 1
        wrong = [(b, r, c) for b, (r, c) in enumerate(zip(self._refs, counted, strict=True)) if r != c]
        assert not wrong, f"(page, references, holders) that disagree: {wrong[:8]}"
        free = {b for b, r in enumerate(self._refs) if r == 0}
        assert free == set(self._free), f"free list off by {free ^ set(self._free)}"
        assert self._by_key == {key: block for block, key in self._keys.items()}, "the content index is torn"
