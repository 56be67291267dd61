"""Decode steps as CUDA graphs: the launches of a step are recorded once and replayed by one call.

A graph is recorded for a number of rows from a ladder, and for a number of tiles of adapters' rows. Its kernels read
which rows, slots, pages and ranks there are from buffers that stay where they are; before each replay the step's own
metadata is copied there, on the device. Rows that only fill a graph up are rows of the base with one token, whose keys
and values go to a page that no request has. So any mixture of adapters replays the same graph, until an adapter comes
that has something at a place of the model where none had.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from weft.adapters.overlap import Overlap
from weft.adapters.parts import Part
from weft.adapters.slots import SlotPool
from weft.kernels.groups import RowGroups
from weft.kernels.paged_attention import AttentionRows
from weft.kernels.slot_rows import SlotRows
from weft.server.engine.batch import Batch
from weft.server.engine.model import ModelRunner

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Makes of a step one that does the same on the same memory each time it is called."""

CAPTURED_PARTS = frozenset(
    (
        *(Part.A, Part.B, Part.GAIN_IN, Part.GAIN_OUT, Part.SHIFT, Part.ROTATE_IN, Part.TURN, Part.DELTA, Part.SPARSE),
        *(Part.EXPERT_A, Part.EXPERT_B, Part.PROTOTYPES),
    )
)
"""What a linear's site does by launches whose grids depend on the padded sizes alone. All else asks the host which rows
there are; steps with such adapters run eagerly."""
MAX_GRAPHS = 96


def capture_for(device: torch.device) -> Capture | None:
    """What records steps on a device; None where nothing can."""
    if device.type != "cuda":
        return None
    return partial(_capture, torch.cuda.graph_pool_handle())


def _capture(memory: Any, step: Step) -> Step:
    """A CUDA graph of a step. All graphs share ``memory``: no two run at once, and nothing in it outlives a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before anything is recorded
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Another thread may be bringing an adapter to the device meanwhile.
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        step()
    return graph.replay


def ladder(most: int) -> list[int]:
    """Numbers of rows that graphs are recorded for, up to ``most``: about an eighth of a batch is filled up at worst,
    where it is not small."""
    sizes, step = [1, 2, 4, 8], 8
    while sizes[-1] < most:
        if sizes[-1] >= 16 * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return sorted({size for size in sizes if size < most} | {most})


@dataclass(frozen=True)
class _Graph:
    """A recorded step, and the batch on the buffers that it reads, which must live as long."""

    batch: Batch
    replay: Step


class _Buffers:
    """The tensors of a batch of at most ``rows`` rows of one token, and what fills them up behind the step's own."""

    def __init__(
        self, rows: int, pages: int, vocab: int, spare_page: int, page_size: int, device: torch.device
    ) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.ids = full(0, rows, dtype=torch.int64)
        self.position_ids = full(0, rows, dtype=torch.int64)
        self.positions = full(0, rows, dtype=torch.int64)
        self.slot_mapping = full(spare_page * page_size, rows, dtype=torch.int64)
        self.context_lens = full(1, rows)
        self.page_table = full(spare_page, rows, pages)
        self.slots = full(-1, rows)
        self.order = full(-1, rows)
        self.tiles = full(0, rows, 3)
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.indices = torch.arange(rows, device=device)
        self.logits = torch.empty(rows, vocab, dtype=torch.float32, device=device)
        self.page_size = page_size
        self._filling = {name: tensor.clone() for name, tensor in self._written().items()}

    def _written(self) -> dict[str, torch.Tensor]:
        """What a step writes; a row of the step is a row of each, but for order and tiles."""
        names = ("ids", "position_ids", "positions", "slot_mapping", "context_lens", "page_table", "slots", "order")
        return {name: getattr(self, name) for name in (*names, "tiles")}

    def fill(self, batch: Batch, rows: int, tiles: int) -> None:
        """Copy a step's metadata in, and the filling behind it up to ``rows`` rows and ``tiles`` tiles."""
        attention, groups = batch.attention, batch.tokens
        own = {
            "ids": batch.input_ids[0],
            "position_ids": batch.position_ids[0],
            "positions": attention.positions,
            "slot_mapping": attention.slot_mapping,
            "context_lens": attention.context_lens,
            "page_table": attention.page_table,
            "slots": groups.slots,
            "order": groups.order,
            "tiles": groups.tiles,
        }
        for name, source in own.items():
            target, filling = getattr(self, name), self._filling[name]
            count, upto = len(source), tiles if name == "tiles" else rows
            if name == "page_table":  # what lies behind a row's pages is never read
                target[:count, : source.shape[1]].copy_(source)
                target[count:upto, :1].copy_(filling[count:upto, :1])
                continue
            target[:count].copy_(source)
            target[count:upto].copy_(filling[count:upto])

    def batch(self, rows: int, tiles: int, active: tuple[int, ...]) -> Batch:
        """A batch of ``rows`` decoding rows on these buffers.

        Args:
            active: slots that its rows may have.
        """
        ones = (1,) * rows
        attention = AttentionRows(
            self.query_starts[: rows + 1],
            self.context_lens[:rows],
            self.page_table[:rows],
            self.slot_mapping[:rows],
            self.positions[:rows],
            ones,
            ones,
            np.zeros((rows, 0), dtype=np.int32),
            self.page_size,
        )
        groups = RowGroups(self.slots[:rows], self.order[:rows], self.tiles[:tiles], (), active, rows, 16)
        return Batch(
            input_ids=self.ids[:rows].unsqueeze(0),
            position_ids=self.position_ids[:rows].unsqueeze(0),
            logit_indices=self.indices[:rows],
            wanted=[],
            attention=attention,
            tokens=groups,
            logits=groups,
            slots=(-1,) * rows,
            num_adapters=len(active),
            copies=[],
            embeddings=None,
            spans=None,
        )


