"""Clients' schemas and grammars: which are refused, with which message, and that rule names do not collide."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from paceline.engine.grammar import Grammars
from paceline.serve.call_grammars import CALL_FORMATS
from paceline.serve.constrain import AllowedCalls, output_grammar
from paceline.serve.tools import HermesParser
from tests.serve.service import byte_tokenizer

ASK: list[Any] = [{"role": "user", "content": "Say it."}]
ODD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}},
    "required": ["a"],
    "additionalProperties": False,
}


def asked(path: str, schema: Any, strict: bool | None, forced: bool) -> dict[str, Any]:
    """A body with a tool whose parameters are `schema`."""
    more = {} if strict is None else {"strict": strict}
    if path == "/v1/messages":
        tools: Any = [{"name": "odd", "input_schema": schema, **more}]
        choice: Any = {"tool_choice": {"type": "any"}} if forced else {}
        return {"model": "tiny", "messages": ASK, "max_tokens": 200, "tools": tools, **choice}
    function = {"name": "odd", "parameters": schema, **more}
    choice = {"tool_choice": "required"} if forced else {}
    if path == "/v1/responses":
        tools = [{"type": "function", **function}]
        return {"model": "tiny", "input": "x", "max_output_tokens": 200, "tools": tools, **choice}
    tools = [{"type": "function", "function": function}]
    return {"model": "tiny", "messages": ASK, "max_tokens": 200, "tools": tools, **choice}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_tools_keyword_of_another_form_is_refused_with_its_name(address: str, path: str) -> None:
    for schema, word in (
        ({"type": "object", "properties": {"a": {"type": "string", "x-lark": 3}}}, "x-lark must be a string"),
        ({"type": "object", "properties": {"a": {"type": "string", "enum": 3}}}, "enum must be a list"),
        ({"type": "object", "properties": {"a": {"items": {"required": 1}}}}, "required must be"),
        ({"type": "string"}, "type must be object"),
    ):
        for forced in (False, True):
            reply = httpx.post(address + path, json=asked(path, schema, None, forced))
            assert reply.status_code == 400 and "'odd'" in reply.text and word in reply.text, reply.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_only_a_strict_tool_is_refused_for_what_cannot_be_enforced(address: str, path: str) -> None:
    for strict, forced, status in (
        (True, False, 400),
        (True, True, 400),
        (False, True, 200),
        (None, True, 200),
        (None, False, 200),
    ):
        reply = httpx.post(address + path, json=asked(path, ODD, strict, forced), timeout=60)
        assert reply.status_code == status, reply.text
        assert status == 200 or "uniqueItems" in reply.text


@pytest.mark.parametrize(("strict", "status"), [(None, 200), (False, 200), (True, 400)])
def test_only_a_strict_format_is_refused_for_what_cannot_be_enforced(
    address: str, strict: bool | None, status: int
) -> None:
    form = {"name": "odd", "schema": ODD, "strict": strict}
    text = {"format": {"type": "json_schema", **form}}
    response_format = {"type": "json_schema", "json_schema": form}
    for path, body in (
        ("/v1/chat/completions", {"messages": ASK, "max_tokens": 200, "response_format": response_format}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 200, "text": text}),
    ):
        reply = httpx.post(address + path, json={"model": "tiny", **body}, timeout=60)
        assert reply.status_code == status, reply.text
        assert status == 200 or "uniqueItems" in reply.text


def test_a_formats_keyword_of_another_form_is_refused_with_its_name(address: str) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": 3}}}
    form = {"type": "json_schema", "name": "odd", "schema": schema}
    for path, body in (
        ("/v1/chat/completions", {"messages": ASK, "response_format": {"type": "json_schema", "json_schema": form}}),
        ("/v1/chat/completions", {"messages": ASK, "structured_outputs": {"json": schema}}),
        ("/v1/responses", {"input": "x", "text": {"format": form}}),
    ):
        reply = httpx.post(address + path, json={"model": "tiny", **body})
        assert reply.status_code == 400 and "enum must be a list" in reply.text, reply.text


def test_a_number_that_no_float_holds_and_a_list_without_end_are_refused(address: str) -> None:
    for asked, words in (
        ({"json_schema": {"minLength": 10**400}}, "does not compile"),
        (
            {"guided_choice": [f"choice {index}" for index in range(100_000)]},
            "guided_choice can have at most 4096 texts",
        ),
        ({"structured_outputs": {}}, "exactly one of json, json_object, regex, choice, grammar"),
    ):
        reply = httpx.post(f"{address}/v1/completions", json={"prompt": "x", **asked})
        assert reply.status_code == 400 and words in reply.text, reply.text


# recursive through `start`, with rule names that the server uses too, and braces that would mislead a scan for braces
LARK = """start: "(" start ")" | r0 | r1
r0: A // a comment's }
r1: "{" /[}]/
held: "}"
A: /[a-c]+/
"""


def passes(grammar: str | None, text: str) -> bool:
    tokenizer = byte_tokenizer()
    assert grammar is not None
    tokens = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_tokens[0]]
    bits = Grammars(tokenizer, tokenizer.vocab_size).matcher(grammar).masks([0, *tokens], [0, *range(len(tokens))])
    return all(bits[index][token // 32] >> (token % 32) & 1 for index, token in enumerate(tokens))


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("kind", list(CALL_FORMATS))
def test_a_grammars_names_are_its_own_beside_tools_and_reasoning(kind: Any, thinking: bool | None) -> None:
    tokenizer = byte_tokenizer()
    calls = AllowedCalls({"f": {"type": "object", "properties": {}, "additionalProperties": False}})
    before = {None: "", False: "<think>\n((\n</think>\n\n", True: "((\n</think>\n\n"}[thinking]
    for offered in (AllowedCalls({}), calls):
        grammar = output_grammar(LARK, offered, kind, tokenizer.special_tokens, thinking)
        for text, holds in (("((abc))", True), ("{}", True), ("((abc)", False), ("}", False), ("(d)", False)):
            assert passes(grammar, before + text) is holds, (offered, text)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    if kind is HermesParser:
        assert passes(grammar, before + call) and not passes(grammar, before + f"({call})")


def test_what_a_grammar_ignores_is_ignored_in_it_alone() -> None:
    tokenizer = byte_tokenizer()
    lark = 'start: "a" start | "b"\n%ignore /[ ]+/\n'
    grammar = output_grammar(lark, AllowedCalls({"f": None}), HermesParser, tokenizer.special_tokens, None)
    assert passes(grammar, "a a  b") and not passes(grammar, "a a  a")
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert passes(grammar, call) and not passes(grammar, call.replace('"f"', ' "f"').replace('{"n', '{  "n'))


def test_a_grammar_beside_tools_is_held(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    extra = {"structured_outputs": {"grammar": LARK}}
    options: Any = {"messages": ASK, "max_tokens": 200, "extra_body": extra, "logit_bias": {str(ord("{")): 100}}
    reply = client.chat.completions.create(model="tiny", tools=tools, **options)
    assert reply.choices[0].message.content == "{}" and reply.choices[0].finish_reason == "stop"
