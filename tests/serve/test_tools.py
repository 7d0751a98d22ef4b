"""The parser of Hermes calls: it gives the same events for any split of the stream, and loses no text."""

from __future__ import annotations

import json
import random

import pytest

from paceline.serve.service import merge_adjacent
from paceline.serve.tools import Call, Event, HermesParser, Text

WORDS = [
    "Reading",
    " ",
    "\n",
    "  \n",
    "é",
    "日本",
    "🙂",
    "<",
    "<tool",
    "</tool_call>",
    "<tool_call>",
    "{",
    "}",
    '"',
    "\\",
    "x < y",
    "```",
    "```json\n",
    "\n```\n",
    "<tools>",
    "</tools>",
    '\n{"name": "tool", "arguments": {',
    '{"name": "tool", "arguments": {"a": "```"}}',
]
VALUES = [
    "a.py",
    "x</tool_call>y",
    "<tool_call>{}",
    'say "hi"',
    "back\\slash",
    "{[",
    "}]",
    "日本🙂",
    "",
    "two\nlines",
    "\\\\",
]


def parse(*pieces: str) -> list[Event]:
    parser = HermesParser({"tool": {}})
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return merge_adjacent(events + parser.finish())


def value(draw: random.Random, depth: int = 0) -> object:
    kind = draw.randrange(7 if depth < 3 else 5)
    if kind < 3:
        return draw.choice(VALUES)
    if kind < 5:
        return draw.choice([True, None, 3, -2.5])
    if kind == 5:
        return [value(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice(VALUES): value(draw, depth + 1) for _ in range(draw.randrange(3))}


def written_call(draw: random.Random) -> tuple[str, Call]:
    arguments = {f"key{index}": value(draw) for index in range(draw.randrange(3))}
    body = json.dumps({"name": "tool", "arguments": arguments}, ensure_ascii=draw.random() < 0.3)
    space = draw.choice(["", "\n", " \n"])
    return f"<tool_call>{space}{body}{space}</tool_call>", Call("tool", json.dumps(arguments, ensure_ascii=False))


def text_of(number: int) -> str:
    draw = random.Random(number)
    parts = []
    for _ in range(draw.randrange(1, 6)):
        if draw.random() < 0.5:
            parts.append(written_call(draw)[0])
        else:
            parts.append("".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 5))))
    text = "".join(parts)
    return text[: draw.randrange(len(text) + 1)] if draw.random() < 0.3 else text


@pytest.mark.parametrize("number", range(300))
def test_any_split_gives_what_the_whole_gives(number: int) -> None:
    text = text_of(number)
    whole = parse(text)
    if len(text) < 300:
        for place in range(len(text) + 1):
            assert parse(text[:place], text[place:]) == whole
    assert parse(*text) == whole
    draw = random.Random(-number)
    for _ in range(10):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(1, 8)))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(*pieces) == whole


@pytest.mark.parametrize("number", range(60))
def test_well_formed_calls_all_come_out(number: int) -> None:
    draw = random.Random(number)
    calls = [written_call(draw) for _ in range(draw.randrange(1, 5))]
    text = "Let me see.\n" + "\n".join(each for each, _ in calls) + "\n"
    assert parse(text) == [Text("Let me see."), *(call for _, call in calls)]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "read", "arguments": {"path": "a',
        '<tool_call>\n{"name": "read", "arguments": {}}\n</tool_',
        "<tool_call>\n",
        "<tool_call>read a.py</tool_call>",
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "read", "arguments": "a.py"}</tool_call>',
        '<tool_call>{"name": "read", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "read", "arguments": {]}}</tool_call> and on',
        '<tool_call>{"name": "read", "arguments": {}} then</tool_call>',
        '<tool_call>{"name": "x", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001 + "</tool_call>",
        "a < b, <tool, <tool_cal",
        " \n ",
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(text: str) -> None:
    events = parse(text)
    assert "".join(each.text for each in events if isinstance(each, Text)) == text
    assert all(isinstance(each, Text) for each in events)


def test_half_a_surrogate_pair_stays_escaped() -> None:
    (call,) = parse('<tool_call>{"name": "x", "arguments": {"a": "\\ud800"}}</tool_call>')
    assert isinstance(call, Call) and call.arguments == '{"a": "\\ud800"}'
