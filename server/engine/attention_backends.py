"""Chooses what computes a model's attention on a GPU, for each kind of layer and of step, and says so in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from weft.kernels.paged_attention import paged_attention
from weft.kernels.paged_attention.backends import Attend, Backend, Layer, present
from weft.kernels.paged_attention.choice import Chosen, Place, Verdict, judge, quickest
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine.attention import UnsupportedModel
from weft.server.engine.graphs import capture_for

log = logging.getLogger(__name__)


def attention_for(
    config: EngineConfig, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device, max_model_len: int
) -> Attend:
    """What attends. On a GPU every backend that is there is tried, and timed where there are several; a CPU has one.

    Raises:
        ConfigError: the backend that was asked for is not there, or not right for this model.
        UnsupportedModel: none is right on this device.
    """
    name = config.attention_backend
    if device.type == "cpu":
        if name != "auto":
            raise ConfigError(f"attention_backend is {name!r}, which needs a GPU; on a CPU leave it at auto")
        return paged_attention
    found, absent = present(device)
    if name in absent:
        raise ConfigError(f"attention_backend is {name!r}, but {absent[name]}")
    for other, why in absent.items():
        log.info("attention backend %s is not there: %s", other, why)
    candidates = [backend for backend in found if name in ("auto", backend.name)]
    capture = capture_for(device) if config.cuda_graphs else None
    place = Place(device, dtype, config.block_size, max_model_len, capture)
    return choose(candidates, layers, place, named=name != "auto")


def choose(candidates: Sequence[Backend], layers: Sequence[Layer], place: Place, *, named: bool) -> Chosen:
    """The quickest right one of the candidates, for each kind of layer and of step.

    Args:
        named: the one candidate was asked for.

    Raises:
        ConfigError: it is not right. UnsupportedModel: none is.
    """
    table = {}
    for layer, count in Counter(layers).items():
        for decoding in (True, False):
            verdicts = judge(candidates, layer, count, place, decoding=decoding)
            where = _where(layer, decoding)
            if named and not verdicts[0].right:
                raise ConfigError(
                    f"attention_backend is {verdicts[0].name!r}, which {where} cannot have: {_why(verdicts)}"
                )
            table[layer, decoding] = _quickest(candidates, verdicts, where)
    return Chosen(table)


def _quickest(candidates: Sequence[Backend], verdicts: Sequence[Verdict], where: str) -> Backend:
    for verdict in verdicts:
        if verdict.problem is not None:
            log.warning("attention backend %s is left out of %s: %s", verdict.name, where, verdict.problem)
    chosen = quickest(candidates, verdicts)
    if chosen is None:
        raise UnsupportedModel(f"no attention backend is right on this device in {where}: {_why(verdicts)}")
    log.info("attention by %s in %s: %s", chosen.name, where, "; ".join(map(_found, verdicts)))
    return chosen


def _where(layer: Layer, decoding: bool) -> str:
    window = "" if layer.window is None else f", window {layer.window}"
    steps = "steps that decode" if decoding else "steps with a prompt"
    return f"{steps} ({layer.heads} heads of {layer.head_dim}{window})"


def _why(verdicts: Sequence[Verdict]) -> str:
    return "; ".join(_found(verdict) for verdict in verdicts if not verdict.right)


def _found(verdict: Verdict) -> str:
    if not verdict.right:
        return f"{verdict.name}: {verdict.unfit or verdict.problem}"
    return verdict.name if verdict.seconds is None else f"{verdict.name} {1e3 * verdict.seconds:.3f} ms"
