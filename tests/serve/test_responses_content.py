"""Items and parts that the model cannot read become placeholders, and the conversation continues."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import msgspec
import pytest

from paceline.serve.responses_input import ResponsesBody, encode, responses_tools
from tests.serve.service import byte_tokenizer

IMAGE = "(an image, which this model cannot see)"
PICTURE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
ASK = {"role": "user", "content": "Go on."}


def written(*items: Any) -> str:
    """The text of the prompt of a conversation that ends with a question."""
    read = msgspec.json.decode(json.dumps({"model": "tiny", "input": [*items, ASK]}), type=ResponsesBody)
    read.check()
    text = byte_tokenizer().decode(encode(byte_tokenizer(), read, responses_tools(read)), skip_special=False)
    text = text.removeprefix("<|im_start|>system\nHelp.<|im_end|>\n")
    return text.removesuffix("<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")


def call(name: str, arguments: Any) -> str:
    spoken = f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}'
    return f"<|im_start|>assistant\n\n<tool_call>\n{spoken}\n</tool_call><|im_end|>\n"


def result(text: str) -> str:
    return f"<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n"


def said(text: str, role: str = "user") -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (
            [
                {
                    "type": "local_shell_call",
                    "id": "ls_1",
                    "call_id": "c1",
                    "status": "completed",
                    "action": {"type": "exec", "command": ["ls"], "timeout_ms": None, "env": {}},
                },
                {"type": "local_shell_call_output", "id": "c1", "output": "a.py"},
            ],
            call("local_shell", {"type": "exec", "command": ["ls"], "env": {}}) + result("a.py"),
        ),
        (
            [
                {"type": "shell_call", "call_id": "c1", "action": {"commands": ["ls", "no"], "max_output_length": None}},
                {
                    "type": "shell_call_output",
                    "call_id": "c1",
                    "max_output_length": None,
                    "output": [
                        {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
                        {"stdout": "", "stderr": "no: not found", "outcome": {"type": "timeout"}},
                    ],
                },
            ],
            call("shell", {"commands": ["ls", "no"]}) + result("a.py\n(exit code 0)\nno: not found\n(timed out)"),
        ),
        (
            [
                {
                    "type": "apply_patch_call",
                    "call_id": "c1",
                    "status": "completed",
                    "operation": {"type": "update_file", "path": "a.py", "diff": "-1\n+2"},
                },
                {"type": "apply_patch_call_output", "call_id": "c1", "status": "failed", "output": "no such line"},
            ],
            call("apply_patch", {"type": "update_file", "path": "a.py", "diff": "-1\n+2"}) + result("no such line"),
        ),
        (
            [
                {"type": "computer_call", "call_id": "c1", "action": {"type": "click", "x": 1}},
                {
                    "type": "computer_call_output",
                    "call_id": "c1",
                    "output": {"type": "computer_screenshot", "image_url": "data:"},
                },
            ],
            call("computer", {"type": "click", "x": 1}) + result(IMAGE),
        ),
        (
            [{"type": "mcp_call", "id": "m", "server_label": "s", "name": "ask", "arguments": '{"q": 1}', "output": "yes"}],
            call("ask", {"q": 1}) + result("yes"),
        ),
        (
            [{"type": "mcp_call", "id": "m", "server_label": "s", "name": "ask", "arguments": "{}", "error": "no server"}],
            call("ask", {}) + result("no server"),
        ),
        (
            [
                {"type": "mcp_list_tools", "id": "l", "server_label": "s", "tools": []},
                {"type": "mcp_approval_request", "id": "r", "server_label": "s", "name": "ask", "arguments": "{}"},
                {"type": "mcp_approval_response", "approval_request_id": "r", "approve": False, "reason": "not now"},
            ],
            call("ask", {}) + result("refused: not now"),
        ),
        (
            [
                {
                    "type": "code_interpreter_call",
                    "id": "ci",
                    "container_id": "c",
                    "code": "1 + 1",
                    "outputs": [{"type": "logs", "logs": "2"}, {"type": "image", "url": "x"}],
                }
            ],
            call("code_interpreter", {"code": "1 + 1"}) + result(f"2\n{IMAGE}"),
        ),
        (
            [{"type": "file_search_call", "id": "fs", "queries": ["q"], "results": [{"text": "found", "score": 1.0}]}],
            call("file_search", {"queries": ["q"]}) + result("found"),
        ),
        (
            [{"type": "image_generation_call", "id": "ig", "status": "completed", "result": "iVBORw0K"}],
            call("image_generation", {}) + result(IMAGE),
        ),
        (
            [
                {"type": "web_search_call", "id": "ws", "action": {"type": "search", "query": "q"}},
                {"type": "file_search_call", "id": "fs", "queries": ["q"], "results": None},
                {"type": "tool_search_call", "arguments": {}},
                {"type": "tool_search_output", "tools": []},
            ],
            "",
        ),
        (
            [
                {"type": "program", "call_id": "c1", "code": "f()", "fingerprint": "x"},
                {"type": "program_output", "call_id": "c1", "result": "3", "status": "completed"},
            ],
            call("program", {"code": "f()"}) + result("3"),
        ),
        (
            [
                {"type": "brand_new_call", "call_id": "c1", "arguments": '{"a": 1}'},
                {"type": "brand_new_call_output", "call_id": "c1", "output": [{"odd": 1}]},
                {"type": "telepathy", "id": "t"},
            ],
            call("brand_new", {"a": 1})
            + result('{"odd": 1}')
            + said("(an item of type telepathy, which this model cannot see)"),
        ),
        ([{"type": "compaction", "encrypted_content": "gAAAAABpM0Yj=="}], None),
        ([{"type": "compaction_trigger"}], ""),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}], said("I will not.", "assistant")),
        ([{"role": "user", "content": [{"type": "input_text", "text": "See:"}, PICTURE]}], said(f"See:\n{IMAGE}")),
        ([{"role": "user", "content": [PICTURE]}], said(IMAGE)),  # of an earlier turn
        (
            [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:x/pdf;base64,AA"}]}],
            said("(the file a.pdf, which this model cannot read)"),
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], said("(audio, which this model cannot hear)")),
        (
            [{"role": "user", "content": [{"type": "input_smell"}]}],
            said("(content of type input_smell, which this model cannot see)"),
        ),
        (
            [
                {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c1"},
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_text", "text": "Seen:"}, PICTURE, {"type": "input_file", "file_id": "file_1"}],
                },
            ],
            call("f", {}) + result(f"Seen:\n{IMAGE}\n(a file, which this model cannot read)"),
        ),
    ],
    ids=lambda value: value[0].get("type", "message") if isinstance(value, list) else "",
)  # fmt: skip
def test_the_turn_goes_on(items: list[dict[str, Any]], expected: str | None) -> None:
    if expected is None:
        expected = said("(an earlier part of the conversation, which this model cannot read)")
    assert written(*items) == expected


def test_a_text_file_is_text() -> None:
    data = base64.b64encode("é = 1\n".encode()).decode()
    part = {"type": "input_file", "filename": "a.py", "file_data": f"data:text/x-python;base64,{data}"}
    assert written({"role": "user", "content": [part]}) == said("a.py:\né = 1\n")
    for broken in ("data:text/plain;base64,/w==", "data:text/plain;base64,???"):  # not UTF-8; not base64
        assert "cannot read" in written({"role": "user", "content": [{**part, "file_data": broken}]})


@pytest.mark.parametrize(
    ("items", "status"),
    [
        ([{"role": "user", "content": [PICTURE]}], 400),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "f"}, PICTURE]}], 400),
        ([ASK, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": [PICTURE]}], 400),
        ([{"role": "user", "content": [PICTURE, {"type": "input_text", "text": "What is this?"}]}], 200),
        ([{"role": "user", "content": [PICTURE]}, {"role": "assistant", "content": "No."}, ASK], 200),
        ([{"type": "computer_call", "call_id": "c", "action": {"type": "wait"}}], 200),
    ],
)
def test_only_a_new_message_of_nothing_but_an_image_is_refused(
    address: str, items: list[dict[str, Any]], status: int
) -> None:
    reply = httpx.post(f"{address}/v1/responses", json={"model": "tiny", "input": items, "max_output_tokens": 4})
    assert reply.status_code == status, reply.text
    if status == 400:
        error = reply.json()["error"]
        assert error["param"] == f"input[{len(items) - 1}].content[0]" and "text only" in error["message"]
