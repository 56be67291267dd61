"""What logit arithmetic is asked for: plain data (leaf). The distributions of several streams, weighed and added."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.adapters.composition import Composition


@dataclass(frozen=True)
class Term:
    """One further stream of a request, which gets the same tokens as the request's own one.

    Attributes:
        weight: what its logits count, may be negative.
        model: name of a further frozen model; None: the main one.
        adapter, adapter_name, composition, choices: what it runs with, as in ``EngineRequest``, on that model.
        prompt_token_ids: its own prompt; None: the request's.
    """

    weight: float
    model: str | None = None
    adapter: str | None = None
    adapter_name: str | None = None
    composition: Composition | None = None
    choices: dict[str, int] = field(default_factory=dict)
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class LogitArithmetic:
    """s = weight · s_own + Σ term.weight · s_term, before penalties, bias, temperature and truncation.

    Proxy-tuning (Liu et al., 2024) is weight 1 with an expert of weight α and an anti-expert of weight -α.

    Attributes:
        weight: of the request's own stream.
        top_p: keep only the tokens that the own stream's distribution has in its nucleus of this size, before adding
            (DExperts, Liu et al., 2021); None: all.
    """

    terms: tuple[Term, ...]
    weight: float = 1.0
    top_p: float | None = None


def proxy(
    expert: tuple[str | None, str | None],
    anti_expert: tuple[str | None, str | None],
    *,
    alpha: float = 1.0,
    top_p: float | None = None,
) -> LogitArithmetic:
    """Proxy-tuning, and with ``top_p`` DExperts: s = s_own + alpha · (s_expert - s_anti_expert).

    Args:
        expert, anti_expert: (model, adapter); None is the main model, or no adapter.
    """
    sides = ((alpha, expert), (-alpha, anti_expert))
    return LogitArithmetic(
        tuple(Term(weight, model, adapter, adapter) for weight, (model, adapter) in sides), top_p=top_p
    )
