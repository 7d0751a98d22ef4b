"""Anthropic's structured output under its two names, and its effort; replies pass its client's strict mode."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted
from tests.serve.test_messages import CALL, HELLO, TOOLS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "schema": SCHEMA}
UNKNOWN = {"type": "json_schema", "schema": {"type": "array", "items": {}, "uniqueItems": True}}


@pytest.fixture
def client(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.mark.parametrize("asked", [{"output_config": {"format": FORMAT, "effort": "low"}}, {"output_format": FORMAT}])
def test_the_text_is_held_to_the_schema(client: anthropic.Anthropic, asked: dict[str, Any]) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "extra_body": asked}
    whole: Any = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        streamed: Any = stream.get_final_message()
    for reply in (whole, streamed):
        (block,) = reply.content
        answer = json.loads(block.text)
        assert set(answer) == {"colour", "sure"} and answer["colour"] in ("red", "green")
        assert isinstance(answer["sure"], bool) and reply.stop_reason == "end_turn"
    assert whole.content[0].text == streamed.content[0].text


def test_the_clients_own_parsing_gets_its_class(client: anthropic.Anthropic) -> None:
    pydantic = pytest.importorskip("pydantic")
    answer_class = pydantic.create_model("Answer", sure=(bool, ...))
    reply = client.messages.parse(model="tiny", messages=HELLO, max_tokens=200, output_format=answer_class)
    assert isinstance(reply.parsed_output, answer_class)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "output_format"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"output_format": {"type": "grammar", "schema": SCHEMA}}, "output_format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"enum": 3}}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema", "schema": 3}}, "output_format.schema"),
        ({"output_config": {"effort": "most"}}, "output_config.effort"),
    ],
)
def test_what_cannot_be_enforced_is_refused(address: str, asked: dict[str, Any], words: str) -> None:
    body = {"model": "tiny", "messages": HELLO, **asked}
    for path, more in (("/v1/messages", {"max_tokens": 9}), ("/v1/messages/count_tokens", {})):
        reply = httpx.post(address + path, json={**body, **more})
        assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text


@pytest.mark.parametrize("asked", [{"output_config": {"format": UNKNOWN}}, {"output_format": UNKNOWN}])
def test_a_keyword_that_cannot_be_enforced_is_named(address: str, asked: dict[str, Any]) -> None:
    reply = httpx.post(f"{address}/v1/messages", json={"model": "tiny", "messages": HELLO, "max_tokens": 9, **asked})
    assert reply.status_code == 400 and "uniqueItems" in reply.json()["error"]["message"], reply.text


def test_null_asks_for_nothing(client: anthropic.Anthropic) -> None:
    options: Any = {"model": "tiny", "messages": HELLO}
    free: Any = client.messages.create(**options, max_tokens=9)
    for asked in ({"output_config": {"format": None, "effort": None}}, {"output_config": None, "output_format": None}):
        assert client.messages.create(**options, max_tokens=9, extra_body=asked).content == free.content
    counted = [client.messages.count_tokens(**options, extra_body=each) for each in ({}, {"output_format": FORMAT})]
    assert counted[0] == counted[1]


def test_the_effort_goes_to_the_template_and_leaves_reasoning_to_the_model() -> None:
    script = ScriptedEngine("Done.")
    script.tokenizer = byte_tokenizer(template=TEMPLATE + "{{- reasoning_effort }}:{{ enable_thinking }}")
    asked: list[dict[str, Any]] = [
        {"output_config": {"effort": "max"}},
        {"output_config": {"effort": "low"}, "thinking": {"type": "disabled"}},
        {},
    ]
    with running(scripted(script)) as url:
        for each in asked:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 9, **each}
            assert httpx.post(f"{url}/v1/messages", json=body).status_code == 200
    ends = [script.tokenizer.decode(each.prompt).rpartition("assistant\n")[2] for each in script.requests]
    assert ends == ["max:", "low:False", ":"]


def test_every_kind_of_reply_is_read_strictly() -> None:
    template = TEMPLATE + "{#- <think></think> #}"
    script = ScriptedEngine(f"<think>\nHm.\n</think>\n\nI read.\n{CALL}")
    script.tokenizer = byte_tokenizer(template=template)
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 500, "tools": TOOLS}
    with (
        running(scripted(script)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as client,
    ):
        for made in (client.messages, client.beta.messages):
            messages: Any = made
            whole = messages.create(**options)
            assert messages.create(**{**options, "stop_sequences": ["I read"]}).stop_reason in (
                "tool_use",
                "stop_sequence",
            )
            kinds = [each.type for each in messages.create(**options, stream=True)]
            with messages.stream(**options) as stream:
                streamed = stream.get_final_message()
            for reply in (whole, streamed):
                assert [each.type for each in reply.content] == ["thinking", "text", "tool_use"]
                assert reply.stop_reason == "tool_use" and reply.usage.output_tokens_details.thinking_tokens > 0
                assert reply.stop_details is None and reply.container is None
            assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
            assert messages.count_tokens(model="tiny", messages=HELLO, tools=TOOLS).input_tokens > 0
