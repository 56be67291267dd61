"""Section 1: every Triton kernel against its reference in fp64, on fresh random inputs, amid NaN."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpu import cases, paged_cases
from gpu.budget import Share
from gpu.cases import Case, Draw
from gpu.double import in_double, moved, relative_error, widened
from weft.kernels.testing import TOLERANCES

KERNELS: Mapping[str, Callable[[Draw], Case]] = {
    "grouped_lora": cases.lora,
    "grouped_lora in halves": cases.lora_in_halves,
    "grouped_lora in one": cases.lora_in_one,
    "grouped_expert_lora": paged_cases.experts,
    "paged_attention": paged_cases.attention,
    "write_kv": paged_cases.write_kv,
    "grouped_affine": cases.affine,
    "grouped_delta": cases.delta,
    "grouped_rotate": cases.rotate,
    "grouped_turn": cases.turn,
    "grouped_sparse": cases.sparse,
    "grouped_bottleneck": cases.bottleneck,
    "routed_lora": cases.routed,
    "gated_lora": cases.gated,
    "mean_gates": cases.gates,
    "gated_prefix": cases.prefix,
    "logit_mix": paged_cases.mix,
    "weighted_sum": paged_cases.weighted,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_kernels(
    share: Share, device: torch.device, *, kernels: Sequence[str], dtypes: Sequence[str], rounds: int, seed: int
) -> dict[str, Any]:
    """Rounds of one case for each kernel and dtype, until there were ``rounds`` or the share of time is used up.

    Returns:
        What was tried and the largest error by kernel and dtype; what failed, with all that is needed to run it again.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    failures: list[dict[str, Any]] = []
    for turn, kernel, dtype in itertools.product(range(rounds), kernels, dtypes):
        if kernel == "logit_mix" and dtype != "fp32":  # logits are always fp32
            continue
        if share.over:
            share.skip(f"correctness: from round {turn + 1}, {kernel} {dtype} on")
            break
        key = f"{seed}/{turn}/{kernel}/{dtype}"
        limit = TOLERANCES[DTYPES[dtype]][0]
        try:
            draw = Draw(random.Random(key), DTYPES[dtype], small=device.type == "cpu")
            error = error_of(KERNELS[kernel](draw), device)
            problem = None if error <= limit else "NaN" if math.isnan(error) else f"{error:.2e} is beyond {limit:.0e}"
        except Exception as failed:  # of the next kernels one wants to know as well
            error, problem = math.nan, f"{type(failed).__name__}: {failed}"
        if problem is not None:
            failures.append({"case": key, "problem": problem})
        mine = found.setdefault(kernel, {}).setdefault(dtype, {"cases": 0, "largest_error": 0.0, "tolerance": limit})
        mine["cases"] += 1
        mine["largest_error"] = error if error != error else max(mine["largest_error"], error)
    return {
        "error": "largest |ours - fp64| / max(|fp64|, its root mean square)",
        "poisoned": "unused rows, pages and strides, and all memory that is allocated without being written",
        "kernels": found,
        "failures": failures,
    }


def error_of(case: Case, device: torch.device) -> float:
    """The relative error of one case; NaN if a value is not a number.

    Raises:
        AssertionError: something was written that must stay as it is.
    """
    wide = moved(case.wide if case.wide is not None else widened(case.args), device)
    args, options = moved(case.args, device), moved(dict(case.options), device)
    wide_options = widened(options)
    before = [args[index].clone() for index, _ in case.written]
    with in_double():
        expected = case.reference(*wide, **wide_options)
    with _poisoned(device):
        actual = case.launch(*args, **options)
    if not case.written:
        return _worst(_tensors(actual), _tensors(expected))
    errors = []
    for (index, mask), old in zip(case.written, before, strict=True):
        own = mask.to(device)
        assert torch.equal(_bits(args[index])[~own], _bits(old)[~own]), "rows or places changed that must not"
        _check_between_rows(case.args[index], args[index])
        errors.append(_worst([args[index][own]], [wide[index][own]]))
    return max(errors, key=lambda error: (error != error, error))


@contextmanager
def _poisoned(device: torch.device) -> Iterator[None]:
    """Whatever a launch allocates is full of NaN, until it writes there."""
    filled, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [relative_error(mine, right) for mine, right in zip(actual, expected, strict=True)]
    return math.nan if any(error != error for error in errors) else max(errors)


def _tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def _bits(tensor: Tensor) -> Tensor:
    """The same as integers, so that NaN equals itself."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def _check_between_rows(original: Tensor, written: Tensor) -> None:
    """What lies between strided rows is NaN, as it was."""
    if original.is_contiguous():
        return
    held = written.as_strided((written.untyped_storage().nbytes() // written.element_size(),), (1,), 0)
    outside = torch.ones_like(held, dtype=torch.bool)
    outside.as_strided(written.shape, written.stride(), written.storage_offset()).fill_(False)
    assert bool(held[outside].isnan().all()), "memory between the rows was written"
