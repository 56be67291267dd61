"""Which compiled adapters stay in host memory."""

from __future__ import annotations

import torch

from weft.adapters.forms import CompiledAdapter, SiteForms
from weft.adapters.host_memory import HostMemory
from weft.adapters.parts import LowRank


def adapter(version: str, rank: int = 1) -> CompiledAdapter:
    """One of 32 bytes for each rank."""
    return CompiledAdapter(version, "LORA", {"q": SiteForms(LowRank(torch.zeros(rank, 4), torch.zeros(4, rank)))})


def test_the_least_recently_used_ones_leave() -> None:
    host = HostMemory(3 * 32)
    for version in "abc":
        host.put(version, adapter(version))
    assert host.get("a") is not None
    host.put("d", adapter("d"))
    assert [version in host for version in "abcd"] == [True, False, True, True] and host.nbytes == 3 * 32
    host.put("e", adapter("e", rank=2))
    assert [version in host for version in "acde"] == [False, False, True, True] and host.nbytes == 3 * 32


def test_the_last_one_stays_however_large_it_is() -> None:
    host = HostMemory(1)
    for version in "ab":
        host.put(version, adapter(version, rank=9))
    assert "a" not in host and "b" in host
    host.discard("b")
    host.discard("b")
    assert host.nbytes == 0


def test_what_is_there_is_not_made_again() -> None:
    host, made = HostMemory(2 * 32), []

    def make() -> CompiledAdapter:
        made.append(adapter("a"))
        return made[-1]

    first = host.get_or_make("a", make)
    assert host.get_or_make("a", make) is first
    for version in "bc":
        host.put(version, adapter(version))
    assert host.get_or_make("a", make) is not first and len(made) == 2
    host.put("a", made[0])
    assert host.get("a") is made[0] and host.nbytes == 2 * 32