class GraphRunner:
    """Runs the decode steps of a ``ModelRunner`` as graphs, where it can.

    Args:
        linears: paths of the base's linears, where adapters' parts are captured.
        max_rows: of a batch. max_len: tokens of a row. vocab: width of the logits.
        capture: records a step.
        overlap: for what may run beside the products of this model alone; None: nothing does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: SlotPool,
        linears: frozenset[str],
        *,
        max_rows: int,
        max_len: int,
        vocab: int,
        capture: Capture,
        overlap: Overlap | None,
    ) -> None:
        cache = runner.cache
        pages = -(-max_len // cache.block_size)
        self._runner = runner
        self._pool = pool
        self._linears = linears
        self._ladder = ladder(max_rows)
        self._capture = capture
        self._overlap = overlap
        self._buffers = _Buffers(max_rows, pages, vocab, cache.num_blocks, cache.block_size, runner.device)
        self._graphs: OrderedDict[tuple[int, int, int | None], _Graph] = OrderedDict()
        self._seen = -1
        self._slots: tuple[int, ...] = ()
        self._structure = 0
        self._structures: dict[Hashable, int] = {}
        self.failed: str | None = None

    def serves(self, batch: Batch) -> bool:
        """Whether a batch is a decode step that a graph does: a token for each row, all of which get logits."""
        rows = batch.input_ids.shape[1]
        plain = not batch.copies and batch.embeddings is None and batch.spans is None
        if self.failed is not None or not plain or not rows == len(batch.slots) == len(batch.logit_indices):
            return False
        if rows > self._ladder[-1] or batch.attention.page_table.shape[1] > self._buffers.page_table.shape[1]:
            return False
        self._look_at_slots()
        return set(batch.tokens.active) <= set(self._slots)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """As ``ModelRunner.forward``, of a batch that this one serves. The logits are valid until the next call.

        A step that cannot be recorded is run eagerly, and so are all after it; a warning says why.
        """
        count = batch.input_ids.shape[1]
        rows = next(size for size in self._ladder if size >= count)
        tiles = 0 if not batch.tokens.num_tiles else min(rows, 1 << (batch.tokens.num_tiles - 1).bit_length())
        self._buffers.fill(batch, rows, tiles)
        key = (rows, tiles, self._structure if tiles else None)
        graph = self._graphs.get(key)
        if graph is None:
            try:
                graph = self._record(rows, tiles)
            except Exception as error:  # whatever a model's own code may do that no graph can hold
                self.failed = f"{type(error).__name__}: {error}"
                warnings.warn(f"decode steps run without CUDA graphs: {self.failed}", RuntimeWarning, stacklevel=2)
                return self._runner.forward(batch)
            self._graphs[key] = graph
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.replay()
        return self._buffers.logits[:count]

    def _record(self, rows: int, tiles: int) -> _Graph:
        batch = self._buffers.batch(rows, tiles, self._slots if tiles else ())
        target = self._buffers.logits[:rows]
        return _Graph(batch, self._capture(lambda: _into(target, self._runner.compute(batch, self._overlap))))

    def _look_at_slots(self) -> None:
        """Which slots' adapters are captured, and what the launches of a step would be for them."""
        if self._seen == sum(self._pool.generations):
            return
        self._seen = sum(self._pool.generations)
        places = {slot: self._pool.places(slot) for slot in range(self._pool.num_slots)}
        self._slots = tuple(
            slot
            for slot, own in places.items()
            if all(path in self._linears and part in CAPTURED_PARTS for path, part in own)
        )
        tables = {place: self._pool.rows(*place) for place in sorted({p for s in self._slots for p in places[s]})}
        launched = tuple(
            (place, rows.table.data_ptr(), rows.table.stride(0), rows.counts.data_ptr(), _largest(place[1], rows))
            for place, rows in tables.items()
            if rows is not None and rows.used_by(self._slots)
        )
        self._structure = self._structures.setdefault(launched, len(self._structures))


def _into(target: torch.Tensor, logits: torch.Tensor) -> None:
    target.copy_(logits)


def _largest(part: Part, rows: SlotRows) -> int:
    """What a launch knows of the sizes of all slots together."""
    return rows.padded_count if part in (Part.A, Part.B) else rows.max_count
