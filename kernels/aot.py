"""Compiles every Triton kernel ahead of time for every target, which needs no GPU: `python -m weft.kernels.aot`.

Prints registers, spilled bytes and shared memory of each, and exits with 1 if a kernel does not compile, spills more
than a bound, or needs more shared memory than the target has.
"""

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import weft.kernels
from weft.kernels.variants import MULTIPLE, SHARED, VALUES, Variant

# The shared memory one program may use, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
}
SPILL_BOUND = 0


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes a program."""

    registers: int
    spilled: int
    shared: int


def variants() -> Iterator[Variant]:
    """What the folder of every kernel declares in its ``triton.py``."""
    for folder in pkgutil.iter_modules(weft.kernels.__path__, "weft.kernels."):
        if folder.ispkg and importlib.util.find_spec(f"{folder.name}.triton"):
            yield from importlib.import_module(f"{folder.name}.triton").variants()


def compile_variant(variant: Variant, target: GPUTarget) -> Usage:
    """Compiles for `target` as the launch would; whatever the compiler raises passes through."""
    options = {name: variant.config[name] for name in ("num_warps", "num_stages") if name in variant.config}
    constants = {name: value for name, value in variant.config.items() if name not in options}
    kinds = {**SHARED, **variant.arguments}
    signature, attributes = {}, {}
    for index, name in enumerate(variant.kernel.arg_names):
        kind = "constexpr" if name in constants else kinds.get(name, "i32")
        signature[name] = {VALUES: f"*{variant.dtype}", MULTIPLE: "i32"}.get(kind, kind)
        if kind.startswith("*") or kind == MULTIPLE:
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
