"""Reasoning is separate from the answer in each API's format, whole and streamed, as the APIs' own clients parse it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from paceline.serve.service import merge_adjacent
from paceline.serve.tools import Call, Event, HermesParser, PlainParser, ReasoningParser, ReasoningText, Text
from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "Read", "parameters": PARAMETERS}}]
CLAUDES: list[Any] = [{"name": "Read", "input_schema": PARAMETERS}]
CALL = '<tool_call>\n{"name": "Read", "arguments": {"path": "é.py"}}\n</tool_call>'
REASONING = f"First é.\n\nNot yet: {CALL} <thin </thin"
# Like Qwen 3: the model opens its reasoning itself, and the template shows earlier reasoning.
OWN = TEMPLATE.replace(
    "+ message.role + '\\n' + message.content }}",
    "+ message.role + '\\n' }}{%- if message.reasoning_content %}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}{{- message.content }}",
)
OPENED = OWN.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")


def thoughtful(template: str, size: int, text: str) -> ScriptedEngine:
    script = ScriptedEngine(text, size=size)
    script.tokenizer = byte_tokenizer(template=template)
    return script


def parsed(parser: ReasoningParser, *pieces: str) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return merge_adjacent(events + parser.finish())


@pytest.fixture(params=[(OWN, "\n<think>\n", 3), (OWN, "<think>", 50), (OPENED, "\n", 1), (OPENED, "", 7)])
def script(request: pytest.FixtureRequest) -> ScriptedEngine:
    template, opening, size = request.param
    return thoughtful(template, size, f"{opening}{REASONING}\n</think>\n\nI read.\n{CALL}\n{CALL}")


@pytest.fixture
def address(script: ScriptedEngine) -> Iterator[str]:
    with running(scripted(script)) as url:
        yield url


def test_chat_completions_bring_it_in_a_field_of_its_own(address: str, script: ScriptedEngine) -> None:
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


# Like Qwen 3: a variable switches reasoning off, and the template shows only reasoning after the last user message.
SWITCHED = """\
{%- set asked = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set asked.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content and loop.index0 > asked.last %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {%- if reasoning_effort %}{{- 'Effort: ' + reasoning_effort + '\\n' }}{%- endif %}
{%- endif %}
"""
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("path", "fields", "end"),
    [
        ("chat/completions", {}, ""),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": True, "other": [1]}}, ""),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, EMPTY),
        ("chat/completions", {"reasoning_effort": "none"}, f"{EMPTY}Effort: none\n"),
        ("chat/completions", {"reasoning_effort": "high"}, "Effort: high\n"),
        (
            "chat/completions",
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": ""}},
            "",
        ),
        ("messages", {}, ""),
        ("messages", {"thinking": {"type": "adaptive", "display": "omitted"}}, ""),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 2000}}, ""),
        ("messages", {"thinking": {"type": "disabled"}}, EMPTY),
        ("responses", {"reasoning": {"summary": "auto"}}, ""),
        ("responses", {"reasoning": {"effort": "none"}}, f"{EMPTY}Effort: none\n"),
    ],
)
def test_reasoning_is_turned_off_in_the_words_of_each_api(path: str, fields: dict[str, Any], end: str) -> None:
    script = thoughtful(SWITCHED, 3, "Done.")
    body = {"model": "tiny", "messages": HELLO, "input": HELLO, "max_tokens": 9, **fields}
    with running(scripted(script)) as url:
        assert httpx.post(f"{url}/v1/{path}", json=body).status_code == 200
        prompt = script.requests[0].prompt
        assert script.tokenizer.decode(prompt, False).endswith(f"Hello<|im_end|>\n<|im_start|>assistant\n{end}")
        if path == "messages":
            counted = httpx.post(f"{url}/v1/messages/count_tokens", json=body).json()["input_tokens"]
            assert counted == len(prompt)
        elif not {"reasoning_effort", "reasoning"} & fields.keys():
            assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == prompt


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"chat_template_kwargs": []}),
        ("chat/completions", {"chat_template_kwargs": {"enable_thinking": "false"}}),
        ("chat/completions", {"chat_template_kwargs": {"thinking": 0}}),
        ("chat/completions", {"chat_template_kwargs": {"messages": []}}),
        ("chat/completions", {"chat_template_kwargs": {"raise_exception": 3}}),
        ("chat/completions", {"reasoning_effort": 3}),
        ("messages", {"thinking": "disabled"}),
        ("messages", {"thinking": {"type": "off"}}),
        ("messages", {"thinking": {}}),
        ("responses", {"reasoning": {"effort": False}}),
    ],
)
def test_what_does_not_say_whether_to_reason_is_refused(path: str, fields: dict[str, Any]) -> None:
    template = "{{- raise_exception('no') if raise_exception is number else messages[0].content }}"
    body = {"model": "tiny", "messages": HELLO, "input": HELLO, "max_tokens": 9, **fields}
    with running(scripted(thoughtful(template, 3, "Done."))) as url:
        reply = httpx.post(f"{url}/v1/{path}", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


def test_markup_in_template_variables_stays_text() -> None:
    tokenizer = byte_tokenizer(template="{{- '<|im_start|>' + word + messages[0].content + '<|im_end|>' }}")
    tokens = tokenizer.encode_chat(HELLO, variables={"word": "<|im_end|>"})
    end = tokenizer.special_tokens["<|im_end|>"]
    assert tokens.count(end) == 1 and tokens[-1] == end
    assert tokenizer.decode(tokens, skip_special=False) == "<|im_start|><|im_end|>Hello<|im_end|>"


@pytest.mark.parametrize("api", ["chat/completions", "messages", "responses"])
def test_the_next_turns_prompt_begins_with_this_one_and_its_reasoning(api: str) -> None:
    script = thoughtful(SWITCHED, 3, f"<think>\nHm, é.\n</think>\n\nI read.\n{CALL}")
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 900}
    if api == "messages":
        body["tools"] = CLAUDES
    if api == "responses":
        body["tools"] = [{"type": "function", **each["function"]} for each in TOOLS]
    said = "input" if api == "responses" else "messages"
    body[said] = HELLO
    with running(scripted(script)) as url:
        reply = httpx.post(f"{url}/v1/{api}", json=body).json()
        if api == "messages":
            result = {"type": "tool_result", "tool_use_id": reply["content"][-1]["id"], "content": "x = 1"}
            more = [{"role": "assistant", "content": reply["content"]}, {"role": "user", "content": [result]}]
        elif api == "responses":
            result = {"type": "function_call_output", "call_id": reply["output"][-1]["call_id"], "output": "x = 1"}
            more = [*reply["output"], result]
        else:
            message = reply["choices"][0]["message"]
            more = [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "x = 1"}]
        httpx.post(f"{url}/v1/{api}", json={**body, said: [*HELLO, *more]})
        asked = [*HELLO, *more, {"role": "assistant", "content": "One."}, *HELLO]
        httpx.post(f"{url}/v1/{api}", json={**body, said: asked})
    first, second, third = (script.tokenizer.decode(each.prompt, False) for each in script.requests)
    assert second.startswith(f"{first}{script.texts[0]}<|im_end|>\n<|im_start|>tool\nx = 1")
    continued = [*script.requests[0].prompt, *script.tokenizer.encode("<think>\nHm, é.\n</think>\n\nI read.\n")]
    assert script.requests[1].prompt[: len(continued)] == continued
    assert "Hm, é." not in third and third.startswith(f"{first}I read.")  # the template drops it, not the server


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
        ("<thi", [Text("<thi")], [ReasoningText("<thi")]),
        ("\n<think>", [], []),
        ("<think>\n\n</think>\n\nYes. ", [Text("Yes. ")], [Text("Yes. ")]),
        ("<think> a < b </thi", [ReasoningText("a < b </thi")], [ReasoningText("a < b </thi")]),
        ("<think>a</think>\n", [ReasoningText("a")], [ReasoningText("a")]),
        ("Yes. <think>a</think>", [Text("Yes. <think>a</think>")], [ReasoningText("Yes. <think>a")]),
        ("a</think></think>b", [Text("a</think></think>b")], [ReasoningText("a"), Text("</think>b")]),
        (
            f"<think>a{CALL}</think>{CALL}b",
            [ReasoningText(f"a{CALL}"), Call("Read", '{"path": "é.py"}'), Text("b")],
            [ReasoningText(f"a{CALL}"), Call("Read", '{"path": "é.py"}'), Text("b")],
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
            parser = ReasoningParser(kind({}) if kind is HermesParser else kind(), inside)
            assert parsed(parser, text[:place], text[place:]) == expected
        parser = ReasoningParser(kind({}) if kind is HermesParser else kind(), inside)
        assert parsed(parser, *text) == expected
