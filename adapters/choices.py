"""What requests choose of an adapter: plain data, for the engine and for those who only talk to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A number that a request chooses for its adapter.

    Attributes:
        name: the request's field ("task_id", "lora_rank").
        low, high: its bounds, both allowed.
        default: what a request that names none gets; None: it must name one.
    """

    name: str
    low: int
    high: int
    default: int | None = None
