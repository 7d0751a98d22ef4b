"""Content of every type that Anthropic's clients send in a history: it becomes text, and the conversation continues."""

from __future__ import annotations

import json
import sys
from typing import Any

import anthropic
import httpx
import msgspec
import pytest

from paceline.errors import BadField
from paceline.serve.messages_input import MessagesBody, encode
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted

UNSEEN = "(an image, which this model cannot see)"
UNREAD = "(a document, which this model cannot read)"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUFB"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "QUFB"}}
PLAIN = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "The grass is green."}}
FOUND: Any = {
    "type": "search_result",
    "source": "https://a.b/c",
    "title": "Colours",
    "content": [{"type": "text", "text": "Green."}, {"type": "text", "text": "Blue."}],
    "citations": {"enabled": True},
}
# blocks of messages of both roles and of tool results
SHARED: list[tuple[Any, str]] = [
    (IMAGE, UNSEEN),
    (PLAIN, "The grass is green."),
    ({**PLAIN, "title": "Facts", "context": "A lexicon."}, "Facts\nA lexicon.\nThe grass is green."),
    ({**PLAIN, "title": None, "context": None, "citations": {"enabled": True}}, "The grass is green."),
    ({"type": "document", "source": {"type": "content", "content": "Some text."}}, "Some text."),
    (
        {"type": "document", "title": "T", "source": {"type": "content", "content": [FOUND["content"][0], IMAGE]}},
        f"T\nGreen.\n\n{UNSEEN}",
    ),
    (PDF, UNREAD),
    ({**PDF, "title": "a.pdf"}, f"a.pdf\n{UNREAD}"),
    ({"type": "document", "source": {"type": "url", "url": "https://a.b/c.pdf"}}, UNREAD),
    ({"type": "document", "source": {"type": "file", "file_id": "file_1"}}, UNREAD),
    (FOUND, "Colours\nhttps://a.b/c\nGreen.\n\nBlue."),
    ({"type": "tool_reference", "tool_name": "get_weather"}, "(the tool get_weather)"),
    ({"type": "container_upload", "file_id": "f"}, "(content of type container_upload, which this model cannot read)"),
    ({"type": "of_next_year", "x": [1]}, "(content of type of_next_year, which this model cannot read)"),
    (
        {"type": "of_next_year", "text": 3, "content": {"a": 1}},
        "(content of type of_next_year, which this model cannot read)",
    ),
    ({"type": "of_next_year", "text": "It says so."}, "It says so."),
]


def result(kind: str, content: Any) -> dict[str, Any]:
    return {"type": f"{kind}_tool_result", "tool_use_id": "srvtoolu_1", "content": content}


RAN = {"stdout": "3\n", "stderr": "", "return_code": 0, "content": []}
# blocks of an assistant's message after a server has run tools
SERVED: list[tuple[Any, str]] = [
    (
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "é"}},
        '(called web_search with {"query": "é"})',
    ),
    (
        {"type": "mcp_tool_use", "id": "m", "name": "echo", "server_name": "s", "input": {"a": 1}},
        '(called echo with {"a": 1})',
    ),
    (
        result(
            "web_search",
            [
                {"type": "web_search_result", "title": "A", "url": "https://a.b", "encrypted_content": "x"},
                {"type": "web_search_result", "title": "B", "url": "https://c.d", "encrypted_content": "y"},
            ],
        ),
        "A\nhttps://a.b\n\nB\nhttps://c.d",
    ),
    (
        result("web_search", {"type": "web_search_tool_result_error", "error_code": "unavailable"}),
        "error: unavailable",
    ),
    (
        result("web_fetch", {"type": "web_fetch_result", "url": "https://a.b", "content": PLAIN}),
        "https://a.b\nThe grass is green.",
    ),
    (result("code_execution", {"type": "code_execution_result", **RAN}), "3\n\nexit status 0"),
    (result("bash_code_execution", {"type": "bash_code_execution_result", **RAN}), "3\n\nexit status 0"),
    (
        result(
            "text_editor_code_execution",
            {"type": "text_editor_code_execution_view_result", "file_type": "text", "content": "x = 1"},
        ),
        "x = 1",
    ),
    (
        result(
            "text_editor_code_execution",
            {"type": "text_editor_code_execution_str_replace_result", "lines": ["-x = 1", "+x = 2"]},
        ),
        "-x = 1\n+x = 2",
    ),
    (
        result(
            "tool_search",
            {"type": "tool_search_tool_search_result", "tool_references": [SHARED[11][0], SHARED[11][0]]},
        ),
        "(the tool get_weather)\n\n(the tool get_weather)",
    ),
    (
        {"type": "mcp_tool_result", "tool_use_id": "m", "is_error": True, "content": [{"type": "text", "text": "No."}]},
        "Error: No.",
    ),
    ({"type": "mcp_tool_result", "tool_use_id": "m", "is_error": False, "content": "Yes."}, "Yes."),
    ({"type": "compaction", "content": "All was well."}, "All was well."),
    ({"type": "compaction", "content": None}, "(content of type compaction, which this model cannot read)"),
]
USE = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}


def prompt(*messages: tuple[str, Any]) -> str:
    asked = {"model": "x", "max_tokens": 9, "messages": [{"role": role, "content": text} for role, text in messages]}
    tokenizer = byte_tokenizer()
    return tokenizer.decode(encode(tokenizer, msgspec.convert(asked, MessagesBody)), skip_special=False)


