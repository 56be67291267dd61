"""The peers' LoRA kernels, from files given by path: nothing of theirs is in this repository.

Their files import the rest of their project, of which the kernels need next to nothing: modules that are not in the
given folder are stood in for by inert ones.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from weft.kernels.groups import RowGroups
from weft.kernels.slot_rows import SlotRows

Run = Callable[[Tensor], Tensor]
"""Adds the updates to y ``[T, out]`` and returns where they are."""


@dataclass(frozen=True)
class Problem:
    """One launch of grouped LoRA: ``y += B A x`` by row.

    Attributes:
        slots: of each row. ranks: of each slot.
    """

    y: Tensor
    x: Tensor
    a: SlotRows
    b: SlotRows
    groups: RowGroups
    slots: tuple[int, ...]
    ranks: tuple[int, ...]

    def padded(self) -> tuple[Tensor, Tensor]:
        """A ``[slots, largest rank, in]`` and B ``[slots, out, largest rank]``, zero beyond a slot's rank."""
        widest = max(self.ranks)
        a = self.x.new_zeros(len(self.ranks), widest, self.x.shape[1])
        b = self.x.new_zeros(len(self.ranks), self.y.shape[1], widest)
        for slot, rank in enumerate(self.ranks):
            a[slot, :rank], b[slot, :, :rank] = self.a.of(slot), self.b.of(slot).T
        return a, b


class Peer(Protocol):
    """Another project's kernels."""

    name: str

    def prepare(self, problem: Problem) -> Run:
        """Whatever they do once for a step, or once for the adapters; what is returned is timed."""

    def forget(self) -> None:
        """What they keep by address is void: the next problem may lie at the same."""


class Vllm:
    """vLLM's ``lora_shrink`` and ``lora_expand``.

    Args:
        folder: ``vllm/lora/ops/triton_ops`` of a checkout.
    """

    name = "vllm"

    def __init__(self, folder: Path) -> None:
        self._package = stand_in("vllm", folder)
        self._shrink = _load(self._package, "lora_shrink_op", "lora_shrink")
        self._expand = _load(self._package, "lora_expand_op", "lora_expand")
        self._meta = _load(self._package, "lora_kernel_metadata", "LoRAKernelMeta")

    def prepare(self, problem: Problem) -> Run:
        x, rows = problem.x, len(problem.slots)
        meta = self._meta.make(len(problem.ranks), rows, x.device)
        meta.prepare_tensors(torch.tensor(problem.slots, dtype=torch.int32, device=x.device))
        # Newer versions ask whether launches shall be specialised to the number of active adapters.
        further = [False] * (len(inspect.signature(meta.meta_args).parameters) - 1)
        given = meta.meta_args(rows, *further)
        a, b = problem.padded()
        between = torch.empty(1, rows, a.shape[1], dtype=torch.float32, device=x.device)

        def run(y: Tensor) -> Tensor:
            self._shrink(x, [a], between, *given, 1.0)
            self._expand(between, [b], y, *given, offset_start=0, add_inputs=True)
            return y

        return run

    def forget(self) -> None:
        for module in [m for name, m in sys.modules.items() if name.startswith(self._package)]:
            for name, value in vars(module).items():
                if name.endswith("_PTR_DICT"):
                    value.clear()


class Sglang:
    """SGLang's chunked SGMV.

    Args:
        folder: ``python/sglang/srt/lora/triton_ops`` of a checkout, or ``sglang/kernels/ops/lora/dense`` since 0.5.23.
    """

    name = "sglang"

    def __init__(self, folder: Path) -> None:
        package = stand_in("sglang", folder)
        self._shrink = _load(package, "chunked_sgmv_shrink", "chunked_sgmv_lora_shrink_forward")
        self._expand = _load(package, "chunked_sgmv_expand", "chunked_sgmv_lora_expand_forward")

    def prepare(self, problem: Problem) -> Run:
        a, b = problem.padded()
        batch = _segments(problem)
        offsets = torch.tensor([0, b.shape[1]], dtype=torch.int32, device=a.device)
        wanted = inspect.signature(self._expand).parameters
        given = {"slice_offsets": offsets, "max_slice_size": b.shape[1]}
        given = {name: value for name, value in given.items() if name in wanted}

        def run(y: Tensor) -> Tensor:
            between = self._shrink(problem.x, a, batch, 1)
            result: Tensor = self._expand(x=between, weights=b, batch_info=batch, base_output=y, **given)
            return result

        return run

    def forget(self) -> None:
        """It keeps nothing."""


def _segments(problem: Problem) -> types.SimpleNamespace:
    """Chunks of rows of one adapter, as SGLang's backend cuts them: of 16 rows in small batches, of 128 in large."""
    count, device = len(problem.slots), problem.x.device
    chunk = 16 if count < 64 else 32 if count < 256 else 128
    order = sorted(range(count), key=lambda row: problem.slots[row])
    starts, owners = [], []
    for at, row in enumerate(order):
        slot = problem.slots[row]
        if not owners or owners[-1] != slot or at - starts[-1] == chunk:
            starts.append(at)
            owners.append(slot)

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    return types.SimpleNamespace(
        bs=count,
        num_segments=len(owners),
        max_len=chunk,
        use_cuda_graph=False,
        seg_indptr=ints([*starts, count]),
        weight_indices=ints(owners),
        lora_ranks=ints(problem.ranks),
        scalings=torch.ones(len(problem.ranks), device=device),
        permutation=ints(order),
    )


def stand_in(root: str, folder: Path) -> str:
    """Import the package that lies in ``folder``, from there; all else of the project ``root`` is inert.

    Returns:
        The package's name, which follows from the path.

    Raises:
        FileNotFoundError: the folder is not there. ValueError: it does not lie in a folder of the project's name.
    """
    parts = folder.resolve().parts
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    if root not in parts:
        raise ValueError(f"{folder} is not inside of a folder {root}: its modules import each other by that name")
    package = ".".join(parts[len(parts) - 1 - parts[::-1].index(root) :])
    sys.meta_path.insert(0, _Inert(root, package))
    module = types.ModuleType(package)
    module.__path__ = [str(folder)]
    sys.modules[package] = module
    return package


def _load(package: str, module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{package}.{module}"), name)


class _Inert(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of a project but those inside of ``package``, and gives an inert one."""

    def __init__(self, root: str, package: str) -> None:
        self._root = root
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        # Some files name their own project by the folder it lies in.
        own = name.removeprefix("python.")
        if own.partition(".")[0] not in (self._root, "python") or own.startswith(self._package + "."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


class _InertModule(types.ModuleType):
    """What is asked of it is an inert value, but for Triton itself and what decorates kernels."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = {"triton": triton, "tl": tl, "cached_triton_kernel": _undecorated, "VLLM_TUNED_CONFIG_FOLDER": None}
        return known.get(name, _NOTHING)


class _Nothing:
    """Off, whatever it is asked: falsy, and itself when called or looked into."""

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


_NOTHING = _Nothing()


def _undecorated(given: Any) -> Any:
    """``@decorator`` or ``@decorator(key)``: the kernel as it is."""
    return given if hasattr(given, "run") else lambda kernel: kernel
