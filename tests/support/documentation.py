"""The pages of the documentation, and the blocks of commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
"""What users read."""

MATRIX = REPOSITORY / "docs" / "adapters.md"
BEGIN, END = "<!-- served: begin -->\n", "<!-- served: end -->\n"
"""Where the table of what is served stands, and the lines around it."""

RUNNABLE = ("sh", "python", "toml")
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>runs|not run)(?:: (?P<note>.+?))? -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        mark: "runs" or "not run", of the comment on the line before it; None: it has none.
        note: what the comment says besides.
    """

    language: str
    text: str
    mark: str | None
    note: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(found["language"], found["text"], found["mark"], found["note"])
        for found in _BLOCK.finditer(page.read_text())
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text())
