"""The messages API through Anthropic's own client, and with bodies as Claude Code sends them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import msgspec
import pytest

from paceline.serve.messages_input import MessagesBody, encode
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
TOOLS: list[Any] = [{"name": "Read", "description": "Reads.", "input_schema": {"type": "object"}}]
CALL = '<tool_call>\n{"name": "Read", "arguments": {"file_path": "é.py", "limit": 3}}\n</tool_call>'


@pytest.fixture
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as made:
        yield made


def test_streamed_and_whole_messages_are_the_same(client: anthropic.Anthropic) -> None:
    options: Any = {"model": "claude-any", "messages": HELLO, "max_tokens": 40, "system": "Be brief."}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert [each.type for each in whole.content] == ["text"]
    assert streamed.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    count = client.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.").input_tokens
    for each in (whole, streamed):
        assert each.usage.input_tokens + (each.usage.cache_read_input_tokens or 0) == count
        assert each.usage.output_tokens == 40
    assert streamed.usage.cache_read_input_tokens


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 40}
    text: str = client.messages.create(**options).content[0].text  # type: ignore[union-attr]
    stop = text[8:10]
    reply = client.messages.create(**options, stop_sequences=["never that", stop])
    assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", stop)
    assert reply.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]


def test_a_limit_beyond_the_context_is_cut_to_it(client: anthropic.Anthropic) -> None:
    big: list[Any] = [{"role": "user", "content": "x" * 1900}]
    reply = client.messages.create(model="tiny", messages=big, max_tokens=9000)
    assert reply.stop_reason == "model_context_window_exceeded"


def test_events_come_in_their_order() -> None:
    with running(scripted(ScriptedEngine(f"I read.\n{CALL}\n{CALL}"))) as url:
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 500, "tools": TOOLS, "stream": True}
        reply = httpx.post(f"{url}/v1/messages?beta=true", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [each.split("\n") for each in reply.text.strip().split("\n\n")]
        names = [name.removeprefix("event: ") for name, _ in events]
        data = [json.loads(line.removeprefix("data: ")) for _, line in events]
        assert names == [each["type"] for each in data]
        squeezed = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
        block = ["content_block_start", "content_block_delta", "content_block_stop"]
        assert squeezed == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
        starts = [each for each in data if each["type"] == "content_block_start"]
        assert [each["index"] for each in starts] == [0, 1, 2]
        assert starts[0]["content_block"] == {"type": "text", "text": ""}
        assert starts[1]["content_block"]["input"] == {}
        raw = httpx.post(f"{url}/v1/messages", json={**body, "stream": False}).json()
        assert raw["content"][0] == {
            "type": "text",
            "text": "I read.",
        }  # without `citations: null`, which the AI SDK refuses

        with anthropic.Anthropic(base_url=url, auth_token="none") as client:
            options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 500, "tools": TOOLS}
            whole: Any = client.messages.create(**options)
            with client.messages.stream(**options) as stream:
                streamed: Any = stream.get_final_message()
        for each in (whole, streamed):
            assert [part.type for part in each.content] == ["text", "tool_use", "tool_use"]
            assert each.content[0].text == "I read." and each.stop_reason == "tool_use"
            assert each.content[2].input == {"file_path": "é.py", "limit": 3}


def claude_code_turns() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two turns as Claude Code sends them: a billing block, a system message after the first user message, and a
    `cache_control` that moves: a message with it is a list of blocks, and a string in other turns."""
    mark = {"cache_control": {"type": "ephemeral"}}
    first: dict[str, Any] = {
        "model": "claude-x",
        "max_tokens": 32000,
        "stream": True,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": []},
        "metadata": {"user_id": "{}"},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.331.471; cch=1a2b;"},
            {"type": "text", "text": "You are a coding agent.", **mark},
            {"type": "text", "text": "Work well.", **mark},
        ],
        "tools": [{**TOOLS[0], "defer_loading": True}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "<system-reminder>date"}, {"type": "text", "text": "Fix it."}],
            },
            {"role": "system", "content": [{"type": "text", "text": "Agents: none.", **mark}]},
        ],
    }
    second = copy.deepcopy(first)
    second["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1.331.08c; cch=ffff;"
    second["messages"][1]["content"] = "Agents: none."
    second["messages"] += [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I read."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"file_path": "a.py"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "1 x"}], **mark},
                {"type": "text", "text": "<system-reminder>go on</system-reminder>"},
            ],
        },
        {"role": "system", "content": "Later news."},
    ]
    return first, second


def test_a_turns_prompt_is_the_beginning_of_the_next() -> None:
    tokenizer = byte_tokenizer()
    turns = [msgspec.convert(each, MessagesBody) for each in claude_code_turns()]
    first, second = (encode(tokenizer, each) for each in turns)
    assert second[: len(first)] == first and len(second) > len(first)
    text = tokenizer.decode(second, skip_special=False)
    assert "billing" not in text and "Later news." in text and text.count("<|im_start|>system") == 1


def test_a_claude_code_body_is_served() -> None:
    script = ScriptedEngine(f"I read.\n{CALL}", "Done.")
    with running(scripted(script)) as url:
        for body in claude_code_turns():
            assert httpx.post(f"{url}/v1/messages?beta=true", json=body).status_code == 200
            counted = {key: body[key] for key in ("model", "messages", "tools")}
            assert httpx.post(f"{url}/v1/messages/count_tokens?beta=true", json=counted).json()["input_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, "at least one"),
        ({"messages": 3}, "messages"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "none"}}, "tool_choice"),
        ({"temperature": -1.0}, "temperature"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, " tokens > 2047 maximum"),
    ],
)
def test_errors_have_anthropics_form(address: str, change: dict[str, Any], words: str) -> None:
    reply = httpx.post(f"{address}/v1/messages", json={"model": "tiny", "messages": HELLO, "max_tokens": 9, **change})
    body = reply.json()
    assert reply.status_code == 400 and body["type"] == "error", body
    assert body["error"]["type"] == "invalid_request_error" and words in body["error"]["message"]


def test_an_unknown_model_is_anthropics_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="gpt"):
        client.messages.create(model="gpt", messages=HELLO, max_tokens=5)


def test_half_a_character_in_a_call_and_an_image_from_a_tool() -> None:
    script = ScriptedEngine('<tool_call>\n{"name": "f", "arguments": {"a": "\\ud83d"}}\n</tool_call>')
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    shown: list[Any] = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": [image]}]},
    ]
    with running(scripted(script)) as url:
        body = {"model": "tiny", "max_tokens": 99, "messages": shown, "tools": tools}
        reply = httpx.post(f"{url}/v1/messages", json=body, timeout=20)
        assert reply.status_code == 200 and b'"input":{"a": "\\ud83d"}' in reply.content
        assert "which this model cannot see" in script.tokenizer.decode(script.requests[0].prompt)
