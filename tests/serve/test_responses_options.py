"""Every option of the Responses API that concerns the output is applied or refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from paceline.serve.responses_writer import TextLogprobs
from paceline.serve.tools import Call, ReasoningText, Text
from paceline.types import TokenLogprob
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted
from tests.serve.test_responses import CALLS, TOOLS, events_of


def test_log_probabilities_are_those_of_the_texts_tokens(address: str, client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "Hello", "max_output_tokens": 12}
    asked: Any = {**options, "include": ["message.output_text.logprobs"]}
    part: Any = client.responses.create(**asked).output[0].content[0]  # type: ignore[union-attr]
    assert len(part.logprobs) == 12 and all(each.logprob <= 0 and each.top_logprobs == [] for each in part.logprobs)
    assert bytes(byte for each in part.logprobs for byte in each.bytes).decode("utf-8", "replace") == part.text
    more: Any = client.responses.create(**options, top_logprobs=3).output[0].content[0]  # type: ignore[union-attr]
    for each, plain in zip(more.logprobs, part.logprobs, strict=True):
        assert [top.logprob for top in each.top_logprobs] == sorted(
            (top.logprob for top in each.top_logprobs), reverse=True
        )
        assert len(each.top_logprobs) == 3 and each.top_logprobs[0].token == each.token == plain.token  # it is greedy
    events = events_of(address, asked)
    deltas = [value for each in events if each["type"] == "response.output_text.delta" for value in each["logprobs"]]
    done = next(each for each in events if each["type"] == "response.output_text.done")
    whole = events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert deltas == done["logprobs"] == whole and [each["token"] for each in whole] == [
        each.token for each in part.logprobs
    ]
    assert client.responses.create(**options).output[0].content[0].logprobs == []  # type: ignore[union-attr]


def test_log_probabilities_are_numbers_where_a_grammar_forbids_the_alternatives(address: str) -> None:
    for path, body in (
        ("responses", {"input": "x", "top_logprobs": 3}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 3}),
    ):
        reply = httpx.post(f"{address}/v1/{path}", json={"model": "tiny", "regex": "ab", **body})
        assert reply.status_code == 200 and '"logprob":-9999.0' in reply.text and '"logprob":null' not in reply.text


def test_log_probabilities_of_reasoning_and_calls_are_left_out() -> None:
    assigned = TextLogprobs(byte_tokenizer())

    def step(text: str, *events: Any) -> list[str]:
        values = [TokenLogprob(byte, -0.5) for byte in text.encode()]
        return ["".join(each["token"] for each in shown) for _, shown in assigned.split(list(events), values)]

    assert step("<t>hm</t>\n\nYes", ReasoningText("hm"), Text("Yes")) == ["", "Yes"]
    assert step(" <") == []  # buffered, as it may begin a call
    assert step("b", Text(" <b")) == [" <b"]
    assert step("So:<call>", Text("So:")) == ["So:"]
    assert step("{}</call>", Call("f", "{}")) == [""]
    assert step("End", Text("End")) == ["End"]


@pytest.mark.parametrize(("asked", "count"), [({}, 5), ({"max_tool_calls": 2}, 2), ({"parallel_tool_calls": False}, 1)])
def test_calls_beyond_the_most_are_left_out(asked: dict[str, Any], count: int) -> None:
    with running(scripted(ScriptedEngine(CALLS))) as url:
        events = events_of(url, {"model": "tiny", "input": "x", "tools": TOOLS, **asked})
    output = events[-1]["response"]["output"]
    assert [each["type"] == "message" for each in output] == [True] + [False] * count
    assert output[1]["name"] == "exec_command"


def test_a_long_conversation_is_cut_at_its_beginning_where_asked() -> None:
    talk: list[Any] = [{"role": "developer", "content": "Be brief."}]
    for index in range(40):
        talk += [
            {"role": "user", "content": f"question {index} " + "x" * 300},
            {"type": "function_call", "name": "f", "arguments": "{}", "call_id": f"c{index}"},
            {"type": "function_call_output", "call_id": f"c{index}", "output": "y" * 100},
            {"role": "assistant", "content": f"answer {index}"},
        ]
    talk.append({"role": "user", "content": "The last."})
    script = ScriptedEngine("Well.")
    with running(scripted(script)) as url:  # the context has 8,192 tokens of a byte each
        body = {"model": "tiny", "input": talk}
        refused = httpx.post(f"{url}/v1/responses", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
        reply = httpx.post(f"{url}/v1/responses", json={**body, "truncation": "auto"}).json()
        assert reply["status"] == "completed" and reply["truncation"] == "auto"
        prompt = script.tokenizer.decode(script.requests[0].prompt, skip_special=False)
        assert 8192 // 2 < len(script.requests[0].prompt) <= 8192 - 8192 // 8
        assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nquestion ")
        assert "question 0 " not in prompt and "answer 39" in prompt and "The last." in prompt
        short = {"model": "tiny", "input": talk[:5], "truncation": "auto"}
        httpx.post(f"{url}/v1/responses", json=short)
        # a prompt that fits is not truncated
        assert "question 0 " in script.tokenizer.decode(script.requests[1].prompt)
        long = {"model": "tiny", "input": "x" * 9000, "truncation": "auto"}
        error = httpx.post(f"{url}/v1/responses", json=long).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].endswith("this model's maximum context length is 8192 tokens")


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "asked",
    [
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
        {"text": {"format": {"type": "json_object", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_format_is_enforced_in_every_field(address: str, asked: dict[str, Any]) -> None:
    body = {"model": "tiny", "input": "x", "max_output_tokens": 200, **asked}
    text = httpx.post(f"{address}/v1/responses", json=body, timeout=60).json()["output"][0]["content"][0]["text"]
    value = json.loads(text)
    assert list(value) == ["a"] and isinstance(value["a"], bool)


@pytest.mark.parametrize("name", ["max_output_tokens", "max_completion_tokens", "max_tokens"])
def test_a_limit_holds_by_any_of_its_names(address: str, name: str) -> None:
    body = {"model": "tiny", "input": "x", name: 3, "logprobs": True, "logit_bias": {"65": 100}}
    reply = httpx.post(f"{address}/v1/responses", json=body).json()
    assert reply["usage"]["output_tokens"] == reply["max_output_tokens"] == 3
    assert len(reply["output"][0]["content"][0]["logprobs"]) == 3


def test_two_formats_are_refused(address: str) -> None:
    form = {"type": "json_object"}
    body = {"model": "tiny", "input": "x", "text": {"format": form}, "response_format": form}
    reply = httpx.post(f"{address}/v1/responses", json=body)
    assert reply.status_code == 400 and "not supported together" in reply.text


def test_a_call_forced_by_name_is_made(address: str) -> None:
    body = {
        "model": "tiny",
        "input": "x",
        "max_output_tokens": 300,
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}, {"type": "function", "name": "g"}],
        "tool_choice": {"type": "function", "name": "f"},
    }
    output = httpx.post(f"{address}/v1/responses", json=body, timeout=60).json()["output"]
    assert [each["name"] for each in output if each["type"] == "function_call"] == ["f"], output
