"""Compaction in the Responses API: what is kept, what is shortened, and that later turns read it."""

from __future__ import annotations

import base64
from typing import Any

import openai
import pytest

from tests.serve.service import ScriptedEngine, running, scripted, tiny_service
from tests.serve.test_responses import events_of

LOG = "\n".join(f"line {index}: nothing of interest happened here" for index in range(300))
TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": "You are an agent."},
    {"role": "user", "content": "Why does test_tokens fail?"},
    {"type": "function_call", "name": "run", "arguments": '{"cmd": "pytest"}', "call_id": "c1"},
    {
        "type": "function_call_output",
        "call_id": "c1",
        "output": f"{LOG}\nE  AssertionError: test_tokens: 3 != 4\n{LOG}",
    },
    {"role": "assistant", "content": "It counts one token too many."},
]


def test_a_compacted_conversation_goes_on(client: openai.OpenAI) -> None:
    done = client.responses.compact(model="tiny", input=TALK)  # type: ignore[arg-type]
    assert done.object == "response.compaction" and done.usage.input_tokens > 2 * done.usage.output_tokens > 0
    output = [each.to_dict() for each in done.output]
    assert [each["type"] for each in output] == ["message", "message", "compaction"]
    assert [each["content"][0]["text"] for each in output[:2]] == [TALK[0]["content"], TALK[1]["content"]]  # type: ignore[index]
    assert all(each["id"] for each in output)
    text = base64.b64decode(str(output[2]["encrypted_content"])).decode()
    assert "AssertionError: test_tokens: 3 != 4" in text and "It counts one token too many." in text
    assert '(called run: {"cmd": "pytest"})' in text and text.count("(filtered ") >= 2
    # the next turn and the next compaction read it
    script = ScriptedEngine("Yes.")
    with running(scripted(script)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as other:
        follow = [*output, {"role": "user", "content": "Mend it."}]
        made = other.responses.create(model="tiny", input=follow)  # type: ignore[arg-type]
        prompt = script.tokenizer.decode(script.requests[0].prompt)
        assert "AssertionError: test_tokens: 3 != 4" in prompt and "You are an agent." in prompt
        more: Any = other.responses.compact(model="tiny", previous_response_id=made.id).output
        again = base64.b64decode(more[-1].encrypted_content).decode()
        assert "AssertionError" in again and again.count("You are an agent.") == 0
        assert [each.content[0].text for each in more[:-1]][-1] == "Mend it."


def test_a_long_last_output_is_shortened_to_a_part_of_the_context() -> None:
    with running(tiny_service()) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        talk: Any = [TALK[1], TALK[2], {**TALK[3], "output": LOG * 20}]
        done = client.responses.compact(model="tiny", input=talk)
        assert done.usage.output_tokens < done.usage.input_tokens // 10


def test_a_trigger_makes_a_turn_that_is_the_compaction(address: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": [*TALK, {"type": "compaction_trigger"}]}
    events = events_of(address, body)
    names = ["created", "in_progress", "output_item.added", "output_item.done", "completed"]
    assert [each["type"].removeprefix("response.") for each in events] == names
    response = events[-1]["response"]
    assert [each["type"] for each in response["output"]] == ["compaction"] and response["usage"]["output_tokens"] > 0
    assert events[-2]["item"] == response["output"][0]


def test_a_conversation_goes_on_from_its_compaction_alone() -> None:
    script = ScriptedEngine("Yes.")
    with running(scripted(script)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        talk: Any = [*TALK[:2], {"role": "assistant", "content": LOG[:6000]}, {"type": "compaction_trigger"}]
        short = client.responses.create(model="tiny", input=talk)
        client.responses.create(model="tiny", input="Mend it.", previous_response_id=short.id)
        listed = [each.type for each in client.responses.input_items.list(short.id)]
    prompt = script.tokenizer.decode(script.requests[0].prompt)
    assert listed == ["message", "message"] and prompt.count("Why does test_tokens fail?") == 2  # and its position
    assert len(prompt) < 4500 and prompt.index("The conversation so far, shortened:") < prompt.index("Mend it.")


def test_nothing_cannot_be_compacted(client: openai.OpenAI) -> None:
    robot: Any = {"input": [{"role": "robot", "content": "x"}]}
    for wrong, field in (({}, "input"), ({"input": []}, "input"), ({"input": ""}, "input"), (robot, "input[0].role")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.compact(model="tiny", **wrong)
        assert caught.value.param == field
