"""Calls that Qwen2.5-Coder writes in a fence, alone or in `<tools>`, and similar JSON that stays text."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from paceline.serve.service import merge_adjacent
from paceline.serve.tools import Call, Event, HermesParser, Text
from tests.serve.service import ScriptedEngine, running, scripted

ARGUMENTS = {"path": "é.py", "content": "Run:\n```sh\n{ls}\n```\n</tools>"}
BODY = json.dumps({"name": "write", "arguments": ARGUMENTS}, ensure_ascii=False, indent=2)
FENCED = f"```json\n{BODY}\n```"
CALL = Call("write", json.dumps(ARGUMENTS, ensure_ascii=False))
TOOLS: list[Any] = [{"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}]
HELLO = [{"role": "user", "content": "Hello"}]


def parsed(*pieces: str, **options: Any) -> list[Event]:
    parser = HermesParser({"write": None, 'say "é"': None}, **options)
    return merge_adjacent([event for piece in pieces for event in parser.feed(piece)] + parser.finish())


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (f"{FENCED}\n", [CALL]),
        (f"```\n{BODY}\n```", [CALL]),
        (f"```json {BODY}```", [CALL]),
        (f"```json\n{BODY}\n{BODY}\n```", [CALL, CALL]),
        (f"I write.\n\n  {FENCED}\n\n{BODY}\n\n", [Text("I write."), CALL, CALL]),
        (f"```python\nx = {{}}\n```\nSo:\n{FENCED}", [Text("```python\nx = {}\n```\nSo:"), CALL]),
        (f"{BODY}\n</tool_call>\nDone.", [CALL, Text("Done.")]),
        (f"{FENCED}\n<tool_call>\n{BODY}\n</tool_call>\nDone.", [CALL, CALL, Text("Done.")]),
        (f"So <tools>{BODY}</tools> it is.", [Text("So"), CALL, Text("it is.")]),
        ('{"name": "write", "arguments": {"a": "two\nlines"}}', [Call("write", '{"a": "two\\nlines"}')]),
        (f"{{{BODY}}}\n{{{BODY}}}", [CALL, CALL]),
        (f"<tool_call>\n{{{BODY}}}\n</tool_call>\nDone.", [CALL, Text("Done.")]),
        ('{ "name" :"say \\"é\\"" , "arguments":{} }', [Call('say "é"', "{}")]),
    ],
)
def test_a_call_without_its_tags_is_a_call(text: str, events: list[Event]) -> None:
    for place in range(len(text) + 1):
        assert parsed(text[:place], text[place:]) == events, place
    assert parsed(*text) == events


@pytest.mark.parametrize(
    "text",
    [
        f"For example:\n{FENCED}\nThis is a call.",
        f"```python\n{BODY}\n```",
        f"Not closed: ```\n{BODY}\n",
        f"````\n{FENCED}\n````\n{BODY}",
        f"{FENCED}\n{FENCED[:20]}",
        f"It is {BODY}",
        f"{{{BODY}",
        f"<tool_call>{{{BODY}, {{}}}}</tool_call>",
        FENCED.replace("write", "other"),
        FENCED.replace("name", "function"),
    ],
)
def test_what_only_looks_like_a_call_is_text_to_the_last_character(text: str) -> None:
    for place in range(len(text) + 1):
        assert parsed(text[:place], text[place:]) == [Text(text)], place


def test_only_what_may_still_be_a_call_is_held_back() -> None:
    parser = HermesParser({"write": None})
    said = ""
    for text, expected in (
        ("Use {x} or `y` ", "Use {x} or `y`"),
        ('.\n{"', " ."),
        ("version", '\n{"version'),
        ('": 1}\n{"name": "wri', '": 1}'),
        ('x"}', '\n{"name": "wrix"}'),
        ("\n```", ""),
        ("py\n", "\n```py"),
        ("{}", "\n{}"),
        (f"\n```\n{FENCED}\n\n", "\n```"),
        ("S", f"\n{FENCED}\n\nS"),
    ):
        events = merge_adjacent(parser.feed(text))
        assert events == ([Text(expected)] if expected else []), text
        said += expected
    assert parser.finish() == [] and said.endswith(f"\n```\n{FENCED}\n\nS")


def test_without_tools_or_where_the_answer_is_held_only_the_tags_count() -> None:
    assert parsed(FENCED, only_template_format=True) == [Text(FENCED)]
    assert parsed(f"<tool_call>{BODY}</tool_call>", only_template_format=True) == [CALL]
    parser = HermesParser({})
    assert merge_adjacent(parser.feed(FENCED) + parser.finish()) == [Text(FENCED)]


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ('```json\n{\n  "name": "read_file",\n  "arguments": {\n    "path": "a.py"\n  }\n}\n```\n', ["read_file"]),
        (
            '```json\n{\n  "name": "read_file",\n  "arguments": {\n    "path": "a.py"\n  }\n}\n'
            '{\n  "name": "read_file",\n  "arguments": {\n    "path": "b.py"\n  }\n}\n```\n',
            ["read_file", "read_file"],
        ),
        ('{"name": "bash", "arguments": {"command": "python3 a.py"}}', ["bash"]),
        ('{{"name": "bash", "arguments": {"command": "ls"}}}', ["bash"]),
        ('```json\n{\n  "name": "add",\n  "arguments": {\n    "a": 2,\n    "b": 2\n  }\n}\n```\n', []),
        (
            '```json\n{\n  "name": "bash",\n  "arguments": {\n    "command": """\n      echo "Hello"\n    """\n  }\n}\n```\n',
            [],
        ),
    ],
)
def test_what_qwen_coder_wrote_with_two_tools(text: str, called: list[str]) -> None:
    """An output of Qwen2.5-Coder-1.5B: `add` is not a tool, and triple quotes are not JSON."""
    for place in range(len(text) + 1):
        parser = HermesParser({"read_file": None, "bash": None})
        events = merge_adjacent(parser.feed(text[:place]) + parser.feed(text[place:]) + parser.finish())
        assert [each.name for each in events if isinstance(each, Call)] == called
        assert called or events == [Text(text)]


@pytest.mark.parametrize("drafted", [False, True])
def test_an_agent_gets_the_call(drafted: bool) -> None:
    script = ScriptedEngine(f"I write.\n{FENCED}\n", size=7 if drafted else 1, drafted=drafted)
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
    with running(scripted(script)) as url:
        choice = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I write."
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
        lines = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
        chunks = [json.loads(each[6:])["choices"][0] for each in lines if each.startswith("data: {")]
        assert [each["delta"]["tool_calls"] for each in chunks if "tool_calls" in each["delta"]]
        assert chunks[-1]["finish_reason"] == "tool_calls"
        for other in ({"tools": None}, {"tool_choice": "none"}, {"response_format": {"type": "json_object"}}):
            message = httpx.post(f"{url}/v1/chat/completions", json={**body, **other}).json()["choices"][0]["message"]
            assert message["content"] == f"I write.\n{FENCED}\n" and "tool_calls" not in message
