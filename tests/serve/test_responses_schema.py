"""Checks replies against the published schemas: the fields of Open Responses (openresponses.org) and OpenAI's OpenAPI.

The table has every field that either of them requires, with its allowed types. If they differ (the events of reasoning, tools
that are not functions), it follows OpenAI's, which its clients parse. The cases are those of Open Responses' compliance
suite, which is not on a package registry. Here the model's output is scripted, so that each case has one right answer.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted
from tests.serve.test_responses import PATCH, TOOLS, spoken

TEXT, INTEGER, NUMBER, TRUTH, LIST, OBJECT, NULL = str, int, float, bool, list, dict, type(None)
RESPONSE: dict[str, Any] = {
    "id": TEXT,
    "object": "response",
    "created_at": INTEGER,
    "completed_at": (INTEGER, NULL),
    "status": TEXT,
    "incomplete_details": ({"reason": TEXT}, NULL),
    "model": TEXT,
    "previous_response_id": (TEXT, NULL),
    "instructions": (TEXT, NULL),
    "output": LIST,
    "error": ({"code": TEXT, "message": TEXT}, NULL),
    "tools": LIST,
    "tool_choice": (TEXT, OBJECT),
    "truncation": ("auto", "disabled"),
    "parallel_tool_calls": TRUTH,
    "text": {"format": {"type": TEXT}},
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "top_logprobs": INTEGER,
    "temperature": NUMBER,
    "reasoning": ({"effort": (TEXT, NULL), "summary": (TEXT, NULL)}, NULL),
    "usage": (
        {
            "input_tokens": INTEGER,
            "output_tokens": INTEGER,
            "total_tokens": INTEGER,
            "input_tokens_details": {"cached_tokens": INTEGER},
            "output_tokens_details": {"reasoning_tokens": INTEGER},
        },
        NULL,
    ),
    "max_output_tokens": (INTEGER, NULL),
    "max_tool_calls": (INTEGER, NULL),
    "store": TRUTH,
    "background": TRUTH,
    "service_tier": TEXT,
    "metadata": OBJECT,
    "safety_identifier": (TEXT, NULL),
    "prompt_cache_key": (TEXT, NULL),
}
TOOL_FIELDS = {
    "function": {"name": TEXT, "description": (TEXT, NULL), "parameters": (OBJECT, NULL), "strict": (TRUTH, NULL)},
    "custom": {"name": TEXT},
    "namespace": {"name": TEXT, "tools": LIST},
    "web_search": {},
}
FORMATS: dict[str, Any] = {
    "text": {},
    "json_object": {},
    "json_schema": {"name": TEXT, "description": (TEXT, NULL), "schema": OBJECT, "strict": TRUTH},
}
STATUS = ("in_progress", "completed", "incomplete")
ITEMS: dict[str, Any] = {
    "message": {"id": TEXT, "status": STATUS, "role": "assistant", "content": LIST},
    "reasoning": {"id": TEXT, "summary": LIST, "content": LIST},
    "function_call": {"id": TEXT, "call_id": TEXT, "name": TEXT, "arguments": TEXT, "status": STATUS},
    "custom_tool_call": {"id": TEXT, "call_id": TEXT, "name": TEXT, "input": TEXT},
    "compaction": {"id": TEXT, "encrypted_content": TEXT},
}
PARTS: dict[str, Any] = {
    "output_text": {"text": TEXT, "annotations": LIST, "logprobs": LIST},
    "reasoning_text": {"text": TEXT},
}
TOKEN: dict[str, Any] = {"token": TEXT, "logprob": NUMBER, "bytes": LIST}
ITEM = {"item_id": TEXT, "output_index": INTEGER}
EVENTS: dict[str, Any] = {
    **{each: {"response": OBJECT} for each in ("created", "in_progress", "completed", "incomplete", "failed")},
    "output_item.added": {"output_index": INTEGER, "item": OBJECT},
    "output_item.done": {"output_index": INTEGER, "item": OBJECT},
    "content_part.added": {**ITEM, "content_index": INTEGER, "part": OBJECT},
    "content_part.done": {**ITEM, "content_index": INTEGER, "part": OBJECT},
    "output_text.delta": {**ITEM, "content_index": INTEGER, "delta": TEXT, "logprobs": LIST},
    "output_text.done": {**ITEM, "content_index": INTEGER, "text": TEXT, "logprobs": LIST},
    "reasoning_text.delta": {**ITEM, "content_index": INTEGER, "delta": TEXT},
    "reasoning_text.done": {**ITEM, "content_index": INTEGER, "text": TEXT},
    "function_call_arguments.delta": {**ITEM, "delta": TEXT},
    "function_call_arguments.done": {**ITEM, "name": TEXT, "arguments": TEXT},
    "custom_tool_call_input.delta": {**ITEM, "delta": TEXT},
    "custom_tool_call_input.done": {**ITEM, "input": TEXT},
}


def check(value: Any, kind: Any, place: str) -> None:
    """Checks that a value is of a type, equals a text, has an object's fields, or matches one of several of these."""
    if isinstance(kind, tuple):
        errors = []
        for each in kind:
            try:
                return check(value, each, place)
            except AssertionError as error:
                errors.append(str(error))
        raise AssertionError("; ".join(errors))
    if isinstance(kind, dict):
        assert isinstance(value, dict), f"{place} is no object: {value!r}"
        for name, inner in kind.items():
            assert name in value, f"{place}.{name} is missing"
            check(value[name], inner, f"{place}.{name}")
    elif isinstance(kind, str):
        assert value == kind, f"{place} is {value!r}, not {kind!r}"
    else:
        right = isinstance(value, (int, float) if kind is NUMBER else kind) and (
            kind is TRUTH or not isinstance(value, bool)
        )
        assert right, f"{place} is {value!r}, no {kind.__name__}"
    return None


