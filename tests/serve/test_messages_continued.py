"""Anthropic's messages API: a last assistant message that the reply continues."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import pytest

from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted
from tests.serve.test_messages import CALL, TOOLS

ASK: list[Any] = [{"role": "user", "content": "What is the Greek name for Sun? (A) Sol (B) Helios"}]
BEGUN = "The best answer is ("
THINKS = TEMPLATE.replace("<|im_start|>assistant\\n' }}{%- endif", "<|im_start|>assistant\\n<think>\\n' }}{%- endif")
THINKS += "{#- </think> #}"
assert "<think>" in THINKS


def begun(content: Any = BEGUN) -> list[Any]:
    return [*ASK, {"role": "assistant", "content": content}]


@pytest.mark.parametrize("template", [TEMPLATE, THINKS], ids=["plain", "thinks"])
@pytest.mark.parametrize("content", [BEGUN, [{"type": "text", "text": BEGUN}]])
def test_the_reply_goes_on_where_the_message_ends(template: str, content: Any) -> None:
    script = ScriptedEngine(" B) is it.", "A thought.\n</think>\n\nHelios.")
    script.tokenizer = byte_tokenizer(template=template)
    with running(scripted(script)) as url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        options: Any = {"model": "tiny", "max_tokens": 99, "messages": begun(content)}
        reply: Any = client.messages.create(**options)
        counted = client.messages.count_tokens(model="tiny", messages=begun(content)).input_tokens
        later: Any = client.messages.create(**{**options, "messages": [*begun(f"{BEGUN} B) is it."), *ASK]})
    assert [(each.type, each.text) for each in reply.content] == [("text", " B) is it.")]
    assert reply.stop_reason == "end_turn"
    prompt = script.tokenizer.decode(script.requests[0].prompt, skip_special=False)
    assert prompt.endswith(f"<|im_end|>\n<|im_start|>assistant\n{BEGUN}")
    assert counted == len(script.requests[0].prompt)
    if template is TEMPLATE:
        with running(scripted(script)) as url:
            httpx.post(f"{url}/v1/messages", json={"model": "tiny", "max_tokens": 9, "messages": ASK})
        assert script.requests[0].prompt == script.requests[2].prompt + script.tokenizer.encode(BEGUN)
    assert script.requests[1].prompt[:counted] == script.requests[0].prompt
    assert [each.type for each in later.content] == (["thinking", "text"] if template is THINKS else ["text"])


def test_tools_may_be_called_after_it_and_streams_go_on_with_it() -> None:
    script = ScriptedEngine(f" now.\n{CALL}")
    with running(scripted(script)) as url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        options: Any = {"model": "tiny", "max_tokens": 500, "messages": begun("I read"), "tools": TOOLS}
        with client.messages.stream(**options) as stream:
            reply: Any = stream.get_final_message()
    assert reply.content[0].text == " now." and reply.content[1].input == {"file_path": "é.py", "limit": 3}


@pytest.mark.parametrize(
    ("content", "said", "blocks"),
    [
        ("<tool_call>\n{", '"name": 1}\n</tool_call>', [("text", '"name": 1}\n</tool_call>')]),
        ("<think>\nIs it", " so?\n</think>\n\nHelios.", [("thinking", " so?"), ("text", "Helios.")]),
        ("<think>\nNo.\n</think>\n\nHel", "ios.", [("text", "ios.")]),
    ],
)
def test_what_the_message_has_opened_is_known(content: str, said: str, blocks: list[tuple[str, str]]) -> None:
    script = ScriptedEngine(said)
    script.tokenizer = byte_tokenizer(template=THINKS)
    with running(scripted(script)) as url:
        body = {"model": "tiny", "max_tokens": 99, "messages": begun(content), "tools": TOOLS}
        reply = httpx.post(f"{url}/v1/messages", json=body).json()
    assert [(each["type"], each.get("text", each.get("thinking"))) for each in reply["content"]] == blocks


def test_an_empty_last_message_opens_a_new_turn() -> None:
    script = ScriptedEngine("Helios.")
    with running(scripted(script)) as url:
        for messages in (ASK, begun(""), begun([]), begun([{"type": "text", "text": ""}])):
            body = {"model": "tiny", "max_tokens": 9, "messages": messages}
            assert httpx.post(f"{url}/v1/messages", json=body).status_code == 200
    assert all(each.prompt == script.requests[0].prompt for each in script.requests)


SCHEMA = {"type": "json_schema", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}


@pytest.mark.parametrize(
    ("content", "change", "words"),
    [
        (f"{BEGUN} ", {}, "trailing whitespace"),
        ([{"type": "text", "text": f"{BEGUN}\n"}], {}, "trailing whitespace"),
        (" ", {}, "trailing whitespace"),
        (BEGUN, {"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking is enabled"),
        (BEGUN, {"tools": TOOLS, "tool_choice": {"type": "any"}}, "forces a call"),
        (BEGUN, {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "Read"}}, "forces a call"),
        (BEGUN, {"output_config": {"format": SCHEMA}}, "output format"),
        (BEGUN, {"output_format": SCHEMA}, "output format"),
        ([{"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {}}], {"tools": TOOLS}, "tool_result"),
        ([{"type": "thinking", "thinking": "Hm.", "signature": ""}], {}, "thinking alone"),
    ],
)
def test_a_beginning_that_cannot_be_gone_on_with_is_refused(
    address: str, content: Any, change: dict[str, Any], words: str
) -> None:
    body = {"model": "tiny", "messages": begun(content), **change}
    for path, more in (("/v1/messages", {"max_tokens": 9}), ("/v1/messages/count_tokens", {})):
        reply = httpx.post(address + path, json={**body, **more})
        assert reply.status_code == 400 and words in reply.json()["error"]["message"], reply.text
