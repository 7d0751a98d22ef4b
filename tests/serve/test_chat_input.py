"""The fields of a chat body: several choices, messages to continue, content of every kind, tools and legacy functions."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import openai
import pytest

from paceline.types import Request, Sampling
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, tiny

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "The answer is "}]
OPENED = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
PLACE = "(an image, which this model cannot see)"


def send(script: ScriptedEngine, *bodies: dict[str, Any], path: str = "v1/chat/completions") -> list[httpx.Response]:
    with running(scripted(script)) as url:
        return [httpx.post(f"{url}/{path}", json={"model": "tiny", **body}) for body in bodies]


def prompts(*bodies: dict[str, Any]) -> list[str]:
    """The prompt that the engine receives for each body, from the first user message on."""
    script = ScriptedEngine("Done.")
    for reply in send(script, *bodies):
        assert reply.status_code == 200, reply.text
    texts = [script.tokenizer.decode(each.prompt, False) for each in script.requests]
    return [text[text.index("<|im_start|>user") :] for text in texts]


def test_choices_have_an_index(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 1.5, "logprobs": True}
    alone = [client.chat.completions.create(**options, seed=7 + index).choices[0].message.content for index in range(3)]
    assert len(set(alone)) == 3
    whole = client.chat.completions.create(**options, seed=7, n=3)
    assert [each.index for each in whole.choices] == [0, 1, 2] and whole.usage is not None
    assert [each.message.content for each in whole.choices] == alone
    assert all(each.logprobs is not None and len(each.logprobs.content or []) == 20 for each in whole.choices)
    assert whole.usage.completion_tokens == 60
    assert whole.usage.prompt_tokens == len(byte_tokenizer().encode_chat(HELLO))
    texts = ["", "", ""]
    reasons: list[str | None] = [None, None, None]
    for chunk in client.chat.completions.create(**options, seed=7, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == alone and reasons == ["length"] * 3
    greedy = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, n=8, temperature=0)
    assert len({each.message.content for each in greedy.choices}) == 1


def test_each_choice_has_calls_of_its_own() -> None:
    call = '<tool_call>\n{"name": "read", "arguments": {"path": "%s"}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}]
    texts = (f"{call % 'a'}\n{call % 'b'}", "Words.", call % "c")
    whole = send(ScriptedEngine(*texts), {"messages": HELLO, "tools": tools, "n": 3})[0].json()["choices"]
    assert [each["finish_reason"] for each in whole] == ["tool_calls", "stop", "tool_calls"]
    made = [
        [json.loads(call["function"]["arguments"]) for call in each["message"].get("tool_calls", [])] for each in whole
    ]
    assert made == [[{"path": "a"}, {"path": "b"}], [], [{"path": "c"}]]
    streamed = send(ScriptedEngine(*texts), {"messages": HELLO, "tools": tools, "n": 3, "stream": True})[0].text
    found: list[tuple[int, int]] = []
    for line in streamed.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                found += [(choice["index"], call["index"]) for call in choice["delta"].get("tool_calls", ())]
    assert sorted(found) == [(0, 0), (0, 1), (2, 0)]


@pytest.mark.parametrize(
    ("fields", "goes_on"),
    [
        ({}, True),
        ({"continue_final_message": True}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"add_generation_prompt": False}, True),
        ({"add_generation_prompt": True}, False),
        ({"continue_final_message": False}, False),
    ],
)
def test_a_last_message_of_the_assistant_is_continued(fields: dict[str, Any], goes_on: bool) -> None:
    end = "The answer is " if goes_on else "The answer is <|im_end|>\n<|im_start|>assistant\n"
    assert prompts({"messages": BEGUN, **fields}) == [OPENED + end]
    body = {"messages": BEGUN, "prompt": None, **fields}
    tokens = send(ScriptedEngine("x"), body, path="tokenize")[0].json()["tokens"]
    assert byte_tokenizer().decode(tokens, False).endswith(OPENED + end)


def test_the_reply_to_a_continued_message_has_only_new_text(client: openai.OpenAI) -> None:
    engine = tiny()
    prompt = engine.tokenizer.encode_chat(BEGUN, continue_final=True)
    words = engine.generate([Request(prompt, Sampling(max_tokens=30))])[0].text
    options: Any = {"model": "tiny", "messages": BEGUN, "max_tokens": 30}
    assert client.chat.completions.create(**options).choices[0].message.content == words
    chunks = client.chat.completions.create(**options, stream=True)
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == words


def test_a_message_is_continued_in_other_words_too() -> None:
    parts = [{"type": "text", "text": "The answer is "}]
    bodies = [
        {"messages": [*HELLO, {"role": "assistant", "content": "The answer is ", "prefix": True}]},
        {"messages": [*HELLO, {"role": "assistant", "content": parts}]},
        {"messages": [*HELLO, {"role": "assistant", "content": ""}]},
        {"messages": HELLO, "add_generation_prompt": False},
    ]
    ends = ["The answer is ", "The answer is ", "", None]
    closed = OPENED.removesuffix("<|im_start|>assistant\n")
    assert prompts(*bodies) == [closed if end is None else OPENED + end for end in ends]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{**HELLO[0], "prefix": True}]}, "messages[0].prefix"),
        ({"messages": HELLO, "echo": True}, "echo"),
        ({"messages": HELLO, "functions": [], "tools": []}, "functions"),
        ({"messages": HELLO, "functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call"),
        ({"messages": HELLO, "functions": [{"name": "a"}], "function_call": "must"}, "function_call"),
        ({"messages": HELLO, "function_call": {"name": "b"}}, "function_call"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"messages": HELLO, "tools": [{"type": "custom", "function": {"name": "a"}}]}, "tools[0]"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[1].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        ({"messages": [*BEGUN, {"role": "user", "content": [IMAGE, IMAGE]}]}, "messages[2].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ],
)
def test_unsupported_fields_are_a_400_that_names_the_field(address: str, body: dict[str, Any], field: str) -> None:
    reply = httpx.post(f"{address}/v1/chat/completions", json={"model": "tiny", **body})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field, reply.text


def test_what_a_template_cannot_continue_is_a_400_that_says_what_to_do() -> None:
    script = ScriptedEngine("Done.")
    script.tokenizer = byte_tokenizer(template="{% for each in messages %}{{ each.content[:4] }}{% endfor %}")
    reply, other = send(script, {"messages": BEGUN}, {"messages": BEGUN, "add_generation_prompt": True})
    assert reply.status_code == 400 and "add_generation_prompt" in reply.json()["error"]["message"]
    assert other.status_code == 200


def test_open_reasoning_is_continued() -> None:
    template = byte_tokenizer().chat_template or ""
    for begun, thought, text in (
        ("<think>\nI see", " it.", "Yes."),
        ("<think>\nI see.\n</think>\n\nThe", None, " it.</think>Yes."),
    ):
        script = ScriptedEngine(" it.</think>Yes.")
        script.tokenizer = byte_tokenizer(template=f"{template}{{# <think></think> #}}")
        message = send(script, {"messages": [*HELLO, {"role": "assistant", "content": begun}]})[0].json()["choices"][0][
            "message"
        ]
        assert message.get("reasoning_content") == thought and message["content"] == text


def test_reasoning_is_left_out_where_it_is_not_wanted() -> None:
    template = byte_tokenizer().chat_template or ""
    body = {"messages": HELLO, "include_reasoning": False}
    script = ScriptedEngine("<think>Hm.</think>Yes.")
    script.tokenizer = byte_tokenizer(template=f"{template}{{# <think></think> #}}")
    whole, streamed = send(script, body, {**body, "stream": True})
    assert whole.json()["choices"][0]["message"] == {"role": "assistant", "content": "Yes."}
    assert whole.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert "reasoning" not in streamed.text.replace("reasoning_tokens", "") and "Hm" not in streamed.text


def test_unreadable_content_becomes_a_placeholder() -> None:
    """Whatever content a turn had, the next turn's prompt begins with the same text."""
    messages: list[dict[str, Any]] = []
    bodies: list[dict[str, Any]] = []
    call = {"id": "a", "type": "function", "function": {"name": "see", "arguments": "{}"}}
    turns: list[list[Any]] = [
        [{"role": "system", "content": [{"type": "text", "text": "Help."}]}],
        [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}],
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "Seen:"}, IMAGE]},
        ],
        [
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}, {"type": "text", "text": "And?"}]},
        ],
        [
            {"role": "assistant", "content": None, "refusal": "No."},
            {
                "role": "user",
                "content": [{"type": "file", "file": {"file_id": "x"}}, {"type": "odd"}, {"type": "text", "text": "!"}],
            },
        ],
        [
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "Hm"}, {"type": "output_text", "text": "A."}],
            },
            {"role": "user", "content": [IMAGE]},
            {"role": "user", "content": "That is it."},
        ],
    ]
    for turn in turns:
        messages = messages + turn
        bodies.append({"messages": messages})
    script = ScriptedEngine("Done.")
    for reply in send(script, *bodies[1:]):
        assert reply.status_code == 200, reply.text
    texts = [
        script.tokenizer.decode(each.prompt, False).removesuffix("<|im_start|>assistant\n") for each in script.requests
    ]
    for earlier, later in itertools.pairwise(texts):
        assert later.startswith(earlier)
    for words in (
        f"What is this?\n{PLACE}<|im_end|>",
        f"Seen:\n{PLACE}\n</tool_response>",
        "assistant\nI cannot.<|im_end|>",
        "(audio, which this model cannot hear)\nAnd?<|im_end|>",
        "assistant\nNo.<|im_end|>",
        "(a file, which this model cannot read)\n(content of type odd, which this model cannot read)\n!<|im_end|>",
        f"assistant\nA.<|im_end|>\n<|im_start|>user\n{PLACE}<|im_end|>",
    ):
        assert words in texts[-1]


