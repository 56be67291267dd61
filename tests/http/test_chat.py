"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.conftest import Serve, Served, events
from tests.http.fakes import MAX_MODEL_LEN, byte_level_tokenizer
from weft.server.tokenization import Tokenizer

USER = {"role": "user", "content": "hi"}


def prompt_text(served: Served) -> str:
    return served.tokenizer.decode(served.client.requests[-1].prompt_token_ids)


async def test_shape_of_a_reply(served: Served) -> None:
    reply = await served.chat(model="a", max_tokens=3)
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion" and reply["model"] == "a"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "the quick brown", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert reply["usage"]["prompt_tokens"] == len(served.client.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], "<s><|user|>hi</s><|assistant|>"),
        ([{"role": "system", "content": "be"}, USER], "<s><|system|>be</s><|user|>hi</s><|assistant|>"),
        ([{"role": "developer", "content": "be"}, USER], "<s><|system|>be</s><|user|>hi</s><|assistant|>"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "<s><|user|>a\nb</s><|assistant|>",
        ),
        (
            [USER, {"role": "tool", "tool_call_id": "c", "content": "4"}],
            "<s><|user|>hi</s><|tool|>4</s><|assistant|>",
        ),
        (
            # What the openai library's own message objects look like when sent back.
            [USER, {"role": "assistant", "content": "yo", "refusal": None, "audio": None, "tool_calls": None}, USER],
            "<s><|user|>hi</s><|assistant|>yo</s><|user|>hi</s><|assistant|>",
        ),
    ],
)
async def test_messages_become_the_prompt(served: Served, messages: list[Any], expected: str) -> None:
    await served.chat(messages=messages)
    assert prompt_text(served) == expected


async def test_tool_calls_reach_the_template_as_objects(serve: Serve) -> None:
    template = "{% for c in messages[-1].tool_calls %}{{ c.function.arguments.x + 1 }}{% endfor %}"
    served = serve(tokenizer=Tokenizer(byte_level_tokenizer(chat_template=template), max_model_len=MAX_MODEL_LEN))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 41}'}}
    await served.chat(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert prompt_text(served) == "42"
    call["function"]["arguments"] = "{x"  # type: ignore[index]
    body = {"model": "base", "messages": [{"role": "assistant", "tool_calls": [call]}]}
    assert (await served.error("/v1/chat/completions", body, 400))["param"] == "messages"


async def test_continue_final_message(served: Served) -> None:
    messages = [USER, {"role": "assistant", "content": "well"}]
    await served.chat(messages=messages, continue_final_message=True)
    assert prompt_text(served) == "<s><|user|>hi</s><|assistant|>well"
    await served.chat(messages=messages, add_generation_prompt=False)
    assert prompt_text(served) == "<s><|user|>hi</s><|assistant|>well</s>"
    body = {"model": "base", "messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert (await served.error("/v1/chat/completions", body, 400))["param"] == "continue_final_message"


async def test_template_variables(served: Served) -> None:
    await served.chat(chat_template_kwargs={"shout": True})
    assert prompt_text(served).endswith("!")
    for name in ("unknown", "messages", "chat_template", "tokenize", "bos_token", "x y", ""):
        body = {"model": "base", "messages": [USER], "chat_template_kwargs": {name: "x"}}
        assert (await served.error("/v1/chat/completions", body, 400))["param"] == "chat_template_kwargs"


async def test_add_special_tokens(served: Served) -> None:
    await served.chat(add_special_tokens=True)
    assert prompt_text(served) == "<s><s><|user|>hi</s><|assistant|>"


async def test_what_the_template_refuses(served: Served) -> None:
    body = {"model": "base", "messages": [{"role": "tool", "content": "4"}]}
    error = await served.error("/v1/chat/completions", body, 400)
    assert error["param"] == "messages" and "tool_call_id" in error["message"]


async def test_model_without_a_template(serve: Serve) -> None:
    served = serve(tokenizer=Tokenizer(byte_level_tokenizer(chat_template=None), max_model_len=MAX_MODEL_LEN))
    error = await served.error("/v1/chat/completions", {"model": "base", "messages": [USER]}, 400)
    assert error["code"] == "no_chat_template" and "/v1/completions" in error["message"]


async def test_limits_on_tokens(served: Served) -> None:
    await served.chat()
    await served.chat(max_tokens=5)
    await served.chat(max_tokens=5, max_completion_tokens=3)
    assert [request.params.max_tokens for request in served.client.requests] == [None, 5, 3]


async def test_logprobs(served: Served) -> None:
    served.client.output = "你"
    reply = await served.chat(logprobs=True, top_logprobs=2, max_tokens=3)
    content = reply["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "你"
    assert content[0]["token"].startswith("bytes:\\x")
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert content[0]["logprob"] == served.client.logprob(served.tokenizer.encode("你")[1])
    reply = await served.chat(logprobs=True, max_tokens=1)
    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_stream(served: Served) -> None:
    body = {"model": "a", "messages": [USER], "n": 2, "stream": True, "max_tokens": 3}
    *chunks, done = events(await served.post("/v1/chat/completions", body))
    assert done == "[DONE]" and {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "the quick brown"
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert [choice["finish_reason"] for choice in mine[1:]] == [None, None, "length"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_token_ids(served: Served) -> None:
    prompt = served.tokenizer.encode("<s><|user|>hi</s><|assistant|>", add_special_tokens=False)
    output = served.tokenizer.encode("the quick", add_special_tokens=False)
    reply = await served.chat(return_token_ids=True, max_tokens=2)
    assert reply["prompt_token_ids"] == prompt and reply["choices"][0]["token_ids"] == output
    body = {"model": "a", "messages": [USER], "stream": True, "max_tokens": 2, "return_token_ids": True}
    *chunks, _ = events(await served.post("/v1/chat/completions", body))
    assert chunks[0]["prompt_token_ids"] == prompt and "prompt_token_ids" not in chunks[1]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == output


async def test_prompt_logprobs(served: Served) -> None:
    reply = await served.chat(prompt_logprobs=0, max_tokens=1)
    assert reply["prompt_logprobs"][0] is None and len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
