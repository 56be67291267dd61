"""Random inputs of every grouped Triton kernel, within what the engine uses, amid memory full of NaN.

What a kernel must not read is NaN: rows of pools that no slot has, and what lies between strided rows. The builders are
those of ``weft.kernels.testing``.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gpu.double import widened
from weft.adapters.overlap import overlap_for
from weft.kernels.activations import Activation
from weft.kernels.gated_prefix import Joint
from weft.kernels.grouped_bottleneck import Bottlenecks, Input
from weft.kernels.groups import RowGroups
from weft.kernels.mean_gates import Link
from weft.kernels.slot_rows import SlotRows
from weft.kernels.spans import Spans
from weft.kernels.sparse_rows import pack_rows, unpack_rows
from weft.kernels.testing import placed_rows, random_factors, random_rows, random_sparse

SLOTS = 6


@dataclass(frozen=True, eq=False)
class Case:
    """One call of a kernel and of its reference.

    Attributes:
        launch, reference: take ``args`` and ``options``; both write in place, or both return.
        written: of each argument that is written: its place in ``args``, and a bool mask of what is to be compared; all
            else of it must stay as it is, bit for bit. Empty: what is returned is compared.
        wide: ``args`` in fp64, where that is not a cast.
    """

    launch: Callable[..., Any]
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    written: tuple[tuple[int, Tensor], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    wide: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Draw:
    """Random sizes and tensors of one case; ``small``: for an interpreter."""

    rng: random.Random
    dtype: torch.dtype
    small: bool = False

    @property
    def seed(self) -> int:
        return self.rng.randrange(1 << 31)

    def width(self, most: int = 14336, multiple: int = 1) -> int:
        """As models have them, or odd."""
        if self.small:
            return multiple * self.rng.randint(1, max(1, 150 // multiple))
        usual = [w for w in (128, 1024, 2560, 4096, 9728, 14336) if w <= most and w % multiple == 0]
        odd = multiple * self.rng.randint(1, min(most, 5000) // multiple)
        return self.rng.choice([*usual, odd, odd])

    def slots(self) -> list[int]:
        """Of a decoding batch, or of some prompts with base rows between; there is a row that has something."""
        rows = self.rng.choice([1, 3, 17, 40] if self.small else [1, 2, 7, 16, 33, 64, 129, 256, 511])
        longest = self.rng.choice([1, 40])
        slots = [0, -1]
        while len(slots) < rows:
            slots += [self.rng.randint(-1, SLOTS - 1)] * self.rng.randint(1, longest)
        return slots[:rows]

    def counts(self, *choices: int) -> list[int]:
        """Of each slot; the first has something."""
        counts = [self.rng.choice(choices) for _ in range(SLOTS)]
        counts[0] = counts[0] or max(choices)
        return counts

    def rows(self, count: int, width: int) -> Tensor:
        """``[count, width]`` of unit scale, half of the time amid NaN."""
        values = torch.randn(count, width, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        if self.rng.random() < 0.5:
            return values
        buffer = torch.full((count, width + 8), float("nan"), dtype=self.dtype)
        buffer[:, 3 : 3 + width] = values
        return buffer[:, 3 : 3 + width]

    def pool(self, counts: list[int], width: int, scale: float = 1.0) -> SlotRows:
        return random_rows(counts, width, self.dtype, scale=scale, seed=self.seed)

    def groups(self, slots: list[int]) -> RowGroups:
        """Half of the time filled up, as those of captured steps are."""
        groups = RowGroups.build(slots, "cpu", block_rows=self.rng.choice([16, 32]))
        if self.rng.random() < 0.5:
            return groups
        order = torch.nn.functional.pad(groups.order, (0, self.rng.randint(1, 9)), value=-1)
        tiles = torch.nn.functional.pad(groups.tiles, (0, 0, 0, self.rng.randint(1, 9)))
        return replace(groups, order=order, tiles=tiles, _plans={})

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed))


def implementations(op: str, function: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The Triton version and the reference of an op; both folders are modules of their own."""
    launch, reference = (importlib.import_module(f"weft.kernels.{op}.{which}") for which in ("triton", "reference"))
    return getattr(launch, function), getattr(reference, function)


def _in_place(op: str, args: tuple[Any, ...], slots: list[int], counts: list[int]) -> Case:
    """A case of a grouped op that writes its first argument, in the rows whose slot has ``counts``."""
    touched = torch.tensor([slot >= 0 and counts[slot] > 0 for slot in slots])[:, None].expand_as(args[0])
    return Case(*implementations(op, op), args, ((0, touched),))