FUNCTIONS = [{"name": "read", "description": "Reads.", "parameters": {"type": "object"}}]
READ = '<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'


def test_deprecated_functions() -> None:
    body = {"messages": HELLO, "functions": FUNCTIONS}
    made = {"name": "read", "arguments": '{"path": "a"}'}
    script = ScriptedEngine(f"Reading.\n{READ}")
    whole, streamed, none = send(script, body, {**body, "stream": True}, {**body, "function_call": "none"})
    choice = whole.json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"] == {"role": "assistant", "content": "Reading.", "function_call": made}
    deltas = [json.loads(line[6:])["choices"][0] for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert [each["delta"]["function_call"] for each in deltas if "function_call" in each["delta"]] == [made]
    assert deltas[-1]["finish_reason"] == "function_call" and "tool_calls" not in streamed.text
    assert READ in none.json()["choices"][0]["message"]["content"]
    as_tools = {"messages": HELLO, "tools": [{"type": "function", "function": FUNCTIONS[0]}]}
    assert prompts(body) == prompts(as_tools)


def test_a_function_that_is_named_is_called(client: openai.OpenAI) -> None:
    parameters: Any = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        functions=[{"name": "odd", "parameters": parameters}, {"name": "even", "parameters": parameters}],
        function_call={"name": "odd"},
        max_tokens=200,
    ).choices[0]
    assert reply.finish_reason == "function_call" and reply.message.function_call is not None
    assert reply.message.function_call.name == "odd"
    assert json.loads(reply.message.function_call.arguments)["a"] in (True, False)


