"""Kernels in C for the CPU, compiled where they run, once: for the machine's own vector and matrix units.

A wheel that carried them would have to be built for every kind of processor, and torch's operators take several passes
where one would do. What there is no compiler for is done by torch, with the same results but for rounding, and slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler

log = logging.getLogger(__name__)

FLAGS = ("-std=gnu17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
FOLDER = Path(__file__).parent
KINDS = {torch.float32: 0, torch.bfloat16: 1}
"""How `vectors.h` calls the dtypes that kernels in C are written for."""
ONE_THREAD = 1 << 14
"""Elements that one thread passes over in less time than a team takes to start."""


@dataclass(frozen=True)
class Unavailable:
    """Why there are no kernels in C: a sentence for whoever runs the server."""

    reason: str


@functools.cache
def compiled(source: str) -> ctypes.CDLL | Unavailable:
    """The library that a source below this folder compiles to, from the user's cache if it is there.

    The compiler is `$WEFT_CC`, or `cc`, with what flags it names after ours; an empty `$WEFT_CC` says that torch is to
    do all the work.
    """
    command = shlex.split(os.environ.get("WEFT_CC", "cc"))
    if not command:
        return Unavailable("WEFT_CC is empty")
    if shutil.which(command[0]) is None:
        return Unavailable(f"there is no C compiler {command[0]!r}")
    try:
        return _load(source, command)
    except subprocess.CalledProcessError as error:
        return Unavailable(f"{command[0]!r} failed: {error.stderr.strip()[-400:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Unavailable(str(error))


def available(source: str) -> bool:
    """Whether there is a library for this source; says once in the log why there is not."""
    return isinstance(_told(source), ctypes.CDLL)


@functools.cache
def function(source: str, name: str, *arguments: Any) -> Callable[..., int]:
    """A function of a library that is available, which takes arguments of these ctypes.

    What it returns says how it ended, 0 being well, unless it cannot fail and returns nothing that means anything.
    Torch's profiler sees its calls, as it sees those of torch's own operators.
    """
    found = compiled(source)
    assert isinstance(found, ctypes.CDLL), "asked for without asking whether it is there"
    loaded = found[name]
    loaded.argtypes = arguments

    def call(*values: Any) -> int:
        if not profiler._is_profiler_enabled:
            ended: int = loaded(*values)
            return ended
        with profiler.record_function(f"{Path(source).parent.name}::{name}"):
            return int(loaded(*values))

    return call


def has_tiles(source: str) -> bool:
    """Whether there is a library for this source, which includes `tiles.h`, and this process may use the tiles."""
    return available(source) and _tiles_permitted(source)


def threads(elements: int) -> int:
    """How many threads are to pass over as many elements: all or one, for OpenMP ends those that a team leaves out."""
    return torch.get_num_threads() if elements > ONE_THREAD else 1


@functools.cache
def _tiles_permitted(source: str) -> bool:
    return function(source, "tiles_permitted")() == 0


@functools.cache
def _told(source: str) -> ctypes.CDLL | Unavailable:
    found = compiled(source)
    if isinstance(found, Unavailable):
        log.warning("%s: torch does the work of %s, more slowly", found.reason, source)
    return found


def _load(source: str, command: list[str]) -> ctypes.CDLL:
    path = FOLDER / source
    name = f"{path.parent.name}-{path.stem}-{_digest(path, command)}.so"
    folder = _cache()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="weft-native-") as scratch:  # a loaded library needs no file
            return ctypes.CDLL(str(_compile(path, Path(scratch) / name, command)))
    library = folder / name
    return ctypes.CDLL(str(library if library.exists() else _compile(path, library, command)))


def _digest(path: Path, command: list[str]) -> str:
    """Of all that the library follows from, the processor included: a home may be shared by several machines."""
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    content = hashlib.sha256("\0".join([*command, version, *FLAGS, _processor()]).encode())
    for file in (path, *sorted(FOLDER.rglob("*.h"))):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in text.split("\n\n", 1)[0].splitlines() if line.startswith(told))


def _cache() -> Path | None:
    """A folder that nobody else can write to; None if there is none."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "native"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = root.stat()
    except (OSError, RuntimeError):  # the second where this user has no home
        return None
    own = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return root if own and os.access(root, os.W_OK) else None


def _compile(source: Path, library: Path, command: list[str]) -> Path:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".making-") as scratch:
        made = Path(scratch) / library.name
        arguments = [command[0], *FLAGS, *command[1:], f"-I{FOLDER}", str(source), "-o", str(made), "-lm"]
        subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
        made.replace(library)  # several processes may make it at once; each finds a whole one
    return library
