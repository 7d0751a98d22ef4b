"""POST /v1/compact over HTTP: Morph's fields, tokens counted by the served tokenizer, errors in OpenAI's format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from paceline.errors import RequestError
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted

CODE = "".join(f"def make_{number}(value):\n    return value + {number}\n\n\n" for number in range(40))
TALK = [
    {"role": "system", "content": "You edit code.\n" * 5},
    {"role": "user", "content": "Fix make_7."},
    {"role": "tool", "content": CODE, "name": "make.py"},
    {"role": "assistant", "content": None},
    {"role": "user", "content": [{"type": "text", "text": "Now:"}, {"type": "text", "text": "fix make_31 too."}]},
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(scripted(ScriptedEngine("unused"))) as url:
        yield url


def ask(address: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{address}/v1/compact", json=body, timeout=20)


def tokens(text: str) -> int:
    return len(byte_tokenizer().encode(text))


def test_a_text_is_compacted_to_the_ratio_in_tokens(address: str) -> None:
    """A body as the SDK sends it, with preserve_recent: a text is compacted nevertheless."""
    body = {"model": "morph-compactor", "input": CODE, "query": "what does make_31 return", "compression_ratio": 0.3}
    answer = ask(address, **body, preserve_recent=2, include_line_ranges=True, include_markers=True).json()
    assert answer["id"].startswith("cmpr-") and answer["model"] == "morph-compactor" and answer["object"] == "compact"
    assert "def make_31(value):\n    return value + 31\n" in answer["output"]
    usage = answer["usage"]
    assert usage["input_tokens"] == tokens(CODE) and usage["output_tokens"] == tokens(answer["output"])
    assert 0.3 - 30 / usage["input_tokens"] < usage["output_tokens"] / usage["input_tokens"] <= 0.3
    assert usage["compression_ratio"] == round(usage["output_tokens"] / usage["input_tokens"], 4)
    assert isinstance(usage["processing_time_ms"], int)
    assert answer["paceline"]["over_budget"] is False
    (message,) = answer["messages"]
    assert message["role"] == "user" and message["content"] == answer["output"] and message["kept_line_ranges"] == []
    gone = sum(each["end"] - each["start"] + 1 for each in message["compacted_line_ranges"])
    assert answer["output"].count("(filtered ") == len(message["compacted_line_ranges"])
    assert gone + answer["output"].count("\n") - len(message["compacted_line_ranges"]) == CODE.count("\n")


def test_of_messages_the_last_and_systems_stay_and_the_query_is_the_last_users(address: str) -> None:
    answer = ask(address, messages=TALK, input="not looked at", compression_ratio=0.2).json()
    contents = [each["content"] for each in answer["messages"]]
    assert contents[0] == TALK[0]["content"] and contents[3:] == ["", "Now:\nfix make_31 too."]
    assert "def make_31(value):\n" in contents[2] and len(contents[2]) < len(CODE) / 4
    assert answer["output"] == "\n".join(contents)
    assert answer["messages"][2]["name"] == "make.py" and answer["messages"][1]["name"] is None
    whole = ask(address, messages=TALK, compression_ratio=0.2, preserve_recent=5).json()
    assert whole["messages"][2]["content"] == CODE and whole["usage"]["compression_ratio"] == 1.0
    systems = ask(address, input=TALK, compression_ratio=0.2, compress_system_messages=True).json()
    assert systems["messages"][0]["content"] != TALK[0]["content"]


def test_ranges_and_markers_can_be_left_out(address: str) -> None:
    plain = ask(address, input=CODE, compression_ratio=0.2, include_line_ranges=False, include_markers=False).json()
    assert "(filtered" not in plain["output"] and plain["messages"][0]["compacted_line_ranges"] == []
    assert set(plain["output"].split("\n")) <= {*CODE.split("\n"), ""}


def test_kept_context_stays_and_over_budget_is_reported(address: str) -> None:
    kept = f"<keepContext>\n{CODE}</keepContext>\n"
    answer = ask(address, input=kept + CODE, compression_ratio=0.1).json()
    assert answer["output"].startswith(kept) and answer["paceline"]["over_budget"] is True
    assert answer["messages"][0]["kept_line_ranges"] == [{"start": 1, "end": kept.count("\n")}]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"messages": []}, "messages"),
        ({"input": 7}, "input"),
        ({"input": "text", "compression_ratio": 0.01}, "compression_ratio"),
        ({"input": "text", "compression_ratio": "half"}, "compression_ratio"),
        ({"input": "text", "preserve_recent": -1}, "preserve_recent"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"content": "no role"}]}, "messages[0]"),
    ],
)
def test_what_cannot_be_compacted_is_a_400_that_names_the_field(address: str, body: dict[str, Any], field: str) -> None:
    refused = ask(address, **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert refused.json()["error"]["type"] == "invalid_request_error"


def test_models_and_halves_of_characters(address: str) -> None:
    assert ask(address, input="a\nb\n", model="tiny").json()["model"] == "tiny"
    unknown = ask(address, input="a", model="other")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    half = httpx.post(f"{address}/v1/compact", content=b'{"input": "\\ud800 half"}')
    assert half.status_code == 400


def test_lengths_are_those_of_what_encode_gives() -> None:
    tokenizer = byte_tokenizer()
    texts = ["", "ab", "<|im_end|>", "é\r\n"] * 2000
    assert tokenizer.lengths(texts) == [len(tokenizer.encode(text)) for text in texts]
    with pytest.raises(RequestError):
        tokenizer.lengths(["fine", "\ud800"])


def test_empty_texts_are_answered(address: str) -> None:
    answer = ask(address, input="", query="").json()
    assert answer["output"] == "" and answer["usage"]["input_tokens"] == 0
