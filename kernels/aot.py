"""Compiles every Triton kernel ahead of time for every target, which needs no GPU: `python -m weft.kernels.aot`.

Prints registers, spilled bytes and shared memory of each, and exits with 1 if a kernel does not compile, spills more
than a bound, or needs more shared memory than the target has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weft.kernels.gated_lora import triton as gated
from weft.kernels.gated_prefix import triton as prefix
from weft.kernels.grouped_affine import triton as affine
from weft.kernels.grouped_bottleneck import triton as bottleneck
from weft.kernels.grouped_delta import triton as delta
from weft.kernels.grouped_lora import triton as lora
from weft.kernels.grouped_rotate import triton as rotate
from weft.kernels.grouped_sparse import triton as sparse
from weft.kernels.grouped_turn import triton as turn
from weft.kernels.logit_mix import triton as mix
from weft.kernels.mean_gates import triton as mean
from weft.kernels.paged_attention import triton as attention
from weft.kernels.routed_lora import triton as routed
from weft.kernels.weighted_sum import triton as weighted

# The shared memory one program may use, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
POINTERS = {
    **dict.fromkeys(("table", "counts", "ranks", "order", "tiles", "slots", "query_starts", "context_lens"), "*i32"),
    **dict.fromkeys(("gain_table", "gain_counts", "shift_table", "shift_counts", "page_table"), "*i32"),
    **dict.fromkeys(("key_table", "value_table", "top_k"), "*i32"),
    "distances": "*i32",
    "integers": "*i32",
    **dict.fromkeys(("inputs", "activations", "bias_table", "up_bias_table"), "*i32"),
    "slot_mapping": "*i64",
    **dict.fromkeys(("links", "bounds", "down_ranks", "up_ranks", "where", "index"), "*i32"),
    **dict.fromkeys(("starts", "rows", "widths"), "*i32"),
    **dict.fromkeys(("planes", "gates", "scored", "result", "weighed", "lse", "weights"), "*fp32"),
}
SCALARS = dict.fromkeys(("score_scale", "softcap_scale", "scale"), "fp32")
VALUES = (
    *("x", "a", "y", "b", "q", "k", "v", "k_cache", "v_cache", "out", "sinks", "gain", "shift", "delta"),
    *("keys", "values", "pool", "prototypes", "rotation", "sparse", "turn"),
    *("f", "r", "down", "up", "bias", "up_bias", "source"),
)
# Arguments that are multiples of 16 at the widths models have; the launch specializes on it.
MULTIPLES = (
    *("width", "split_width", "x_stride", "y_stride", "f_stride", "r_stride"),
    *("q_token_stride", "q_head_stride", "k_token_stride", "out_stride", "source_stride"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPILL_BOUND = 0


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: its element type and what the launch would pass as constants and options."""

    name: str
    kernel: Any
    dtype: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes a program."""

    registers: int
    spilled: int
    shared: int


def variants() -> Iterator[Variant]:
    """Every kernel, with the block sizes and features that its launch picks from."""
    for dtype, rank, rows in (("bf16", 64, 16), ("bf16", 16, 32), ("fp16", 16, 16), ("fp32", 256, 16)):
        shrink = lora.shrink_config(DTYPES[dtype], rank, rows)
        expand = lora.expand_config(DTYPES[dtype], rank, rows)
        yield Variant(f"shrink rank {rank} rows {rows}", lora.shrink_kernel, dtype, shrink)
        yield Variant(f"expand rank {rank} rows {rows}", lora.expand_kernel, dtype, expand)
    for dtype, units, rows in (("bf16", 64, 16), ("bf16", 256, 32), ("fp16", 16, 16), ("fp32", 256, 16)):
        down = bottleneck.down_config(DTYPES[dtype], units, rows)
        up = bottleneck.up_config(DTYPES[dtype], units, rows)
        yield Variant(f"bottleneck down {units} rows {rows}", bottleneck.down_kernel, dtype, down)
        for by_gate in (False, True):
            label = f"bottleneck up {units} rows {rows}{' gated' if by_gate else ''}"
            yield Variant(label, bottleneck.up_kernel, dtype, up | {"HAS_GATES": by_gate})
    for dtype, rows in (("bf16", 16), ("bf16", 32), ("fp16", 16), ("fp32", 16)):
        yield Variant(f"delta rows {rows}", delta.delta_kernel, dtype, delta.delta_config(DTYPES[dtype], rows))
        yield Variant(f"rotate rows {rows}", rotate.rotate_kernel, dtype, rotate.rotate_config(DTYPES[dtype], rows))
        yield Variant(f"sparse rows {rows}", sparse.sparse_kernel, dtype, sparse.sparse_config(rows))
    for dtype, experts, rows in (("bf16", 16, 32), ("bf16", 64, 32), ("fp16", 8, 16), ("fp32", 64, 16)):
        config = routed.route_config(DTYPES[dtype], experts, rows)
        yield Variant(f"route experts {experts} rows {rows}", routed.route_kernel, dtype, config)
        config = mean.score_config(DTYPES[dtype], experts, rows)
        yield Variant(f"score gates {experts} rows {rows}", mean.score_kernel, dtype, config)
        yield Variant(f"mean gates {experts}", mean.mean_kernel, dtype, mean.mean_config(experts))
        yield Variant(f"weigh rows {rows}", gated.weigh_kernel, dtype, gated.weigh_config(rows))
    for dtype in DTYPES:
        has = {"HAS_GAIN": True, "HAS_SHIFT": True}
        yield Variant("affine", affine.affine_kernel, dtype, affine.affine_config(DTYPES[dtype]) | has)
        config = weighted.weighted_sum_config(DTYPES[dtype])
        yield Variant("weighted sum", weighted.weighted_sum_kernel, dtype, config)
        yield Variant("turn", turn.turn_kernel, dtype, turn.turn_config(DTYPES[dtype]))
    for dtype, group, width, rows in (
        ("bf16", 4, 128, 32),
        ("fp16", 1, 80, 16),
        ("bf16", 8, 256, 16),
        ("fp32", 4, 256, 16),
    ):
        config = prefix.prefix_config(group, width, rows)
        for joint in (False, True):
            label = f"prefix d {width} rows {rows}{' joint' if joint else ''}"
            yield Variant(label, prefix.prefix_kernel, dtype, config | {"JOINT": joint})
    for dtype, group, width, longest, features in (
        ("bf16", 4, 128, 4, ()),
        ("bf16", 4, 128, 4, ("HAS_LSE",)),
        ("fp16", 4, 128, 2048, ("HAS_LSE",)),
        ("bf16", 4, 128, 2048, ("HAS_WINDOW",)),
        ("bf16", 8, 64, 2048, ("HAS_WINDOW", "HAS_SINKS")),
        ("bf16", 2, 256, 2048, ("HAS_WINDOW", "HAS_SOFTCAP")),
        ("fp16", 1, 80, 512, ()),
        ("fp32", 3, 64, 512, ("HAS_SOFTCAP",)),
        ("fp32", 4, 256, 512, ()),
        ("fp32", 4, 256, 512, ("HAS_LSE",)),
    ):
        config = attention.attention_config(DTYPES[dtype], group, width, width, 16, longest)
        has = {name: name in features for name in ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS", "HAS_LSE")}
        label = " ".join(["attention", f"d {width}", *(name[4:].lower() for name in features)])
        yield Variant(f"{label} rows {config['BLOCK_M']}", attention.attention_kernel, dtype, config | has)
    yield Variant("logit mix", mix.mix_kernel, "fp32", mix.mix_config())
    yield Variant("write_kv 8 x 128", attention.write_kv_kernel, "bf16", attention.write_kv_config(8, 128, 128))


def compile_variant(variant: Variant, target: GPUTarget) -> Usage:
    """Compiles for `target` as the launch would; whatever the compiler raises passes through."""
    options = {name: variant.config[name] for name in ("num_warps", "num_stages") if name in variant.config}
    constants = {name: value for name, value in variant.config.items() if name not in options}
    signature, attributes = {}, {}
    for index, name in enumerate(variant.kernel.arg_names):
        pointer = f"*{variant.dtype}" if name in VALUES else POINTERS.get(name)
        signature[name] = "constexpr" if name in constants else pointer or SCALARS.get(name, "i32")
        if pointer or name in MULTIPLES:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        return Usage(*_cubin_usage(compiled.asm["cubin"]), shared)
    return Usage(*_amdgcn_usage(compiled.asm["amdgcn"]), shared)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes. The kernels keep no arrays, so what lies on the stack was spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {report!r}")
    return int(found[1]), int(found[2])


def _amdgcn_usage(assembly: str) -> tuple[int, int]:
    counts = {
        key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", assembly)
    }
    return counts["vgpr_count"], 4 * counts["vgpr_spill_count"]


def main() -> int:
    """Compiles, prints the table, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=TARGETS, action="append", help="repeatable; default: all")
    parser.add_argument("--spill-bound", type=int, default=SPILL_BOUND, help="spilled bytes a thread may have")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    failures = 0
    print(f"{'target':8} {'dtype':5} {'kernel':36} {'regs':>5} {'spilled':>8} {'shared':>8} {'seconds':>8}")
    for name in args.target or TARGETS:
        target, shared_bound = TARGETS[name]
        for variant in variants():
            began = time.perf_counter()
            try:
                usage = compile_variant(variant, target)
            except Exception as error:
                print(f"{name:8} {variant.dtype:5} {variant.name:36} FAILED: {error}")
                failures += 1
                continue
            over = usage.spilled > args.spill_bound or usage.shared > shared_bound
            failures += over
            print(
                f"{name:8} {variant.dtype:5} {variant.name:36} {usage.registers:5} {usage.spilled:8} {usage.shared:8} "
                f"{time.perf_counter() - began:8.1f}{'  OVER THE BOUND' if over else ''}",
                flush=True,
            )
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
