"""POST /v1/completions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.http.conftest import Served, events
from weft.server.engine.request import EngineRequest


async def test_shape_of_a_reply(served: Served) -> None:
    served.client.cached_tokens = 2
    reply = await served.complete(model="a", max_tokens=3)
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion" and reply["model"] == "a"
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "text": "the quick brown",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_engine_is_asked_what_was_asked(served: Served) -> None:
    await served.complete(
        model="a",
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.3,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        seed=11,
        stop=["x", "y"],
        stop_token_ids=[9],
        ignore_eos=True,
        logit_bias={"5": -1, "6": 2.5},
        logprobs=2,
        cache_salt="s",
        priority=-3,
    )
    (request,) = served.client.requests
    params = request.params
    assert (request.adapter, request.adapter_name) == ("v1", "a")
    assert (request.cache_salt, request.priority) == ("s", -3)
    assert (params.max_tokens, params.min_tokens, params.temperature, params.seed) == (5, 2, 0.5, 11)
    assert (params.top_p, params.top_k, params.min_p) == (0.9, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.3, -0.3, 1.1)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "y"), (9,), True)
    assert params.logit_bias == {5: -1.0, 6: 2.5} and params.logprobs == 2 and params.prompt_logprobs is None


async def test_base_is_asked_without_an_adapter(served: Served) -> None:
    for name in ("base", "alias/of-base"):
        await served.complete(model=name)
    assert [(r.adapter, r.adapter_name) for r in served.client.requests] == [(None, None)] * 2


async def test_null_is_the_default(served: Served) -> None:
    fields = "n stream max_tokens temperature top_p seed stop logit_bias logprobs echo suffix best_of user tools"
    reply = await served.complete(**dict.fromkeys(fields.split()))
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert served.client.requests[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("the cat", [[1, 264, 284]]),
        (["the", " cat"], [[1, 264], [1, 284]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_forms_of_the_prompt(served: Served, prompt: Any, expected: list[list[int]]) -> None:
    assert served.tokenizer.encode("the cat") == [1, 264, 284]
    reply = await served.complete(prompt=prompt)
    asked = sorted(served.client.requests, key=lambda r: r.request_id)
    assert [request.prompt_token_ids for request in asked] == expected
    assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_add_special_tokens(served: Served) -> None:
    await served.complete(prompt="the cat", add_special_tokens=False)
    assert served.client.requests[0].prompt_token_ids == [264, 284]


async def test_choices_are_in_order_of_prompts(served: Served) -> None:
    def output(request: EngineRequest) -> list[int]:
        return [*request.prompt_token_ids, 70 + len(served.client.requests)]

    served.client.output = output
    reply = await served.complete(prompt=[[80], [81]], n=3, max_tokens=1)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    texts = [choice["text"] for choice in reply["choices"]]
    assert texts == [served.tokenizer.decode([80])] * 3 + [served.tokenizer.decode([81])] * 3
    assert reply["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_choices_have_seeds_of_their_own(served: Served) -> None:
    await served.complete(n=3, seed=2**63 - 1)
    assert {request.params.seed for request in served.client.requests} == {2**63 - 1, -(2**63), -(2**63) + 1}
    served.client.requests.clear()
    await served.complete(n=2)
    assert [request.params.seed for request in served.client.requests] == [None, None]


async def test_logprobs(served: Served) -> None:
    reply = await served.complete(logprobs=2, max_tokens=2)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["the", " quick"]
    assert logprobs["text_offset"] == [0, 3]
    assert [len(top) for top in logprobs["top_logprobs"]] == [3, 3]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob


async def test_echo(served: Served) -> None:
    reply = await served.complete(prompt=["the cat", "fox"], echo=True, max_tokens=2)
    assert [choice["text"] for choice in reply["choices"]] == ["the catthe quick", "foxthe quick"]
    reply = await served.complete(prompt=[264, 284], echo=True, max_tokens=1)
    assert reply["choices"][0]["text"] == "the catthe"


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_contract_of_the_evaluation_harness(served: Served, max_tokens: int) -> None:
    served.client.logprob = lambda token_id: math.log(1 / 3) - token_id / 7
    prompts = [[264, 284, 70], [71, 72]]
    reply = await served.complete(
        prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        logprobs = choice["logprobs"]
        size = len(prompt) + max_tokens
        assert {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {size}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        for token_id, logprob, top in zip(
            prompt[1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=False
        ):
            assert logprob == served.client.logprob(token_id)
            assert logprob in top.values() and max(top.values()) == served.client.logprob(0)
        assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 2 * max_tokens
    assert all(r.params.max_tokens == 1 and r.params.prompt_logprobs == 1 for r in served.client.requests)


async def test_no_tokens_wanted(served: Served) -> None:
    reply = await served.complete(max_tokens=0)
    assert reply["choices"][0]["text"] == "" and reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0


async def test_minus_infinity_is_a_number(served: Served) -> None:
    served.client.logprob = lambda token_id: -math.inf
    reply = await served.complete(logprobs=1, echo=True, max_tokens=1, prompt_logprobs=1)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -9999.0, -9999.0, -9999.0]
    assert set(logprobs["top_logprobs"][-1].values()) == {-9999.0}


async def test_prompt_logprobs(served: Served) -> None:
    reply = await served.complete(prompt_logprobs=1, max_tokens=1)
    first, second, third = reply["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second["264"] == {"logprob": -264 / 7, "rank": 265, "decoded_token": "the"}
    assert second["0"]["rank"] == 1 and set(third) == {"0", "284"}


async def test_echoed_and_prompt_logprobs_have_widths_of_their_own(served: Served) -> None:
    reply = await served.complete(prompt_logprobs=3, logprobs=1, echo=True, max_tokens=1)
    choice = reply["choices"][0]
    assert served.client.requests[0].params.prompt_logprobs == 3
    assert len(choice["prompt_logprobs"][1]) == 4 and len(choice["logprobs"]["top_logprobs"][1]) == 2


async def test_token_ids(served: Served) -> None:
    reply = await served.complete(return_token_ids=True, max_tokens=2)
    assert reply["choices"][0]["token_ids"] == served.tokenizer.encode("the quick", add_special_tokens=False)
    assert reply["choices"][0]["prompt_token_ids"] == [1, 264, 284]


async def test_stop_string_ends_and_aborts(served: Served) -> None:
    served.client.output = "the quick brown fox jumps over"
    reply = await served.complete(stop="brown", max_tokens=50)
    choice = reply["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("the quick ", "stop", "brown")
    assert len(served.client.aborted) == 1 and not served.client.finished
    assert served.registry.leases == []


async def test_special_tokens_in_the_text(served: Served) -> None:
    served.client.output = [264, 4, 284, 284]
    assert (await served.complete(max_tokens=3))["choices"][0]["text"] == "the cat"
    reply = await served.complete(max_tokens=3, skip_special_tokens=False)
    assert reply["choices"][0]["text"] == "the<|user|> cat"


async def test_streamed_pieces_make_up_the_reply(served: Served) -> None:
    served.client.output = "the quick 你好 👋 fox"
    whole = await served.complete(max_tokens=40, logprobs=1, echo=True)
    reply = await served.post(
        "/v1/completions",
        {"model": "base", "prompt": "the cat", "max_tokens": 40, "logprobs": 1, "echo": True, "stream": True},
    )
    *chunks, done = events(reply)
    assert done == "[DONE]"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [item for choice in choices for item in choice["logprobs"][key]]
        assert streamed == whole["choices"][0]["logprobs"][key]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_one_failure_ends_all_choices(served: Served) -> None:
    served.client.finish = ("error", "out of memory")
    error = await served.error("/v1/completions", {"model": "a", "prompt": ["x", "y"], "n": 2}, 503)
    assert error["message"] == "out of memory"
    assert served.registry.leases == []