def lora(draw: Draw) -> Case:
    slots, ranks = draw.slots(), draw.counts(0, 1, 8, 16, 64, *(() if draw.small else (5, 128, 256)))
    width_in, width_out = draw.width(), draw.width()
    a, b = random_factors(ranks, width_in, width_out, draw.dtype, seed=draw.seed)
    args = draw.rows(len(slots), width_out), draw.rows(len(slots), width_in), a, b, draw.groups(slots)
    return _in_place("grouped_lora", args, slots, ranks)


def lora_in_halves(draw: Draw) -> Case:
    """The first half on a stream of its own, where there are streams."""
    return replace(lora(draw), launch=_in_halves)


def _in_halves(y: Tensor, x: Tensor, a: SlotRows, b: SlotRows, groups: RowGroups) -> None:
    kernels, overlap = importlib.import_module("weft.kernels.grouped_lora.triton"), overlap_for(y.device)
    planes = kernels.shrink(x, a, groups, overlap.fork() if overlap else None)
    x.clone()  # as the product of a linear, on the current stream
    if overlap:
        overlap.join()
    kernels.expand(y, planes, b, groups)


def lora_in_one(draw: Draw) -> Case:
    """One launch, also where it does not pay."""
    slots, ranks = draw.slots(), draw.counts(0, 1, 5, 8, 16, 64)
    width_in, width_out = draw.width(), draw.width()
    a, b = random_factors(ranks, width_in, width_out, draw.dtype, seed=draw.seed)
    args = draw.rows(len(slots), width_out), draw.rows(len(slots), width_in), a, b, draw.groups(slots)
    launch = importlib.import_module("weft.kernels.grouped_lora.fused").grouped_lora
    return replace(_in_place("grouped_lora", args, slots, ranks), launch=launch)


def affine(draw: Draw) -> Case:
    slots, width = draw.slots(), draw.width()
    gain, shift = draw.counts(0, 1), draw.counts(0, 1)
    args = draw.rows(len(slots), width), draw.pool(gain, width), draw.pool(shift, width), draw.groups(slots)
    return _in_place("grouped_affine", args, slots, [max(pair) for pair in zip(gain, shift, strict=True)])


def delta(draw: Draw) -> Case:
    slots, width_in, width_out = draw.slots(), draw.width(2560), draw.width(1024)
    counts = draw.counts(0, width_out)
    rows = draw.rows(len(slots), width_out), draw.rows(len(slots), width_in)
    args = *rows, draw.pool(counts, width_in, width_in**-0.5), draw.groups(slots)
    return _in_place("grouped_delta", args, slots, counts)


def rotate(draw: Draw) -> Case:
    width = draw.width(4096, 64) if not draw.small else 64
    slots, sizes = (
        draw.slots(),
        draw.counts(0, 4, 16, 32, *((64,) if draw.small else (64, 128 if width % 128 == 0 else 2))),
    )
    rows = draw.rows(len(slots), width), draw.rows(len(slots), width)
    args = *rows, draw.pool(sizes, width, max(sizes) ** -0.5), draw.groups(slots)
    return _in_place("grouped_rotate", args, slots, sizes)


def turn(draw: Draw) -> Case:
    width = draw.width(14336, 32)
    slots, distances = draw.slots(), draw.counts(0, 1, 4, 16)
    counts = [2 * (distance > 0) for distance in distances]
    numbers = torch.tensor(distances, dtype=torch.int32)
    args = draw.rows(len(slots), width), draw.pool(counts, width), numbers, draw.groups(slots)
    return _in_place("grouped_turn", args, slots, counts)


def sparse(draw: Draw) -> Case:
    slots, width_in, width_out = draw.slots(), draw.width(4096, 2), draw.width(1024)
    densities = [draw.rng.choice([0.0, 0.004, 0.05, 0.4]) for _ in range(SLOTS)]
    rows = random_sparse(densities, width_in, width_out, draw.dtype, seed=draw.seed)
    y, x, groups = draw.rows(len(slots), width_out), draw.rows(len(slots), width_in), draw.groups(slots)
    own = [
        _sparse_in_double(rows.of(slot), width_out, width_in)
        if rows.host_counts[slot]
        else torch.zeros(0, width_in, dtype=torch.float64)
        for slot in range(SLOTS)
    ]
    wide = placed_rows(own, width_in, torch.float64, torch.Generator().manual_seed(0))
    case = _in_place("grouped_sparse", (y, x, rows, groups), slots, list(rows.host_counts))
    # The integers among the values are no numbers to cast.
    return Case(case.launch, case.reference, case.args, case.written, wide=(widened(y), widened(x), wide, groups))


def _sparse_in_double(rows: Tensor, outputs: int, width: int) -> Tensor:
    starts, columns, values = unpack_rows(rows, outputs)
    return pack_rows(starts, columns, values.double(), width)


