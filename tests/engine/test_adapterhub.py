"""Adapters of the AdapterHub library in one mixed batch, each request as the library answers with its adapter alone."""

from __future__ import annotations

import pytest

from tests.support.hub import ARCHITECTURES, adapters_of, base_of, expected
from weft.server import LLM, SamplingParams

NEW_TOKENS = 24


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 64, "block_size": 8}], ids=["whole prompts", "chunked prefill"]
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_of_them_in_one_batch_equal_the_library(arch: str, settings: dict[str, int]) -> None:
    adapters, answers = adapters_of(arch), expected(arch)
    count = len(adapters) + 1
    llm = LLM(
        str(base_of(arch)),
        adapters,
        dtype="float32",
        max_adapters=count,
        max_num_seqs=count,
        adapter_memory=1 << 26,
        **settings,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    names = [*adapters, None]
    wanted = [answers[name or "base"] for name in names]
    outputs = llm.generate([answer.prompt for answer in wanted], params, adapter=names)
    for name, output, answer in zip(names, outputs, wanted, strict=True):
        completion = output.outputs[0]
        assert completion.token_ids == answer.tokens, name
        assert completion.logprobs is not None
        given = [entry.logprob for entry in completion.logprobs]
        assert given == pytest.approx(answer.logprobs, abs=1e-3), name
    assert llm.engine.stats().max_step_adapters == count - 1
    llm.engine.check_integrity()


def test_slots_are_used_again_and_rows_preempted() -> None:
    """Four slots for all adapters, and too few pages for the rows that run: what came back is what was there."""
    adapters, answers = adapters_of("llama"), expected("llama")
    memory = {"adapter_memory": 1 << 20, "kv_cache_memory": 24 * 6144}
    llm = LLM(str(base_of("llama")), adapters, dtype="float32", max_adapters=4, max_num_seqs=8, **memory)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    names = [*adapters, *reversed(adapters)]
    outputs = llm.generate([answers[name].prompt for name in names], params, adapter=names)
    for name, output in zip(names, outputs, strict=True):
        assert output.outputs[0].token_ids == answers[name].tokens, name
    stats = llm.engine.stats()
    assert stats.preemptions and stats.evictions
    llm.engine.check_integrity()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_base_row_does_not_see_the_others(arch: str) -> None:
    """Bit-equal beside adapters of every form and beside base rows alone, where the shapes are the same."""
    adapters, answers = adapters_of(arch), expected(arch)
    names = [name for name in adapters if "prefix" not in name and "mam" not in name]
    settings = {"max_adapters": len(adapters), "max_num_seqs": 99, "enable_prefix_caching": False}
    llm = LLM(str(base_of(arch)), adapters, dtype="float32", **settings)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    prompts = [answers["base"].prompt, *(answers[name].prompt for name in names)]
    llm.generate(prompts, params, adapter=[None, *names])  # all of them in their slots first
    given = []
    for others in ([None] * len(names), names):
        first = llm.generate(prompts, params, adapter=[None, *others])[0].outputs[0]
        assert first.logprobs is not None
        given.append((first.token_ids, [entry.logprob for entry in first.logprobs]))
    assert given[0] == given[1]


def test_in_bfloat16_and_in_float16() -> None:
    """16-bit rows pass through every form."""
    adapters, answers = adapters_of("llama"), expected("llama")
    for dtype in ("bfloat16", "float16"):
        llm = LLM(str(base_of("llama")), adapters, dtype=dtype, max_adapters=len(adapters), max_num_seqs=99)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=0)
        outputs = llm.generate([answers[name].prompt for name in adapters], params, adapter=list(adapters))
        for name, output in zip(adapters, outputs, strict=True):
            entry = (output.outputs[0].logprobs or [])[0]
            assert entry.logprob == pytest.approx(answers[name].logprobs[0], abs=0.5), (dtype, name)
