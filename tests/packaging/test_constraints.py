"""constraints.txt pins everything that an installation with the development tools brings in."""

from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """Canonical names of what the installed distributions require, transitively, in the current environment."""
    for extra in requirement.extras | {""}:
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        yield key[0]
        for text in distribution(requirement.name).requires or ():
            child = Requirement(text)
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                yield from closure(child, seen)


def test_every_installed_dependency_is_pinned(repository: Path) -> None:
    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    installed = set(closure(Requirement("weft[dev]"), set())) - {"weft"}
    assert len(installed) > 50
    assert not installed - {canonicalize_name(pin.name) for pin in pins}
