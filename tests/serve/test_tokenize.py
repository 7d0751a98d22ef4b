"""Tokenizing texts and conversations, and detokenizing, in the formats of vLLM and llama.cpp."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serve.service import byte_tokenizer, running, tiny, tiny_service

START = byte_tokenizer().special_tokens["<|im_start|>"]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "aé"}, [97, 195, 169]),
        ({"content": "ab"}, [97, 98]),
        ({"prompt": "<|im_start|>a"}, [START, 97]),
        ({"content": "<|im_start|>a"}, [START, 97]),
        ({"content": "<|im_start|>", "parse_special": False}, list(b"<|im_start|>")),
        ({"prompt": ""}, []),
    ],
)
def test_a_texts_tokens(address: str, body: dict[str, Any], tokens: list[int]) -> None:
    reply = httpx.post(f"{address}/tokenize", json=body).json()
    assert reply == {"count": len(tokens), "max_model_len": 2048, "tokens": tokens}
    back = httpx.post(f"{address}/detokenize", json={"model": "tiny", "tokens": tokens}).json()
    assert back == {"prompt": next(iter(body.values())), "content": next(iter(body.values()))}


def test_prefix_tokens_are_added_if_requested() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_tokens = (START,)
    with running(tiny_service(tiny(tokenizer))) as url:
        for body, begins in (
            ({"prompt": "a"}, True),
            ({"prompt": "a", "add_special_tokens": False}, False),
            ({"content": "a"}, False),
            ({"content": "a", "add_special": True}, True),
            ({"content": "a", "add_special": True, "parse_special": False}, True),
        ):
            assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == [START, 97][not begins :]
        info = httpx.get(f"{url}/tokenizer_info").json()
        assert info["bos_token"] == "<|im_start|>" and info["eos_token"] == "<|im_end|>"
        assert info["chat_template"] == tokenizer.chat_template


def test_a_conversation_has_the_tokens_of_its_chat(address: str) -> None:
    function = {"name": "read", "description": None, "parameters": None, "strict": True}
    tools = [{"type": "function", "function": function}, {"type": "custom", "custom": {"name": "patch"}}]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    for fields in ({}, {"tools": tools}):
        body = {"model": "tiny", "messages": messages, "max_tokens": 1, **fields}
        count = httpx.post(f"{address}/tokenize", json=body).json()["count"]
        assert httpx.post(f"{address}/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "content": "a"}, "prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("detokenize", {}, None),
        ("detokenize", {"tokens": [1, 100000]}, "tokens[1]"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_is_no_text_is_a_400(address: str, path: str, body: dict[str, Any], field: str | None) -> None:
    reply = httpx.post(f"{address}/{path}", json=body)
    assert reply.status_code == 400 and (field is None or reply.json()["error"]["param"] == field), reply.text
