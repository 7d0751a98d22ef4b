"""The Responses API through OpenAI's own client, checked by its types, and with bodies as Codex sends them."""

from __future__ import annotations

import copy
import itertools
import json
import socket
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from paceline.serve.responses_input import ResponsesBody, ResponsesTools, encode, responses_tools
from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted

GRAMMAR = 'start: "*** Begin Patch" LF'
RUN = {"type": "object", "properties": {"cmd": {"type": "string"}}}
TOOLS: list[Any] = [
    {"type": "function", "name": "exec_command", "description": "Runs.", "strict": False, "parameters": RUN},
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Patches.",
        "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR},
    },
    {
        "type": "namespace",
        "name": "agents",
        "description": "Agents.",
        "tools": [
            {"type": "function", "name": "close", "description": "Closes.", "parameters": {"type": "object"}},
            {"type": "custom", "name": "tell", "description": "Tells."},
        ],
    },
    {"type": "web_search"},
]
PATCH = "*** Begin Patch\n*** Add File: é.txt\n+hi\n*** End Patch\n"


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"properties": value}
    return value


def spoken(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


CALLS = "\n".join(
    (
        "I look — and patch.",
        spoken("exec_command", cmd="echo 'ü' > a"),
        spoken("apply_patch", input=PATCH),
        spoken("agents__close", target="x"),
        spoken("agents__tell", input="go"),
        spoken("unheard_of", x=1),
    )
)


def plain(response: Any) -> dict[str, Any]:
    """A response without the values that differ between equal requests: ids, times, cached tokens."""
    value = response.to_dict()
    for key in ("id", "created_at", "completed_at"):
        del value[key]
    for item in value["output"]:
        assert item.pop("id")
        assert item.pop("call_id", "call")
        item.pop("parsed_arguments", None)  # the client's own
        for part in item.get("content", ()):
            part.pop("parsed", None)
    del value["usage"]["input_tokens_details"]
    return value


def events_of(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a streamed response, each validated by OpenAI's types."""
    reply = httpx.post(f"{url}/v1/responses", json={**body, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream"), reply.text
    found = []
    checker: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
    for each in reply.text.strip().split("\n\n"):
        name, data = each.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        checker.validate_python(found[-1])
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def squeezed(events: list[dict[str, Any]]) -> list[str]:
    """The events' names without `response.`, with runs of equal names merged."""
    names = [each["type"].removeprefix("response.") for each in events]
    return [name for name, before in zip(names, ["", *names], strict=False) if name != before]


MESSAGE = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]


def called(stem: str) -> list[str]:
    return ["output_item.added", f"{stem}.delta", f"{stem}.done", "output_item.done"]


def test_a_cut_off_response_is_incomplete_and_the_same_streamed(client: openai.OpenAI, address: str) -> None:
    options: Any = {"model": "tiny", "input": "Hello there", "max_output_tokens": 30, "temperature": 0.8}
    options |= {"instructions": "Be brief.", "extra_body": {"seed": 7}, "metadata": {"a": "b"}}
    whole = client.responses.create(**options)
    assert whole.status == "incomplete" and whole.usage is not None and whole.usage.output_tokens == 30
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text and whole.output[0].status == "incomplete"  # type: ignore[union-attr]
    last: Any = list(client.responses.create(**options, stream=True))[-1]
    assert last.type == "response.incomplete" and plain(last.response) == plain(whole)
    cached = last.response.usage.input_tokens_details.cached_tokens
    assert 0 < cached < last.response.usage.input_tokens  # the second request finds the prompt's pages in the cache
    body = {"model": "tiny", "input": "Hello there", "max_output_tokens": 30}
    assert squeezed(events_of(address, body)) == ["created", "in_progress", *MESSAGE, "incomplete"]


def test_calls_of_every_kind_are_the_same_streamed_and_whole() -> None:
    script = ScriptedEngine(CALLS)
    with running(scripted(script)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: Any = {"model": "tiny", "input": "Fix it.", "tools": TOOLS}
        whole = client.responses.create(**options)
        pydantic.TypeAdapter(Response).validate_python(whole.to_dict())
        with client.responses.stream(**options) as stream:
            assert plain(stream.get_final_response()) == plain(whole)
        assert whole.status == "completed" and whole.output_text == "I look — and patch."
        shown = [
            (each.type, each.name, getattr(each, "namespace", None), getattr(each, "arguments", None) or each.input)
            for each in whole.output[1:]  # type: ignore[union-attr]
        ]
        assert shown == [
            ("function_call", "exec_command", None, '{"cmd": "echo \'ü\' > a"}'),
            ("custom_tool_call", "apply_patch", None, PATCH),
            ("function_call", "close", "agents", '{"target": "x"}'),
            ("custom_tool_call", "tell", "agents", "go"),
            ("function_call", "unheard_of", None, '{"x": 1}'),
        ]
        assert (
            whole.usage is not None and whole.usage.total_tokens == whole.usage.input_tokens + len(CALLS.encode()) + 1
        )
        assert whole.tools[0].to_dict() == TOOLS[0] and whole.store is True  # type: ignore[attr-defined]
        events = events_of(url, options)
        function, custom = called("function_call_arguments"), called("custom_tool_call_input")
        expected = ["created", "in_progress", *MESSAGE, *function, *custom, *function, *custom, *function, "completed"]
        assert squeezed(events) == expected
        done = [each for each in events if each["type"] == "response.output_item.done"]
        assert [each["output_index"] for each in done] == list(range(6))
        assert [each["item"] for each in done] == events[-1]["response"]["output"]
        # the model must not call tools that it was not given
        silent = client.responses.create(**options, tool_choice="none")
        assert [each.type for each in silent.output] == ["message"] and silent.output_text == CALLS


def test_an_empty_reply_is_an_empty_message() -> None:
    with running(scripted(ScriptedEngine(""))) as url:
        events = events_of(url, {"model": "tiny", "input": "Hello"})
        names = [each for each in MESSAGE if each != "output_text.delta"]
        assert squeezed(events) == ["created", "in_progress", *names, "completed"]
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_a_custom_tools_call_without_its_input_is_shown_as_it_is() -> None:
    with running(scripted(ScriptedEngine(spoken("apply_patch", patch="x")))) as url:
        body = {"model": "tiny", "input": "Hello", "tools": TOOLS}
        item = httpx.post(f"{url}/v1/responses", json=body).json()["output"][0]
        assert (item["type"], item["input"]) == ("custom_tool_call", '{"patch": "x"}')


def test_an_engine_that_fails_ends_the_stream_with_a_failed_response() -> None:
    with running(scripted(ScriptedEngine("x", fails=True))) as url:
        events = events_of(url, {"model": "tiny", "input": "Hello"})
        assert squeezed(events) == ["created", "in_progress", "failed"]
        assert events[-1]["response"]["status"] == "failed"
        assert "engine has stopped" in events[-1]["response"]["error"]["message"]
        assert httpx.post(f"{url}/v1/responses", json={"model": "tiny", "input": "x"}).status_code == 500


def test_a_thought_is_a_reasoning_item() -> None:
    script = ScriptedEngine("<think>\nhm\n</think>\n\nTEXT")
    script.tokenizer = byte_tokenizer(template=TEMPLATE + "{#- </think> #}")
    with running(scripted(script)) as url:
        events = events_of(url, {"model": "tiny", "input": "Hello"})
        thought = [each.replace("output_text", "reasoning_text") for each in MESSAGE]
        assert squeezed(events) == ["created", "in_progress", *thought, *MESSAGE, "completed"]
        response = events[-1]["response"]
        assert [each["content"][0]["text"] for each in response["output"]] == ["hm", "TEXT"]
        assert response["output"][0]["type"] == "reasoning" and response["output"][0]["summary"] == []
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len("<think>\nhm\n</think>")


def message(role: str, *texts: str, kind: str = "input_text") -> dict[str, Any]:
    content = [{"type": kind, "text": each} for each in texts]
    return {"type": "message", "id": f"msg_{len(texts)}", "role": role, "content": content}


def codex_turns() -> list[dict[str, Any]]:
    """Four turns as Codex sends them: each repeats everything before and appends the model's and the tools' output."""
    body: dict[str, Any] = {
        "model": "tiny",
        "stream": True,
        "input": [
            message("developer", "You are a coding agent."),
            message("developer", "Skills: none."),
            message("user", "<environment_context>", "<cwd>/x</cwd>"),
            message("user", "Write hi."),
        ],
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto", "effort": "medium", "context": "all_turns"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a21302",
        "text": {"verbosity": "low"},
        "client_metadata": {"originator": "codex_exec"},
        "service_tier": "auto",
        "stream_options": {"include_obfuscation": False},
        "truncation": "auto",
        "user": "u",
        "safety_identifier": "s",
        "background": False,
        "previous_response_id": None,
    }
    replies: list[list[dict[str, Any]]] = [
        [
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": "abc"},
            message("assistant", "I look.", kind="output_text") | {"status": "completed"},
            {"type": "function_call", "name": "exec_command", "arguments": '{"cmd": "ls"}', "call_id": "c1"},
            {
                "type": "function_call",
                "name": "close",
                "namespace": "agents",
                "arguments": '{"target": "x"}',
                "call_id": "c2",
            },
            {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": "a.py"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "closed"}, {"type": "input_image", "image_url": "data:"}],
            },
        ],
        [
            {"type": "custom_tool_call", "id": "ctc_1", "name": "apply_patch", "input": PATCH, "call_id": "c3"},
            {"type": "custom_tool_call_output", "call_id": "c3", "output": "Done."},
            message("developer", "Mind the time."),
        ],
        [
            message("assistant", "All done.", kind="output_text"),
            message("developer", "News."),
            message("user", "Thanks."),
        ],
    ]
    turns = [body]
    for reply in replies:
        turns.append(copy.deepcopy(turns[-1]))
        turns[-1]["input"] += reply
    return turns


def prompt_of(body: dict[str, Any]) -> list[int]:
    read = msgspec.json.decode(msgspec.json.encode(body), type=ResponsesBody)
    read.check()
    return encode(byte_tokenizer(), read, responses_tools(read))


def test_a_turns_prompt_is_the_beginning_of_the_next() -> None:
    prompts = [prompt_of(each) for each in codex_turns()]
    for first, second in itertools.pairwise(prompts):
        assert second[: len(first)] == first and len(second) > len(first)
    text = byte_tokenizer().decode(prompts[-1], skip_special=False)
    assert text.count("<|im_start|>system") == 1 and "You are a coding agent.\n\nSkills: none." in text
    assert "agents__close" in text and "an image, which this model cannot see" in text
    assert text.count("<|im_start|>assistant\nI look.\n<tool_call>") == 1
    for word in ("web_search", "abc", "01a21302", "fco_1"):
        assert word not in text


def test_what_changes_nothing_leaves_the_prompt_as_it_is() -> None:
    body = {"model": "tiny", "input": [message("user", "Hello")], "tools": TOOLS}
    hosted = [{"type": "tool_search", "execution": "client"}, {"type": "mcp", "server_label": "x"}]
    added = {"type": "additional_tools", "role": "developer", "tools": TOOLS}
    same = [
        {**body, "input": "Hello"},
        {**body, "input": [{"role": "user", "content": "Hello"}]},
        {**body, "input": [message("user", "Hello") | {"id": "msg_other", "status": "completed"}]},
        {**body, "tools": [*TOOLS, *hosted]},
        {**body, "tools": None, "input": [added, message("user", "Hello")]},
    ]
    for each in same:
        assert prompt_of(each) == prompt_of(body)
    system = {"model": "tiny", "input": [message("developer", "Be brief."), message("user", "Hello")]}
    assert prompt_of({"model": "tiny", "input": "Hello", "instructions": "Be brief."}) == prompt_of(system)


def test_what_an_agent_tells_another_is_a_users_message() -> None:
    parts = [{"type": "input_text", "text": "Sender: /root"}, {"type": "encrypted_content", "encrypted_content": "Hi."}]
    told_agent = {"type": "agent_message", "author": "/root", "recipient": "/root/a", "content": parts}
    assert prompt_of({"model": "tiny", "input": [told_agent]}) == prompt_of(
        {"model": "tiny", "input": "Sender: /root\nHi."}
    )


def test_the_model_knows_tools_by_names_of_their_own() -> None:
    tools = [
        {"type": "function", "name": "a__b"},
        {"type": "namespace", "name": "a", "tools": [{"type": "function", "name": "b"}]},
        {"type": "function", "name": "a__b", "description": "again"},
        {"type": "custom", "name": "p", "format": {"type": "grammar", "syntax": "lark", "definition": GRAMMAR}},
    ]
    box = responses_tools(
        msgspec.json.decode(json.dumps({"model": "m", "input": "x", "tools": tools}), type=ResponsesBody)
    )
    assert [each["function"]["name"] for each in box.functions] == ["a__b", "a__b_2", "p"]
    assert box.functions[0]["function"]["description"] == "again"
    for name, client in (("a__b", ("a__b", "")), ("a__b_2", ("b", "a")), ("other", ("other", ""))):
        found = box.client_tool(name)
        assert (found.name, found.namespace, found.custom) == (*client, False) and box.model_name(found) == name
    patch = box.functions[2]["function"]
    assert GRAMMAR in patch["description"] and patch["parameters"]["required"] == ["input"]
    assert ResponsesTools([]).functions == []


def test_codex_bodies_are_served() -> None:
    script = ScriptedEngine(CALLS, "Done.")
    script.config = replace(script.config, max_context=100_000)
    with running(scripted(script)) as url:
        for body in codex_turns():
            assert events_of(url, body)[-1]["type"] == "response.completed"
        first, last = script.requests[0].prompt, script.requests[-1].prompt
        assert last[: len(first)] == first


def test_an_upgrade_is_refused_at_once_with_426(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    lines = (
        "GET /v1/responses HTTP/1.1",
        f"Host: {host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        reply = b""
        while part := connection.recv(4096):
            reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 426 ") and "POST /v1/responses" in json.loads(body)["error"]["message"]
    assert httpx.get(f"{address}/v1/responses").status_code == 405


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{}]}, "input[0].role"),
        ({"input": [{"type": 3}]}, "input[0].type"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"text": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 3}]}, "input[0].output"),
        ({"input": [{"type": "custom_tool_call", "call_id": "c", "name": "a", "input": 3}]}, "input[0].input"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "a", "arguments": [1]}]}, "input[0].arguments"),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, "input"),
        ({"input": [{"type": "additional_tools", "tools": [{"name": "x"}]}]}, "input[0].tools[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True}, "background"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"truncation": "middle"}, "truncation"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 3}, "logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"n": 2}, "n"),
        ({"prompt_cache_key": 3}, "prompt_cache_key"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"tools": 3}, "tools"),
        ({"tools": [{"type": "function", "name": 3}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "parameters": {}}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a", "parameters": nested(800)}]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "none"}}, "tool_choice"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    ],
)
def test_a_body_that_cannot_be_served_is_a_400_that_names_the_field(
    address: str, change: dict[str, Any], field: str | None
) -> None:
    reply = httpx.post(f"{address}/v1/responses", json={"model": "tiny", "input": "Hello", "stream": True, **change})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error", reply.text
    assert error["param"] == field


def test_errors_have_openais_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4o"):
        client.responses.create(model="gpt-4o", input="x")
    with pytest.raises(openai.NotFoundError, match="unknown or has expired"):
        client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="x" * 3000, stream=True)
    assert caught.value.code == "context_length_exceeded" and "maximum context length is" in str(caught.value)


def test_events_have_no_line_feeds_of_the_body(address: str) -> None:
    body = {"model": "tiny", "input": "Hello", "stream": True, "tools": TOOLS, "max_output_tokens": 4}
    text = httpx.post(f"{address}/v1/responses", content=json.dumps(body, indent=2), timeout=20).text
    lines = [each for each in text.splitlines() if each]
    assert lines and all(each.startswith(("event: ", "data: {", ":")) for each in lines)
