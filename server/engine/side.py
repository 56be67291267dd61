"""Runs the side networks of adapters beside the base, on pages of their own keys and values.

The keys and values of a token lie at the same page and place as the base's, in tensors of their own. A page belongs to
one adapter's identity, so whatever happens to the base's pages (sharing, eviction, preemption) holds for these too, and
networks whose layers are of one shape share the tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.functional import linear

from weft.adapters.backbone import Stack, move_buffers
from weft.adapters.base import Base
from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterTooLarge, AdapterUnsupported
from weft.adapters.forms import CompiledAdapter
from weft.adapters.side import SideNetwork, SideShape, SideSizes
from weft.adapters.side_sites import ActiveSide, SideRows
from weft.adapters.site import ActiveRows
from weft.adapters.slots import SlotPool
from weft.kernels.groups import RowGroups, to_device
from weft.kernels.paged_attention import AttentionRows, backends
from weft.server.engine.attention import PROBE, AttentionContext
from weft.server.engine.batch import Batch
from weft.server.engine.kv_cache import KVCache, bytes_per_block

Layer = tuple[tuple[int, int, int], int]
"""Of a network's keys and values: ``(kv_heads, key head_dim, value head_dim)``, and the how manieth of that shape."""


class SideNetworks:
    """The side networks that adapters may have, and their keys and values.

    Args:
        cache: the base's, which has the pages.
        memory: bytes that the keys and values of all side networks together may take.
        active: what the hooks of the base's layers look at.
        embed: the base's token embedding, adapters and all.
    """

    def __init__(
        self,
        base: Base,
        pool: SlotPool,
        cache: KVCache,
        *,
        memory: int,
        active: ActiveSide,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._base = base
        self._pool = pool
        self._cache = cache
        self._memory = memory
        self._active = active
        self._embed = embed
        self._stacks: dict[SideSizes, tuple[Stack, tuple[Layer, ...]]] = {}
        self._caches: dict[Layer, KVCache] = {}
        self._users: dict[str, SideSizes] = {}
        self._lock = threading.Lock()

    def admit(self, adapter: CompiledAdapter) -> None:
        """Make room for the keys and values of a registered adapter's side network, if it has one. Any thread.

        Raises:
            AdapterTooLarge: there is no room. AdapterUnsupported: the network does not run.
        """
        network = next((forms.network for forms in adapter.sites.values() if forms.network is not None), None)
        if network is None:
            return
        known = self._stacks.get(network.sizes) or self._make(network)  # takes a while, in which nobody is held up
        with self._lock:
            self._caches |= self._new_caches([layer for layer in known[1] if layer not in self._caches])
            self._stacks[network.sizes] = known
            self._users[adapter.version] = network.sizes

    def prune(self, knows: Callable[[str], bool]) -> bool:
        """Give back the keys and values that no registered adapter has any more; True if there were such.

        Those of adapters that merely lost their slot stay: their pages can be found again.
        """
        if not self._users:
            return False
        with self._lock:
            self._users = {version: sizes for version, sizes in self._users.items() if knows(version)}
            for sizes in self._stacks.keys() - self._users.values():
                del self._stacks[sizes]
            unused = self._caches.keys() - {layer for _, layers in self._stacks.values() for layer in layers}
            for layer in unused:
                del self._caches[layer]
            return bool(unused)

    def _make(self, network: SideNetwork) -> tuple[Stack, tuple[Layer, ...]]:
        shapes = self._probe(network)
        layers = tuple((shape, shapes[:index].count(shape)) for index, shape in enumerate(shapes))
        assert self._base.backbone is not None, "the network was made from it"
        stack = self._base.backbone.smaller(network.sizes, self._base.dtype)
        move_buffers(stack.module, self._pool.device)
        return stack, layers

    def _probe(self, network: SideNetwork) -> list[tuple[int, int, int]]:
        """What arrives at the attention of each layer, seen in a pass of one token."""
        assert self._base.backbone is not None, "the network was made from it"
        stack = self._base.backbone.smaller(network.sizes, self._base.dtype)
        stack.module.set_attn_implementation(PROBE)
        seen: dict[int, backends.Layer] = {}
        weights = dict(zip(network.names, network.weights, strict=True))
        try:
            zero = torch.zeros(1, 1, dtype=torch.long)
            vectors = torch.zeros(1, 1, self._base.embedding.out_features if self._base.embedding else 0)
            given = {"input_ids": zero} if network.sizes.embeds else {"inputs_embeds": vectors.to(self._base.dtype)}
            _state(stack, weights, given, zero, seen)
        except Exception as error:  # whatever a class may raise for sizes that it was built with
            raise AdapterUnsupported(
                f"the adapter's side network does not run: {show(str(error))}", param="peft_type"
            ) from error
        if sorted(seen) != list(range(network.sizes.layers)):
            raise AdapterUnsupported("not all layers of the adapter's side network attend", param="peft_type")
        return [seen[layer].cache_shape for layer in sorted(seen)]

    def _new_caches(self, layers: list[Layer]) -> dict[Layer, KVCache]:
        size, blocks, dtype = self._cache.block_size, self._cache.num_blocks, self._base.dtype
        taken, needed = (
            bytes_per_block([shape for shape, _ in own], size, dtype) * blocks for own in (self._caches, layers)
        )
        problem = (
            f"the keys and values of the adapter's side network need {needed} more bytes; side networks may have "
            f"{self._memory}, as much as adapters, and have {taken}; raise --adapter-memory or lower --kv-cache-memory"
        )
        if taken + needed > self._memory:
            raise AdapterTooLarge(problem, param="adapter_memory")
        try:
            device = self._pool.device
            return {
                layer: KVCache([layer[0]], num_blocks=blocks, block_size=size, dtype=dtype, device=device)
                for layer in layers
            }
        except torch.OutOfMemoryError as error:
            raise AdapterTooLarge(f"{problem}; the device has no more", param="adapter_memory") from error

    def tensors(self) -> list[torch.Tensor]:
        """All keys and values there are, ``[pages, ...]`` each."""
        return [tensor for cache in list(self._caches.values()) for tensor in (*cache.keys, *cache.values)]

    def begin(self, batch: Batch) -> None:
        """Make the states of the batch's tokens, one network after the other; the base's forward pass is next."""
        networks = list(self._pool.networks(batch.tokens.active))
        if not networks:
            return
        device = self._pool.device
        starts = np.cumsum([0, *batch.attention.query_lens])
        vectors: torch.Tensor | None = None
        places, slots, states = [], [], []
        for slot, shape, rows in networks:
            mine = [row for row, own in enumerate(batch.slots) if own == slot]
            tokens = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in mine])
            index = to_device(tokens, device)
            if shape.sizes.embeds:
                given = {"input_ids": batch.input_ids[:, index]}
            else:
                vectors = self._embed(batch.input_ids) if vectors is None else vectors
                given = {"inputs_embeds": vectors[:, index]}
            states.append(self._run(shape, rows, given, _rows_of(batch, mine, self._cache.block_size, device)))
            places.append(index)
            slots += [slot] * len(tokens)
        self._active.rows = SideRows(torch.cat(places), RowGroups.build(slots, device), torch.cat(states))

    def _run(
        self, shape: SideShape, rows: torch.Tensor, given: dict[str, torch.Tensor], attention: AttentionRows
    ) -> torch.Tensor:
        stack, layers = self._stacks[shape.sizes]
        caches = [self._caches[layer] for layer in layers]
        keys, values = [cache.keys[0] for cache in caches], [cache.values[0] for cache in caches]
        context = AttentionContext(attention, keys, values, ActiveRows())
        return _state(stack, shape.weights(rows), given, attention.positions.unsqueeze(0), context)

    def end(self) -> None:
        """The base's forward pass is over."""
        self._active.rows = None


@torch.inference_mode()
def _state(
    stack: Stack,
    weights: dict[str, torch.Tensor],
    given: dict[str, torch.Tensor],
    position_ids: torch.Tensor,
    context: object,
) -> torch.Tensor:
    """The state ``[T, width]`` that a network makes of T tokens, by ids or vectors.

    Args:
        context: for the attention.
    """
    own = {name: weight for name, weight in weights.items() if name}
    arguments = {**given, "position_ids": position_ids, "use_cache": False, "weft": context}
    output: Any = functional_call(stack.module, own, (), arguments)
    state: torch.Tensor = output.last_hidden_state[0]
    return linear(state, weights[""]) if "" in weights else state


def _rows_of(batch: Batch, rows: list[int], page_size: int, device: torch.device) -> AttentionRows:
    """Some rows of the batch, as a batch of their own."""
    whole = batch.attention
    tables = [whole.page_tables[row].tolist() for row in rows]
    lens = [whole.query_lens[row] for row in rows], [whole.total_lens[row] for row in rows]
    return AttentionRows.build(*lens, tables, page_size, device)
