"""What a composition of adapters is: plain data, for the engine and for those who only talk to it (leaf)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Literal

Combination = Literal["lorahub", "linear"]
"""``lorahub``: the update is (Σ w B)(Σ w A), as LoRAHub mixes factors; ``linear``: Σ w ΔW."""


@dataclass(frozen=True)
class Member:
    """One adapter of a composition: the version of a registered one, and its weight."""

    version: str
    weight: float


@dataclass(frozen=True)
class Composition:
    """Adapters weighed against each other for a request.

    Attributes:
        members: at least one; two of them may be of one version. Their order counts for ``lorahub`` alone, and there
            only which of them is the first: its scale is that of the result, as in LoRAHub.
    """

    members: tuple[Member, ...]
    combination: Combination

    @property
    def versions(self) -> tuple[str, ...]:
        """The distinct versions, sorted."""
        return tuple(sorted({member.version for member in self.members}))

    @property
    def canonical(self) -> Composition:
        """The same in the order that its identity has, so that equal identities mean equal numbers to the last bit."""
        first = 1 if self.combination == "lorahub" else 0
        rest = sorted(self.members[first:], key=lambda member: (member.version, member.weight))
        return Composition((*self.members[:first], *rest), self.combination)

    @property
    def identity(self) -> str:
        """A digest of versions, weights and combination, whatever the order of the members where it means nothing."""
        hashed = hashlib.sha256(f"weft composition 1 {self.combination}".encode())
        for member in self.canonical.members:
            version = member.version.encode()
            hashed.update(struct.pack(">Qd", len(version), member.weight + 0.0) + version)  # + 0.0: no negative zero
        return f"composition:{hashed.hexdigest()}"