def test_functions_results_follow_their_calls() -> None:
    calls = [{"role": "assistant", "content": None, "function_call": {"name": "read", "arguments": '{"path": "a"}'}}]
    results = [{"role": "function", "name": "read", "content": "text"}]
    old = {"messages": [*HELLO, *calls, *results], "functions": FUNCTIONS}
    made = {"id": "x", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
    new = [{"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "x", "content": "text"}]
    tools = [{"type": "function", "function": FUNCTIONS[0]}]
    assert prompts(old) == prompts({"messages": [*HELLO, *new], "tools": tools})


PATCH: dict[str, Any] = {"type": "custom", "custom": {"name": "patch", "description": "Patches."}}


def test_a_custom_tool_takes_a_text() -> None:
    text = '<tool_call>\n{"name": "patch", "arguments": {"input": "*** Begin\\né"}}\n</tool_call>'
    tools = [PATCH, {"type": "function", "function": FUNCTIONS[0]}]
    script = ScriptedEngine(f"{text}\n{READ}")
    body = {"messages": HELLO, "tools": tools}
    whole, streamed = send(script, body, {**body, "stream": True})
    first, second = whole.json()["choices"][0]["message"]["tool_calls"]
    assert first["type"] == "custom" and first["custom"] == {"name": "patch", "input": "*** Begin\né"}
    assert second["type"] == "function" and second["function"]["name"] == "read"
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in streamed.text.splitlines() if line.startswith("data: {")
    ]
    calls = [call for each in deltas for call in each.get("tool_calls", ())]
    assert [(each["index"], each["type"]) for each in calls] == [(0, "custom"), (1, "function")]
    later = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [first]},
        {"role": "tool", "tool_call_id": first["id"], "content": "done"},
    ]
    assert (
        '{"name": "patch", "arguments": {"input": "*** Begin\\né"}}' in prompts({"messages": later, "tools": tools})[0]
    )


def test_a_custom_tool_that_is_named_is_called(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=[PATCH],
        tool_choice={"type": "custom", "custom": {"name": "patch"}},
        max_tokens=400,
        logit_bias={"34": 5},  # its text ends, then
    )
    call = reply.choices[0].message.tool_calls[0]
    assert call.type == "custom" and call.custom.name == "patch" and isinstance(call.custom.input, str)


def test_one_more_form_of_response_and_documents_reach_their_places() -> None:
    script = ScriptedEngine("Done.")
    script.tokenizer = byte_tokenizer(
        template="{{ messages[0].content }}{% for each in documents %}[{{ each.text }}]{% endfor %}"
    )
    reply = send(script, {"messages": HELLO, "documents": [{"title": "a", "text": "one"}, {"text": "two"}]})[0]
    assert reply.status_code == 200 and script.tokenizer.decode(script.requests[0].prompt) == "Hello[one][two]"
