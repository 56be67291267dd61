"""weft: one frozen base model, many adapters, one mixed batch.

``LLM`` and ``SamplingParams`` are the offline interface; they need no HTTP package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.server.engine.request import SamplingParams
    from weft.server.llm import LLM, RequestOutput

__all__ = ["LLM", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `weft --help` does not import torch.
    if name in {"LLM", "RequestOutput"}:
        from weft.server import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from weft.server.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
