"""Matches regular expressions in a process of its own, which the system stops when it takes too much time or memory.

Run by ``patterns`` with two arguments, seconds and bytes. Reads ``{"patterns", "texts", "full"}`` as JSON, writes
``{"hits": [[index of the first pattern that matches, its group "idx"] or null per text]}`` or ``{"pattern", "error"}``.
Imports the standard library alone, so that it starts in milliseconds.
"""

import json
import re
import resource
import sys
import warnings


def answer(patterns: list[str], texts: list[str], full: bool) -> dict[str, object]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            return {"pattern": pattern, "error": str(error)}
    hits: list[tuple[int, str | None] | None] = []
    for text in texts:
        found = ((i, p.fullmatch(text) if full else p.match(text)) for i, p in enumerate(compiled))
        hits.append(next(((i, match.groupdict().get("idx")) for i, match in found if match), None))
    return {"hits": hits}


if __name__ == "__main__":
    seconds, size = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    json.dump(answer(**json.load(sys.stdin)), sys.stdout)
