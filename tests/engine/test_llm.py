"""Offline generation: text in, text out, many adapters at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.serving import base_with_tokenizer
from tests.engine.conftest import Zoo
from tests.support.adapters import PeftReference, make_lora
from weft.adapters.errors import AdapterError
from weft.server import LLM, SamplingParams
from weft.server.config import ConfigError
from weft.server.errors import InvalidRequest, NotFound

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    base = base_with_tokenizer(folder / "base")
    for i in range(3):
        make_lora(base, folder / f"a{i}", seed=i, r=4 + i, target_modules="all-linear")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder / "base"), adapters={f"a{i}": folder / f"a{i}" for i in range(3)}, dtype="float32")


def test_each_prompt_gets_its_adapter(llm: LLM, folder: Path) -> None:
    names = ["a0", None, "a1", "a2", "a0"]
    outputs = llm.generate(["Hello, weft."] * 5, GREEDY, adapter=names)
    assert [output.adapter for output in outputs] == names
    ids = llm.tokenizer.encode("Hello, weft.") if llm.tokenizer else []
    for name, output in zip(names, outputs, strict=True):
        alone = PeftReference(folder / "base", None if name is None else folder / name).generate(ids, 8)
        assert output.outputs[0].token_ids == alone.tokens
        assert output.outputs[0].finish_reason == "length"
    assert len({output.outputs[0].text for output in outputs}) == 4


def test_sampling_is_reproducible_in_any_company(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=12, ignore_eos=True)
    alone = llm.generate("Once", params, adapter="a1")[0].outputs[0].token_ids
    crowd = llm.generate(["Once", "upon", "a time"], [params, GREEDY, params], adapter=["a1", "a0", None])
    assert crowd[0].outputs[0].token_ids == alone
    assert crowd[2].outputs[0].token_ids != alone


def test_n_continuations_differ_and_repeat(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=10, ignore_eos=True)
    first, again = (llm.generate("Once", params, n=3)[0].outputs for _ in range(2))
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({tuple(c.token_ids) for c in first}) == 3
    assert [c.index for c in first] == [0, 1, 2]


def test_stop_strings_end_the_text_and_the_work(llm: LLM) -> None:
    text = (
        llm.generate("Hello, weft.", SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))[0].outputs[0].text
    )
    stop = text[5:8]
    output = llm.generate("Hello, weft.", SamplingParams(temperature=0, max_tokens=200, stop=(stop,), ignore_eos=True))
    completion = output[0].outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_adapters_are_loaded_replaced_and_unloaded(llm: LLM, folder: Path) -> None:
    llm.load_adapter("x", folder / "a0")
    before = llm.generate("Hi", GREEDY, adapter="x")[0].outputs[0].token_ids
    llm.load_adapter("x", folder / "a1")
    after = llm.generate("Hi", GREEDY, adapter="x")[0].outputs[0].token_ids
    assert before == llm.generate("Hi", GREEDY, adapter="a0")[0].outputs[0].token_ids
    assert after == llm.generate("Hi", GREEDY, adapter="a1")[0].outputs[0].token_ids
    llm.unload_adapter("x")
    assert llm.generate("Hi", GREEDY, adapter="a1")[0].outputs[0].token_ids == after, "a1 has the same content"
    with pytest.raises(NotFound, match="'x'"):
        llm.generate("Hi", adapter="x")


def test_a_call_that_fails_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="prompt") as error:
        llm.generate(["fine", "x" * 5000], GREEDY)
    assert error.value.param == "prompt"
    with pytest.raises(NotFound):
        llm.generate(["fine", "fine"], GREEDY, adapter=["a0", "nobody"])
    with pytest.raises(InvalidRequest, match="2 entries for 1 prompts"):
        llm.generate(["fine"], GREEDY, adapter=["a0", "a1"])
    assert not llm.engine.has_work
    llm.engine.check_integrity()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("seed", 2**70),
        ("logit_bias", {3: float("inf")}),
        ("stop", ("",)),
        ("logprobs", 1000),
    ],
)
def test_bad_parameters_name_their_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert error.value.param == field


def test_token_ids_need_no_tokenizer(llama: Zoo) -> None:
    llm = LLM(str(llama.base), adapters={"r": llama.adapters["rslora"]}, dtype="float32")
    output = llm.generate([[3, 4, 5]], GREEDY, adapter="r")[0]
    assert output.outputs[0].token_ids == llama.oracles["rslora"].generate([3, 4, 5], 8).tokens
    assert output.outputs[0].text == ""
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        llm.generate("text")


def test_a_broken_adapter_and_a_broken_model_say_why(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(AdapterError):
        llm.load_adapter("none", tmp_path)
    with pytest.raises(ConfigError, match="model"):
        LLM(str(tmp_path))