def bottleneck(draw: Draw) -> Case:
    slots, units, width = draw.slots(), draw.counts(0, 1, 7, 48, 130), draw.width(4096)
    kinds = [(draw.rng.choice(list(Input)), draw.rng.choice(list(Activation))) for _ in range(SLOTS)]
    parts = Bottlenecks(
        draw.pool(units, width, width**-0.5),
        draw.pool([-(-count // width) for count in units], width),
        draw.pool(units, width, max(units) ** -0.5),
        draw.pool([int(count > 0) for count in units], width),
        torch.tensor([kind[0] for kind in kinds], dtype=torch.int32),
        torch.tensor([kind[1] for kind in kinds], dtype=torch.int32),
        tuple(kind if count else None for kind, count in zip(kinds, units, strict=True)),
    )
    gates = draw.normal(len(slots), 2).sigmoid() if draw.rng.random() < 0.5 else None
    args = draw.rows(len(slots), width), draw.rows(len(slots), width), parts, draw.groups(slots), gates
    return _in_place("grouped_bottleneck", args, slots, units)


def routed(draw: Draw) -> Case:
    """A prototype is 1 at one column and 0 elsewhere: which experts are chosen does not depend on rounding."""
    slots, experts, rank = draw.slots(), draw.counts(0, 1, 3, 20), draw.rng.choice([1, 4, 16])
    width_in, width_out = sum(experts) + draw.width(4096), draw.width(4096)
    a, b = random_factors([n * rank for n in experts], width_in, width_out, draw.dtype, seed=draw.seed)
    prototypes = draw.pool(experts, width_in)
    used = torch.cat([prototypes.table[slot, :n] for slot, n in enumerate(experts)]).long()
    prototypes.pool[used] = torch.nn.functional.one_hot(torch.arange(len(used)), width_in).to(draw.dtype)
    x = draw.rows(len(slots), width_in)
    # All apart by more than an error of fp16, in an order of each row's own.
    order = torch.stack([torch.randperm(len(used)) for _ in slots])
    x[:, : len(used)] = (0.1 + 2.0 * order / len(used)).to(draw.dtype)
    top_k = torch.tensor([min(draw.rng.randint(1, 5), n) for n in experts], dtype=torch.int32)
    args = draw.rows(len(slots), width_out), x, a, b, prototypes, top_k, draw.groups(slots)
    return _in_place("routed_lora", args, slots, experts)


def gated(draw: Draw) -> Case:
    slots, gates, rank = draw.slots(), draw.counts(0, 1, 3, 20), draw.rng.choice([1, 4, 16])
    width_in, width_out = 32 + draw.width(4096), draw.width(4096)
    ups = [n * rank for n in gates]
    downs = [rank if n and draw.rng.random() < 0.5 else up for n, up in zip(gates, ups, strict=True)]
    args = (
        draw.rows(len(slots), width_out),
        draw.rows(len(slots), width_in),
        draw.pool(downs, width_in, width_in**-0.5),
        draw.pool(ups, width_out, max(ups) ** -0.5),
        draw.pool([n + 1 if n else 0 for n in gates], width_in),
        draw.normal(len(slots), max(gates)).sigmoid(),
        draw.groups(slots),
    )
    return _in_place("gated_lora", args, slots, gates)


def gates(draw: Draw) -> Case:
    """Spans of tokens, each of one slot."""
    lengths = [draw.rng.choice([1, 1, 2, 9, 70]) for _ in range(draw.rng.randint(1, 4 if draw.small else 12))]
    slots = [slot for length in lengths for slot in [draw.rng.randint(-1, SLOTS - 1)] * length]
    counts, width = draw.counts(0, 1, 2, 20), 64 + draw.width(4096)
    links = torch.tensor([draw.rng.choice(list(Link)) for _ in counts], dtype=torch.int32)
    args = (
        draw.rows(len(slots), width),
        draw.pool([n + 1 if n else 0 for n in counts], width, width**-0.5),
        links,
        Spans.build(lengths, range(len(lengths)), "cpu"),
        draw.groups(slots),
    )
    return Case(*implementations("mean_gates", "mean_gates"), args)


def prefix(draw: Draw) -> Case:
    slots, counts = draw.slots(), draw.counts(0, 1, 5, 32, 70)
    kv_heads, group = draw.rng.randint(1, 3 if draw.small else 8), draw.rng.randint(1, 4)
    d = draw.rng.choice([8, 20] if draw.small else [64, 80, 128])
    heads = kv_heads * group
    q = draw.normal(heads, len(slots), d).to(draw.dtype).transpose(0, 1)
    keys, values = draw.pool(counts, kv_heads * d, d**-0.5), draw.pool(counts, kv_heads * d)
    joint = None
    if draw.rng.random() < 0.5:
        joint = Joint(2 * draw.normal(len(slots), heads), draw.normal(len(slots), 2).sigmoid(), 0.7)
    args = draw.rows(len(slots), heads * d), q, keys, values, draw.groups(slots), joint
    return _in_place("gated_prefix", args, slots, counts)
