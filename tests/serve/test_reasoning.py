"""Reasoning: apart from the answer in each API's form, whole and streamed, as the APIs' own clients read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from paceline.serve.service import joined
from paceline.serve.tools import Call, Event, HermesParser, PlainParser, Text, Thought, ThoughtParser
from tests.serve.service import TEMPLATE, Script, byte_tokenizer, running, scripted

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "Read", "parameters": PARAMETERS}}]
CLAUDES: list[Any] = [{"name": "Read", "input_schema": PARAMETERS}]
CALL = '<tool_call>\n{"name": "Read", "arguments": {"path": "é.py"}}\n</tool_call>'
REASONING = f"First é.\n\nNot yet: {CALL} <thin </thin"
# As Qwen 3 has it: the model opens its reasoning itself, and earlier reasoning is given back to it.
OWN = TEMPLATE.replace(
    "+ message.role + '\\n' + message.content }}",
    "+ message.role + '\\n' }}{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}{{- message.content }}",
)
OPENED = OWN.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")


def thoughtful(template: str, size: int, text: str) -> Script:
    script = Script(text, size=size)
    script.tokenizer = byte_tokenizer(template=template)
    return script


def parsed(parser: ThoughtParser, *pieces: str) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return joined(events + parser.finish())


@pytest.fixture(params=[(OWN, "\n<think>\n", 3), (OWN, "<think>", 50), (OPENED, "\n", 1), (OPENED, "", 7)])
def script(request: pytest.FixtureRequest) -> Script:
    template, opening, size = request.param
    return thoughtful(template, size, f"{opening}{REASONING}\n</think>\n\nI read.\n{CALL}\n{CALL}")


@pytest.fixture
def address(script: Script) -> Iterator[str]:
    with running(scripted(script)) as url:
        yield url


def test_chat_completions_bring_it_in_a_field_of_its_own(address: str, script: Script) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        options: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS}
        whole: Any = client.chat.completions.create(**options)
        message = whole.choices[0].message
        assert (message.reasoning_content, message.content) == (REASONING, "I read.")
        assert [each.function.arguments for each in message.tool_calls] == ['{"path": "é.py"}'] * 2
        said = script.texts[0][: script.texts[0].index("</think>") + len("</think>")]
        counted = whole.usage.completion_tokens_details.reasoning_tokens
        assert counted == len(said.encode())

        chunks: Any = list(
            client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        )
        deltas = [each.choices[0].delta for each in chunks if each.choices]
        assert "".join(getattr(each, "reasoning_content", None) or "" for each in deltas) == REASONING
        assert "".join(each.content or "" for each in deltas) == "I read."
        assert sum(len(each.tool_calls or ()) for each in deltas) == 2
        assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == counted


def test_messages_bring_it_in_a_block_of_its_own(address: str) -> None:
    with anthropic.Anthropic(base_url=address, api_key="none") as client:
        options: Any = {"model": "tiny", "messages": HELLO, "tools": CLAUDES, "max_tokens": 900}
        whole: Any = client.messages.create(**options)
        with client.messages.stream(**options) as stream:
            kinds = [each.type for each in stream]
            streamed: Any = stream.get_final_message()
    for each in (whole, streamed):
        assert [block.type for block in each.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert each.content[0].thinking == REASONING and each.content[0].signature == ""
        assert each.content[1].text == "I read." and each.stop_reason == "tool_use"
        assert each.usage.output_tokens_details.thinking_tokens > len(REASONING)
    assert {"thinking", "signature", "text", "input_json"} <= set(kinds)


def test_messages_events_come_in_their_order(address: str) -> None:
    body = {"model": "tiny", "messages": HELLO, "tools": CLAUDES, "max_tokens": 900, "stream": True}
    lines = [each for each in httpx.post(f"{address}/v1/messages", json=body).text.split("\n") if each[:5] == "data:"]
    events = [json.loads(each[5:]) for each in lines]
    names = [each.get("delta", {}).get("type") or each["type"].removeprefix("content_block_") for each in events[2:-2]]
    squeezed = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    call = ["start", "input_json_delta", "stop"]
    assert squeezed == [
        "start",
        "thinking_delta",
        "signature_delta",
        "stop",
        "start",
        "text_delta",
        "stop",
        *call,
        *call,
    ]
    starts = [each for each in events if each["type"] == "content_block_start"]
    assert [each["index"] for each in starts] == [0, 1, 2, 3]
    assert starts[0]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}


def test_earlier_reasoning_goes_to_templates_that_know_it() -> None:
    history = [*HELLO, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm, so."}, *HELLO]
    for template, known in ((OWN, True), (TEMPLATE, False)):
        script = thoughtful(template, 3, "Done.")
        with running(scripted(script)) as url:
            body = {"model": "tiny", "messages": history}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        prompt = script.tokenizer.decode(script.requests[0].prompt)
        assert ("<think>\nHm, so.\n</think>\n\nYes." in prompt) is known and "Yes." in prompt
        message = reply["choices"][0]["message"]
        assert message["content"] == "Done." and "reasoning_content" not in message
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_a_template_without_reasoning_and_raw_completions_leave_the_markers() -> None:
    text = "<think>x</think>y"
    with running(scripted(thoughtful(TEMPLATE, 3, text))) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": HELLO}).json()
        assert reply["choices"][0]["message"]["content"] == text
    with running(scripted(thoughtful(OWN, 3, text))) as url:
        reply = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "x"}).json()
        assert reply["choices"][0]["text"] == text


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("text", "events", "events_inside"),
    [
        ("", [], []),
        (" \n", [Text(" \n")], []),
        ("<thi", [Text("<thi")], [Thought("<thi")]),
        ("\n<think>", [], []),
        ("<think>\n\n</think>\n\nYes. ", [Text("Yes. ")], [Text("Yes. ")]),
        ("<think> a < b </thi", [Thought("a < b </thi")], [Thought("a < b </thi")]),
        ("<think>a</think>\n", [Thought("a")], [Thought("a")]),
        ("Yes. <think>a</think>", [Text("Yes. <think>a</think>")], [Thought("Yes. <think>a")]),
        ("a</think></think>b", [Text("a</think></think>b")], [Thought("a"), Text("</think>b")]),
        (
            f"<think>a{CALL}</think>{CALL}b",
            [Thought(f"a{CALL}"), Call("Read", '{"path": "é.py"}'), Text("b")],
            [Thought(f"a{CALL}"), Call("Read", '{"path": "é.py"}'), Text("b")],
        ),
    ],
)
def test_reasoning_is_the_front_of_the_output_only(
    inside: bool, text: str, events: list[Event], events_inside: list[Event]
) -> None:
    expected = events_inside if inside else events
    kinds = (HermesParser,) if any(isinstance(each, Call) for each in expected) else (HermesParser, PlainParser)
    for kind in kinds:
        for place in range(len(text) + 1):
            parser = ThoughtParser(kind({}) if kind is HermesParser else kind(), inside)
            assert parsed(parser, text[:place], text[place:]) == expected
        parser = ThoughtParser(kind({}) if kind is HermesParser else kind(), inside)
        assert parsed(parser, *text) == expected
