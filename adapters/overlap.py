"""What may run on a GPU beside the product of a linear of the base: the first half of its low-rank updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

FEW_ROWS = 64
"""Up to as many rows a product of the base leaves room beside it: it waits for its weight, and its blocks do not fill
the device. Not measured: `benchmarks/gpu_suite.py --sections bandwidth` times products with and without."""


class Overlap(Protocol):
    """Two lines of work that part and meet again."""

    def pays(self, rows: int) -> bool:
        """Whether work beside a product of so many rows is worth parting for."""

    def fork(self) -> AbstractContextManager[None]:
        """What is launched within runs beside what follows, after all that came before."""

    def join(self) -> None:
        """What follows comes after what was launched within ``fork``."""


class SecondStream:
    """A stream of one model's own, beside the current one. Under capture, the two are branches of the graph.

    Nothing is allocated on it: what it reads and writes belongs to the current stream and is kept until ``join``. So
    memory is free for others only when the current stream is past ``join``, and ``record_stream`` is not needed.

    Args:
        device: with streams.
    """

    def __init__(self, device: torch.device) -> None:
        # Torch hands streams out of a few in turns, those of high priority apart: nobody else here asks for one, so
        # that no upload goes to this stream, which may be in the middle of a capture.
        self._stream = torch.cuda.Stream(device, priority=-1)

    def pays(self, rows: int) -> bool:
        """See ``Overlap``."""
        return rows <= FEW_ROWS

    @contextmanager
    def fork(self) -> Iterator[None]:
        """See ``Overlap``."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """See ``Overlap``."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def overlap_for(device: torch.device) -> SecondStream | None:
    """A second stream for a model on a device; None where there are no streams."""
    return SecondStream(device) if device.type == "cuda" else None
