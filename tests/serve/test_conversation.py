"""Messages of all APIs in the chat template's format."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from paceline.serve.conversation import fold_system_messages
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted

TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.tool_call_id }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %} {{ call.id }}{{ call.function.arguments | tojson }}{% endfor %};"
    "{% endfor %}"
)
TURNS: list[dict[str, Any]] = [
    {"name": "read", "id": "x1", "result": "a"},
    {"name": "run-2", "id": "x1", "result": "b"},
    {"name": "read", "id": "x2", "result": "c"},
]


def chat(turn: dict[str, Any]) -> list[dict[str, Any]]:
    call = {"id": turn["id"], "type": "function", "function": {"name": turn["name"], "arguments": "{}"}}
    return [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": turn["id"], "content": turn["result"]},
    ]


def claude(turn: dict[str, Any]) -> list[dict[str, Any]]:
    use = {"type": "tool_use", "id": turn["id"], "name": turn["name"], "input": {}}
    result = {"type": "tool_result", "tool_use_id": turn["id"], "content": turn["result"]}
    return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]


@pytest.mark.parametrize(("path", "written"), [("chat/completions", chat), ("messages", claude)])
def test_calls_are_named_by_tool_and_number(path: str, written: Any) -> None:
    script = ScriptedEngine("Done.")
    script.tokenizer = byte_tokenizer(template=TEMPLATE)
    messages = [{"role": "user", "content": "Go"}]
    with running(scripted(script)) as url:
        for turn in TURNS:
            messages += written(turn)
            body = {"model": "tiny", "messages": messages, "max_tokens": 9}
            assert httpx.post(f"{url}/v1/{path}", json=body).status_code == 200
    prompts = [script.tokenizer.decode(each.prompt) for each in script.requests]
    assert prompts[-1] == (
        "user  Go;assistant   functions.read:0{};tool functions.read:0 a;assistant   functions.run-2:1{};"
        "tool functions.run-2:1 b;assistant   functions.read:2{};tool functions.read:2 c;"
    )
    assert prompts[-1].startswith(prompts[1]) and prompts[1].startswith(prompts[0])


def test_many_late_system_messages_are_joined_in_no_time() -> None:
    messages = [{"role": role, "content": "x" * 40} for _ in range(60_000) for role in ("user", "system")]
    start = time.perf_counter()
    folded = fold_system_messages(messages)
    assert time.perf_counter() - start < 5 and len(folded) == 1
    assert folded[0]["content"].count("<system-reminder>") == 60_000
