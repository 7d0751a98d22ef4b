"""Chat completions through OpenAI's own client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from paceline.types import Request, Sampling
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, tiny, tiny_service

HELLO: list[Any] = [{"role": "user", "content": "Hello there, who are you?"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "read", "description": "Reads.", "parameters": {"type": "object"}}}
]
CALLS = 'Reading.\n<tool_call>\n{"name": "read", "arguments": {"path": "a é.py"}}\n</tool_call>'


def expected(text_prompt: str | None = None, **sampling: Any) -> str:
    engine = tiny()
    tokenizer = engine.tokenizer
    prompt = tokenizer.encode_chat(HELLO) if text_prompt is None else tokenizer.encode(text_prompt)
    return engine.generate([Request(prompt, Sampling(**sampling))])[0].text


def test_a_reply_is_the_engines_own_words(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=40)
    assert reply.choices[0].message.content == expected(max_tokens=40)
    assert reply.choices[0].finish_reason == "length" and reply.usage is not None
    assert reply.usage.completion_tokens == 40
    assert reply.usage.prompt_tokens == len(byte_tokenizer().encode_chat(HELLO))


def test_streamed_and_whole_replies_are_the_same(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "temperature": 0.8, "seed": 7, "top_p": 0.9}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert text == whole.choices[0].message.content
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == whole.choices[0].finish_reason
    assert not chunks[-1].choices and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(each.usage is None for each in chunks[:-1])
    cached = chunks[-1].usage.prompt_tokens_details
    assert cached is not None and cached.cached_tokens > 0  # the second request finds the prompt's pages in the cache


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = expected(max_tokens=40)
    stop = whole[10:12]
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=40, stop=[stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logprobs_come_with_their_alternatives(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options)
    values = whole.choices[0].logprobs
    assert values is not None and values.content is not None and len(values.content) == 12
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in values.content)
    streamed = []
    for chunk in client.chat.completions.create(**options, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [each.bytes for each in streamed] == [each.bytes for each in values.content]


def test_a_prediction_changes_counts_and_no_words() -> None:
    words = expected(max_tokens=60)
    served = running(tiny_service(tiny(fixed_draft=16)))
    with served as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=60)
        helped = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=60, prediction={"type": "content", "content": words}
        )
    assert helped.choices[0].message.content == plain.choices[0].message.content == words
    assert plain.usage is not None and helped.usage is not None
    before, after = plain.usage.completion_tokens_details, helped.usage.completion_tokens_details
    assert before is not None and before.accepted_prediction_tokens == 0
    assert after is not None and (after.accepted_prediction_tokens or 0) > 0


def test_a_biased_token_is_the_only_one_written(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, logit_bias={"65": 100})
    assert reply.choices[0].message.content == "AAAAA"


def test_tool_calls_come_whole_and_in_order() -> None:
    script = ScriptedEngine(f"{CALLS}\n{CALLS.removeprefix('Reading.')}")
    with running(scripted(script)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
        whole = client.chat.completions.create(**options).choices[0]
        assert whole.finish_reason == "tool_calls" and whole.message.content == "Reading."
        calls: Any = whole.message.tool_calls
        assert [json.loads(each.function.arguments) for each in calls] == [{"path": "a é.py"}] * 2
        with client.chat.completions.stream(**options) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.message.content == "Reading." and final.finish_reason == "tool_calls"
        streamed: Any = final.message.tool_calls
        assert [(each.function.name, each.function.arguments) for each in streamed] == [
            (each.function.name, each.function.arguments) for each in calls
        ]
        assert len({each.id for each in [*streamed, *calls]}) == 4
        # the next turn begins with the prompt of the first and what the model wrote
        history = [
            *HELLO,
            {"role": "assistant", "tool_calls": [each.model_dump() for each in calls], "content": "Reading."},
            {"role": "tool", "tool_call_id": calls[0].id, "content": "text"},
        ]
        client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
        first, last = script.requests[0].prompt, script.requests[-1].prompt
        assert last[: len(first)] == first
        # without tools, the same words are text
        plain = client.chat.completions.create(model="tiny", messages=HELLO).choices[0]
        assert plain.finish_reason == "stop" and (plain.message.content or "").startswith(CALLS)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"model": "tiny"}', None),
        (b'{"model": "tiny", "messages": []}', "messages"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": 3}]}', "messages[0].content"),
        (b'{"model": "tiny", "messages": [{"role": "robot", "content": "x"}]}', "messages[0].role"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages[0].content[0]",
        ),
        (b'{"model": "tiny", "n": 9, "messages": [{"role": "user", "content": "x"}]}', "n"),
        (b'{"model": "tiny", "max_tokens": 0, "messages": [{"role": "user", "content": "x"}]}', "max_tokens"),
        (b'{"model": "tiny", "temperature": "hot", "messages": [{"role": "user", "content": "x"}]}', "temperature"),
        (b'{"model": "tiny", "temperature": -1, "messages": [{"role": "user", "content": "x"}]}', None),
        (b'{"model": "tiny", "logit_bias": {"x": 1}, "messages": [{"role": "user", "content": "x"}]}', "logit_bias"),
        (b'{"model": "tiny", "top_logprobs": 1, "messages": [{"role": "user", "content": "x"}]}', "top_logprobs"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}', None),
    ],
)
def test_a_malformed_body_is_a_400_that_names_the_field(address: str, body: bytes, field: str | None) -> None:
    reply = httpx.post(f"{address}/v1/chat/completions", content=body)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error", reply.text
    assert field is None or error["param"] == field


def test_errors_have_openais_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="x")
    long: Any = [{"role": "user", "content": "x" * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=long, stream=True)
    assert caught.value.code == "context_length_exceeded"
    # by this code LiteLLM (and so aider) detects the error
    assert re.search(r"this model's maximum context length is \d+ tokens", str(caught.value))


def test_only_one_call_is_made_where_they_are_not_to_be_parallel() -> None:
    script = ScriptedEngine(f"{CALLS}\n{CALLS}\nNo more.")
    chat = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "parallel_tool_calls": False}
    tools = [{"name": "read", "input_schema": {"type": "object"}}]
    one = {"type": "auto", "disable_parallel_tool_use": True}
    message = {"model": "tiny", "max_tokens": 500, "messages": HELLO, "tools": tools, "tool_choice": one}
    with running(scripted(script)) as url:
        for extra in ({}, {"parallel_tool_calls": True}):
            reply = httpx.post(f"{url}/v1/chat/completions", json=chat | extra).json()
            assert len(reply["choices"][0]["message"]["tool_calls"]) == 1 + bool(extra)
            assert reply["choices"][0]["finish_reason"] == "tool_calls"
        streamed = httpx.post(f"{url}/v1/chat/completions", json=chat | {"stream": True}).text
        assert streamed.count('"tool_calls":[') == 1 and "No more" not in streamed
        reply = httpx.post(f"{url}/v1/messages", json=message).json()
        assert [each["type"] for each in reply["content"]] == ["text", "tool_use"] and reply[
            "stop_reason"
        ] == "tool_use"
