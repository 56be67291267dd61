"""Regular expressions from adapter configs: exactly Python's ``re``, as peft uses it, but with an end.

A pattern can be written so that matching takes for ever, and ``re`` cannot be interrupted. Patterns that are plain
module names are matched here; all others in a process of its own under a limit of CPU time and memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weft.adapters.config_fields import show
from weft.adapters.errors import AdapterFormatError

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
MAX_PATTERN = 1 << 16

Hit = tuple[int, str | None]
"""Which pattern matched, and what its group ``idx`` holds, if it has one."""

_WORKER = Path(__file__).with_name("pattern_worker.py")
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.\-]*\$?")


def is_plain(pattern: str) -> bool:
    """Whether ``pattern`` is a module name (dots match any character): such a match always ends soon."""
    return len(pattern) <= 1000 and _PLAIN.fullmatch(pattern) is not None


def first_matches(
    patterns: Sequence[str], texts: Sequence[str], *, param: str, full: bool, plain: bool = False
) -> list[Hit | None]:
    """For each text the first of ``patterns`` that matches it, by ``re.fullmatch`` if ``full``, else by ``re.match``.

    Args:
        param: the config field the patterns come from, for errors.
        plain: the patterns hold nothing that could take long; match them in this process.

    Raises:
        AdapterFormatError: a pattern is malformed, too long, or takes too long.
    """
    too_long = next((pattern for pattern in patterns if len(pattern) > MAX_PATTERN), None)
    if too_long is not None:
        raise AdapterFormatError(f"{param}: a pattern of {len(too_long)} characters is too long", param=param)
    if plain:
        compiled = [re.compile(pattern) for pattern in patterns]
        return [_first(compiled, text, full) for text in texts]
    reply = _ask_worker({"patterns": list(patterns), "texts": list(texts), "full": full}, param)
    if "error" in reply:
        pattern, error = show(reply["pattern"]), show(reply["error"])
        raise AdapterFormatError(f"{param}: {pattern} is not a regular expression: {error}", param=param)
    hits: list[list[Any] | None] = reply["hits"]
    return [None if hit is None else (hit[0], hit[1]) for hit in hits]


def _first(compiled: Sequence[re.Pattern[str]], text: str, full: bool) -> Hit | None:
    for index, pattern in enumerate(compiled):
        match = pattern.fullmatch(text) if full else pattern.match(text)
        if match:
            return index, match.groupdict().get("idx")
    return None


def _ask_worker(question: dict[str, object], param: str) -> dict[str, Any]:
    command = [sys.executable, "-I", "-S", str(_WORKER), str(CPU_SECONDS), str(MEMORY_BYTES)]
    try:
        # The wall clock is a second limit, far beyond the first: a busy machine must not refuse a sound pattern.
        done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, timeout=60)
        done.check_returncode()
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        message = f"{param}: the regular expression takes too long or too much memory to match; write a simpler one"
        raise AdapterFormatError(message, param=param) from error
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply
