"""How long a large checkpoint takes to load beside reading its files, and what memory it takes.

    python benchmarks/startup.py                          8 GB in bf16, a Llama of random weights made here
    python benchmarks/startup.py --gigabytes 2 --model-folder PATH

The files are dropped from the system's cache before each reading. What is loaded is in a process of its own; of its
memory, what it holds for itself (anonymous) is told apart from pages of the checkpoint, which the system takes back
when it needs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from weft.server.bench import report

RESULT = Path(__file__).parent / "results" / "startup-cpu.json"
BLOCK = 16 << 20
LAYER = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32_000,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
LOAD = """
import json, sys, time
from pathlib import Path
from weft.server.config import EngineConfig
from weft.server.engine.engine import Engine
stages, began = [], time.perf_counter()
engine = Engine(EngineConfig(sys.argv[1], device="cpu", kv_cache_memory=1 << 28),
                progress=lambda stage: stages.append((stage, time.perf_counter() - began)))
seconds = time.perf_counter() - began
engine.close()
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
kib = {name: int(status[name].split()[0]) for name in ("VmHWM", "RssAnon", "RssFile")}
print(json.dumps({"seconds": seconds, "stages": stages, **{name: value * 1024 for name, value in kib.items()}}))
"""


def main(
    gigabytes: Annotated[float, typer.Option(help="Of weights in bf16, about.")] = 8.0,
    repeat: Annotated[int, typer.Option(help="Times that it is read and loaded.")] = 3,
    model_folder: Annotated[
        Path | None, typer.Option(help="A checkpoint that is there, in place of a random one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Write the figures there as JSON.")] = RESULT,
) -> None:
    """Measure, print the table, write the figures."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder or make(Path(scratch) / "model", gigabytes)
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        runs = []
        for _ in range(repeat):
            drop(files)
            reading = read(files)
            drop(files)
            runs.append({"read_seconds": reading, **load(folder)})
    show(runs, size)
    report.write(out, {**report.environment(sys.argv), "bytes": size, "runs": runs})


def make(folder: Path, gigabytes: float) -> Path:
    """A Llama of as many layers as make up the size, a file for each; all layers have the same numbers."""
    folder.mkdir()
    torch.manual_seed(0)
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(**{**LAYER.to_dict(), "num_hidden_layers": 1})).state_dict()
    names.pop("lm_head.weight")  # it is the embedding
    tensors = {name: random_values(tensor.shape) for name, tensor in names.items()}
    layer = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in layer}
    layers = max(1, round((gigabytes * 1e9 - bytes_of(rest)) / bytes_of(layer)))
    files = {"model-rest.safetensors": rest}
    for index in range(layers):
        files[f"model-layer-{index}.safetensors"] = {
            name.replace(".layers.0.", f".layers.{index}."): tensor for name, tensor in layer.items()
        }
    places = {}
    for file, parts in files.items():
        save_file(parts, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(parts, file)
    index_file = {"metadata": {"total_size": sum(map(bytes_of, files.values()))}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    LlamaConfig(
        **{**LAYER.to_dict(), "num_hidden_layers": layers, "architectures": ["LlamaForCausalLM"]}
    ).save_pretrained(str(folder))
    return folder


def random_values(shape: torch.Size) -> torch.Tensor:
    """A matrix of small numbers; a norm's weight is 1."""
    return (
        torch.randn(shape, dtype=torch.bfloat16) * 0.02 if len(shape) == 2 else torch.ones(shape, dtype=torch.bfloat16)
    )


def bytes_of(parts: dict[str, torch.Tensor]) -> int:
    """Of all tensors."""
    return sum(tensor.nbytes for tensor in parts.values())


def drop(files: list[Path]) -> None:
    """Take the files out of the system's cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(files: list[Path]) -> float:
    """Seconds to read the files from beginning to end, and keep nothing."""
    block = bytearray(BLOCK)
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - began


def load(folder: Path) -> dict[str, Any]:
    """Seconds until an engine on this checkpoint is ready, when it said what it was busy with, and its memory."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], stdout=subprocess.PIPE, text=True, check=True, cwd=folder
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(runs: list[dict[str, Any]], size: int) -> None:
    """What every run took."""
    table = Table("read, s", "GB/s", "load, s", "GB/s", "load / read", "own memory, GB", "of the files, GB", "peak, GB")
    for run in runs:
        numbers = (
            run["read_seconds"],
            size / run["read_seconds"] / 1e9,
            run["seconds"],
            size / run["seconds"] / 1e9,
            run["seconds"] / run["read_seconds"],
            *(run[name] / 1e9 for name in ("RssAnon", "RssFile", "VmHWM")),
        )
        table.add_row(*(f"{number:.2f}" for number in numbers))
    table.title = f"{size / 1e9:.2f} GB of safetensors"
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    for stage, seconds in runs[-1]["stages"]:
        print(f"{seconds:7.2f} s  {stage}")


if __name__ == "__main__":
    typer.run(main)