def check_typed(value: Any, table: dict[str, Any], place: str) -> None:
    assert value["type"] in table, f"{place}: {value['type']}"
    check(value, table[value["type"]], place)


def check_part(part: Any, place: str) -> None:
    check_typed(part, PARTS, place)
    for each in part.get("logprobs", ()):
        check(each, {**TOKEN, "top_logprobs": LIST}, place)
        for top in each["top_logprobs"]:
            check(top, TOKEN, place)


def check_item(item: Any, place: str = "item") -> None:
    check_typed(item, ITEMS, place)
    for part in item.get("content", ()):
        check_part(part, f"{place}.content")


def check_response(response: Any) -> None:
    check(response, RESPONSE, "response")
    check_typed(response["text"]["format"], FORMATS, "response.text.format")
    for each in response["tools"]:
        check_typed(each, TOOL_FIELDS, "response.tools")
    for each in response["output"]:
        check_item(each)


def check_events(events: list[dict[str, Any]]) -> None:
    table = {f"response.{name}": {"sequence_number": INTEGER, **fields} for name, fields in EVENTS.items()}
    for each in events:
        check_typed(each, table, each["type"])
        if "response" in each:
            check_response(each["response"])
        if "item" in each:
            check_item(each["item"])
        if "part" in each:
            check_part(each["part"], each["type"])
        for value in each.get("logprobs", ()):
            check(value, {"token": TEXT, "logprob": NUMBER, "top_logprobs": LIST}, each["type"])


def asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The checked whole response; also checks that the streamed response is equal, and checks its events."""
    whole = httpx.post(f"{url}/v1/responses", json={"model": "tiny", **body}, timeout=60)
    assert whole.status_code == 200, whole.text
    check_response(whole.json())
    reply = httpx.post(f"{url}/v1/responses", json={"model": "tiny", **body, "stream": True}, timeout=60)
    events = [json.loads(each.partition("data: ")[2]) for each in reply.text.strip().split("\n\n")]
    check_events(events)
    last = events[-1]["response"]
    assert last["status"] == whole.json()["status"]
    assert [each["type"] for each in last["output"]] == [each["type"] for each in whole.json()["output"]]
    return dict(last)


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather at a place",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
BRIEF = {"type": "function", "name": "get_weather"}
PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


def user(content: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": content}


@pytest.mark.parametrize(
    ("body", "says", "kinds"),
    [
        ({"input": [user("Say hello.")]}, "Hello there, friend.", ["message"]),
        ({"input": [{"type": "message", "role": "system", "content": "A pirate."}, user("Hi.")]}, "Arr.", ["message"]),
        ({"input": [user("And?")], "tools": [WEATHER]}, spoken("get_weather", location="Bern"), ["function_call"]),
        ({"input": [user("And?")], "tools": [BRIEF]}, "I look." + spoken("get_weather"), ["message", "function_call"]),
        ({"input": [user([{"type": "input_text", "text": "See:"}, PICTURE])]}, "I cannot.", ["message"]),
        ({"input": [user("A."), {"role": "assistant", "content": "B."}, user("C?")]}, "D.", ["message"]),
        ({"input": "x", "tools": TOOLS}, spoken("apply_patch", input=PATCH), ["custom_tool_call"]),
        ({"input": [user("x"), {"type": "compaction_trigger"}]}, "", ["compaction"]),
    ],
    ids=("basic", "system", "tool", "tool without fields", "image", "turns", "custom tool", "compaction"),
)
def test_the_compliance_cases_hold(body: dict[str, Any], says: str, kinds: list[str]) -> None:
    with running(scripted(ScriptedEngine(says))) as url:
        response = asked(url, body)
    assert response["status"] == "completed" and [each["type"] for each in response["output"]] == kinds


def test_reasoning_and_an_incomplete_response_hold(address: str) -> None:
    script = ScriptedEngine("<think>\nhm\n</think>\n\nTEXT")
    script.tokenizer = byte_tokenizer(template=TEMPLATE + "{#- </think> #}")
    with running(scripted(script)) as url:
        assert [each["type"] for each in asked(url, {"input": "x"})["output"]] == ["reasoning", "message"]
    cut = asked(address, {"input": "x", "max_output_tokens": 3, "top_logprobs": 2})
    assert cut["status"] == "incomplete" and cut["incomplete_details"]["reason"] == "max_output_tokens"


def test_a_failed_response_holds() -> None:
    with running(scripted(ScriptedEngine("x", fails=True))) as url:
        reply = httpx.post(f"{url}/v1/responses", json={"model": "tiny", "input": "x", "stream": True})
    events = [json.loads(each.partition("data: ")[2]) for each in reply.text.strip().split("\n\n")]
    check_events(events)
    assert events[-1]["response"]["status"] == "failed" and events[-1]["response"]["store"] is False


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("body", "echo"),
    [
        (
            {},
            {
                "presence_penalty": 0,
                "frequency_penalty": 0,
                "top_logprobs": 0,
                "max_tool_calls": None,
                "safety_identifier": None,
                "prompt_cache_key": None,
                "truncation": "disabled",
                "store": True,
                "text": {"format": {"type": "text"}},
                "tools": [],
            },
        ),
        (
            {
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                "top_logprobs": 3,
                "max_tool_calls": 2,
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "truncation": "auto",
                "store": False,
                "metadata": {"a": "b"},
                "tools": [{"type": "function", "name": "f"}],
                "tool_choice": "none",
                "parallel_tool_calls": False,
                "instructions": "Be brief.",
                "reasoning": {"effort": "low"},
            },
            {"tools": [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}]}
            | {"reasoning": {"effort": "low", "summary": None}},
        ),
        (
            {"text": {"format": {"type": "json_object"}, "verbosity": "low"}},
            {},
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"}}},
            {},
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}},
            {
                "text": {
                    "format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": False, "description": None}
                }
            },
        ),
    ],
)  # fmt: skip
def test_a_response_repeats_what_was_asked(address: str, body: dict[str, Any], echo: dict[str, Any]) -> None:
    response = asked(address, {"input": "x", "max_output_tokens": 40, **body})
    for name, value in {**body, **echo}.items():
        assert response[name] == value, name