@pytest.mark.parametrize(("block", "text"), SHARED)
def test_content_becomes_text_in_place(block: Any, text: str) -> None:
    written = prompt(("user", [{"type": "text", "text": "Look:"}, block]))
    assert f"<|im_start|>user\nLook:\n\n{text}<|im_end|>" in written
    returned = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "It:"}, block]}
    written = prompt(("user", "Go"), ("assistant", [USE]), ("user", [returned]))
    assert f"<tool_response>\nIt:\n\n{text}\n</tool_response>" in written
    written = prompt(("user", "Go"), ("assistant", [block]), ("user", "And?"))
    assert f"<|im_start|>assistant\n{text}<|im_end|>" in written


@pytest.mark.parametrize(("block", "text"), SERVED)
def test_server_tools_results_become_text_in_place(block: Any, text: str) -> None:
    around = [{"type": "text", "text": "I look."}, block, {"type": "text", "text": "So."}]
    written = prompt(("user", "Go"), ("assistant", around), ("user", "And?"))
    assert f"<|im_start|>assistant\nI look.\n\n{text}\n\nSo.<|im_end|>" in written


SEEN = [each for each, text in SHARED if "which this model cannot" not in text] + [
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": [IMAGE]},
    {"type": "tool_result", "tool_use_id": "toolu_1", "content": []},
]


@pytest.mark.parametrize("block", SEEN)
def test_a_new_message_with_something_to_see_is_taken(block: Any) -> None:
    written = prompt(("user", "Go"), ("assistant", [USE]), ("user", [block]))
    later = prompt(("user", "Go"), ("assistant", [USE]), ("user", [block]), ("assistant", "So."), ("user", "And?"))
    assert later.startswith(written)


@pytest.mark.parametrize("more", [[], [{"type": "text", "text": " \n"}], [PDF]])
@pytest.mark.parametrize("reminded", [False, True])
def test_only_a_new_message_of_nothing_else_is_refused(more: list[Any], reminded: bool) -> None:
    after = [("system", "Be brief.")] if reminded else []
    with pytest.raises(
        BadField, match=r"messages\.2\.content: this model cannot read blocks of type (document, )?image"
    ):
        prompt(("user", "Go"), ("assistant", "So."), ("user", [*more, IMAGE]), *after)
    taken = prompt(("user", [*more, IMAGE]), *after, ("assistant", "So."), ("user", [*more, IMAGE, SHARED[1][0]]))
    assert taken.count(UNSEEN) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{}], r"messages\.0\.content\.0\.type"),
        ([{"type": 3}], r"messages\.0\.content\.0\.type"),
        ([{"type": "text", "text": 3}], r"messages\.0\.content\.0: .*text"),
        ([{"type": "tool_result", "content": 3}], r"messages\.0\.content\.0: .*content"),
        ([{"type": "tool_result", "content": [{"type": "text", "text": 3}]}], r"messages\.0\.content\.0\.content\.0: "),
        ([{"type": "tool_result", "content": [3]}], r"messages\.0\.content\.0: "),
    ],
)
def test_a_block_of_no_form_is_refused_by_its_place(content: Any, words: str) -> None:
    with pytest.raises(BadField, match=words):
        prompt(("user", content))


def test_a_system_prompt_is_text_alone() -> None:
    asked = {"model": "x", "max_tokens": 9, "system": [IMAGE], "messages": [{"role": "user", "content": "Go"}]}
    with pytest.raises(BadField, match=r"system\.0"):
        encode(byte_tokenizer(), msgspec.convert(asked, MessagesBody))


def test_deep_content_is_a_bad_request_and_a_long_one_is_read() -> None:
    many = json.dumps([PLAIN] * 200)
    cases = [(deep(300), 400), (deep(3000), 400), (many, 200), (deep(20), 200)]
    if sys.version_info >= (3, 12):  # whose recursion limit is not that of code in C: it reads and writes 300 levels
        cases = [(deep(100_000), 400), (many, 200), (deep(20), 200)]
    with running(scripted(ScriptedEngine("Done."))) as url:
        for content, status in cases:
            body = f'{{"model": "tiny", "max_tokens": 9, "messages": [{{"role": "user", "content": {content}}}]}}'
            assert httpx.post(f"{url}/v1/messages", content=body, timeout=30).status_code == status


def test_a_document_within_documents_is_read_once() -> None:
    block: dict[str, Any] = PLAIN
    for _ in range(60):
        block = {"type": "document", "source": block}
    with running(scripted(ScriptedEngine("Done."))) as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": [block]}]}
        assert httpx.post(f"{url}/v1/messages/count_tokens", json=body, timeout=30).status_code == 200


def deep(depth: int) -> str:
    inner = json.dumps([PLAIN])
    return '[{"type": "of_next_year", "content": ' * depth + inner + "}]" * depth


def test_a_history_with_all_of_it_goes_on_by_the_clients_own_types() -> None:
    script = ScriptedEngine("Done.")
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Go"}, *(each for each, _ in SHARED)]},
        {"role": "assistant", "content": [each for each, _ in SERVED]},
        {"role": "user", "content": "And?"},
    ]
    with running(scripted(script)) as url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        options: Any = {"model": "tiny", "messages": turns}
        reply = client.messages.create(max_tokens=9, **options)
        assert [each.type for each in reply.content] == ["text"] and reply.stop_reason == "end_turn"
        count = client.messages.count_tokens(**options).input_tokens
    assert count == len(script.requests[0].prompt) == reply.usage.input_tokens
