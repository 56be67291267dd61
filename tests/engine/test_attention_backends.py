"""The attention of a whole model by another backend, and what is said where none can be had."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.conftest import Zoo
from tests.engine.harness import assert_alone
from weft.kernels.paged_attention import paged_attention, reference
from weft.kernels.paged_attention.backends import Layer, Triton
from weft.kernels.paged_attention.choice import Chosen, Place
from weft.server.config import ConfigError, EngineConfig
from weft.server.engine import attention, selfcheck, startup
from weft.server.engine.attention import UnsupportedModel
from weft.server.engine.attention_backends import attention_for, choose
from weft.server.llm import LLM

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = Layer(4, 2, 16, 16, None, None, False)
PLACE = Place(CPU, torch.float32, 16, 64, None)


class Fake:
    """Computes the reference, and counts; ``off`` by so much."""

    capturable = True

    def __init__(self, name: str, off: float = 0.0) -> None:
        self.name = name
        self.off = off
        self.calls: list[bool] = []

    def unfit(self, layer: Layer, dtype: torch.dtype, page_size: int) -> str | None:
        return "it has no windows" if layer.window is not None else None

    def attend(self, q: Any, k: Any, v: Any, rows: Any, **options: Any) -> torch.Tensor:
        self.calls.append(rows.decoding)
        return reference.paged_attention(q, k, v, rows, **options) + self.off


def test_a_model_is_served_by_the_backends_of_its_layers(llama: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen at start attends in every step, and the check against transformers goes by it as well."""
    prompts, decoding = Fake("prompts"), Fake("decoding")
    seen: list[Layer] = []

    def fake(config: EngineConfig, layers: list[Layer], *rest: Any) -> Chosen:
        seen.extend(layers)
        return Chosen({(layer, kind): decoding if kind else prompts for layer in layers for kind in (True, False)})

    monkeypatch.setattr(startup, "attention_for", fake)
    driver = llama.driver()
    checked = len(prompts.calls)
    assert checked >= 2 * len(seen) and not decoding.calls
    for adapter in (None, "rslora"):
        driver.add(list(range(3, 9)), adapter, max_tokens=4)
    driver.run()
    assert len(prompts.calls) > checked and not any(prompts.calls)
    assert len(decoding.calls) >= 3 * len(seen) and all(decoding.calls)
    for stream in driver.streams.values():
        assert_alone(stream, llama.oracles[stream.request.adapter])


def test_another_result_is_another_answer(llama: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is the backend that attends; and what no trial found, the comparison with transformers does."""
    wrong = Fake("wrong", off=0.3)
    monkeypatch.setattr(
        startup, "attention_for", lambda config, layers, *rest: Chosen({(layer, False): wrong for layer in layers})
    )
    with pytest.raises(ConfigError, match="differs from transformers"):
        llama.driver()


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_what_layers_ask_for_is_seen(arch: str, zoo_of: Callable[[str], Zoo]) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo_of(arch).base)
    attention.register()
    layers, config = selfcheck.attention_layers(model), model.config
    assert len(layers) == config.num_hidden_layers
    assert {(layer.heads, layer.kv_heads) for layer in layers} == {
        (config.num_attention_heads, config.num_key_value_heads)
    }
    windows = [layer.window for layer in layers]
    if arch == "gemma2":
        assert None in windows and config.sliding_window in windows
        assert {layer.softcap for layer in layers} == {config.attn_logit_softcapping}
    else:
        assert windows == [None] * len(layers) and not any(layer.sinks for layer in layers)


def test_the_choice_is_logged_and_a_wrong_one_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    windowed = LAYER._replace(window=8)
    chosen = choose([Fake("wrong", 0.1), Triton()], [LAYER, windowed, LAYER], PLACE, named=False)
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2, "the layer without a window, in both kinds of step; the other one is nothing for it"
    assert all("attention backend wrong is left out of steps" in line and "not close" in line for line in warned)
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert len(said) == 4 and all("attention by triton in steps" in line for line in said)
    assert sum("it has no windows" in line for line in said) == 2
    assert isinstance(chosen, Chosen)


def test_a_right_one_is_chosen_among_several(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    choose([Fake("one"), Fake("two")], [LAYER], PLACE, named=False)
    assert all(record.message.count(" ms") == 2 for record in caplog.records) and len(caplog.records) == 2


def test_without_a_right_one_nothing_is_served() -> None:
    with pytest.raises(UnsupportedModel, match=r"no attention backend is right .* wrong: .* not close"):
        choose([Fake("wrong", 0.1)], [LAYER], PLACE, named=False)


@pytest.mark.parametrize(("layer", "why"), [(LAYER, "not close"), (LAYER._replace(window=8), "no windows")])
def test_one_that_was_asked_for_must_do(layer: Layer, why: str) -> None:
    with pytest.raises(ConfigError, match=f"attention_backend is 'wrong', which steps .* {why}"):
        choose([Fake("wrong", 0.1)], [layer], PLACE, named=True)


@pytest.mark.parametrize("name", ["varlen", "flashinfer"])
def test_one_that_is_not_there_is_refused(name: str) -> None:
    """This torch is built without CUDA."""
    with pytest.raises(ConfigError, match=f"attention_backend is '{name}', but it needs a GPU and a torch"):
        attention_for(EngineConfig("none", attention_backend=name), [LAYER], torch.bfloat16, CUDA, 64)


def test_a_cpu_has_one_of_its_own(llama: Zoo) -> None:
    with pytest.raises(ConfigError, match="attention_backend is 'triton', which needs a GPU"):
        LLM(str(llama.base), attention_backend="triton")
    assert attention_for(EngineConfig("none"), [LAYER], torch.float32, CPU, 64) is paged_attention
    with pytest.raises(ConfigError, match="attention_backend must be one of auto, triton, varlen, flashinfer"):
        EngineConfig("none", attention_backend="sdpa")
