"""ARCHITECTURE.md says in a line what each module is for: every module of the tree, and none that is gone.

A module is named by its path from the root, as in "`server/engine/scheduler.py`: which rows run in the next step". An
`__init__.py` need not be named.
"""

import re
from pathlib import Path

import pytest

ROOTS = ("server", "kernels", "adapters")
PATH = re.compile(rf"\b(?:{'|'.join(ROOTS)})/[\w/]+\.py\b")


@pytest.fixture(scope="module")
def described(repository: Path) -> dict[str, str]:
    """Path of each module that ARCHITECTURE.md names -> the rest of the line with its first mention."""
    found: dict[str, str] = {}
    for line in (repository / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        for path in PATH.findall(line):
            found.setdefault(path, PATH.sub("", line))
    return found


def test_every_module_is_named(described: dict[str, str], repository: Path) -> None:
    paths = {path.relative_to(repository).as_posix() for root in ROOTS for path in (repository / root).rglob("*.py")}
    missing = sorted(path for path in paths - described.keys() if not path.endswith("__init__.py"))
    assert not missing, f"ARCHITECTURE.md has no line for {missing}"


def test_every_named_module_exists(described: dict[str, str], repository: Path) -> None:
    gone = sorted(path for path in described if not (repository / path).is_file())
    assert not gone, f"ARCHITECTURE.md names {gone}, which the tree does not have"


def test_every_line_says_something(described: dict[str, str]) -> None:
    silent = sorted(path for path, line in described.items() if len(re.findall(r"[^\W\d_]{2,}", line)) < 3)
    assert described and not silent, f"ARCHITECTURE.md names {silent} without saying what they are for"
