"""What can compute paged attention on a GPU besides one another, and what each of them cannot do.

A backend is called as the op is. It says beforehand which layers are nothing for it; whether it computes the others
right, and how quickly, is found out where it runs (`choice`).
"""

import importlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import paged_attention
from .rows import AttentionRows, LogSumExp

NAMES = ("triton", "varlen", "flashinfer")


class Absent(Exception):
    """A backend is not there; the message says what is missing."""


class Layer(NamedTuple):
    """What a layer asks of attention, but for numbers that make no difference to who can do it.

    Attributes:
        head_dim, value_dim: of keys and of values.
        sinks: it has a logit for each head in the denominator.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    softcap: float | None
    sinks: bool

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """What the cache is made for: `(kv_heads, head_dim, value_dim)`."""
        return self.kv_heads, self.head_dim, self.value_dim


class Attend(Protocol):
    """Computes `weft.kernels.paged_attention.paged_attention`."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: AttentionRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        lse: LogSumExp | None = None,
    ) -> Tensor: ...


class Backend(Protocol):
    """One way to compute paged attention; denominators (`lse`) are asked of Triton's kernel alone.

    Attributes:
        name: one of `NAMES`.
        capturable: what it enqueues depends on the shapes of its arguments alone, so that a CUDA graph can hold it.
        attend: does it.
    """

    @property
    def name(self) -> str: ...

    @property
    def capturable(self) -> bool: ...

    @property
    def attend(self) -> Attend: ...

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        """Why it is nothing for a layer; None: it may be tried."""


@dataclass(frozen=True)
class Triton:
    """weft's own kernel: it does all there is."""

    name: str = "triton"
    capturable: bool = True
    attend: Attend = paged_attention

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        return None


def present(device: torch.device) -> tuple[list[Backend], dict[str, str]]:
    """The backends that are installed for a GPU; of those that are not, what is missing, by name."""
    found: list[Backend] = [Triton()]
    absent: dict[str, str] = {}
    for name in NAMES[1:]:
        try:
            found.append(importlib.import_module(f".{name}", __package__).find(device))
        except Absent as missing:
            absent[name] = str(missing)
        except Exception as error:  # they load libraries that may not fit the driver, or torch
            absent[name] = f"it does not load: {type(error).__name__}: {error}"
    return found, absent
