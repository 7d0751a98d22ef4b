"""Every field by which other servers' clients constrain an output: enforced or refused by name, never ignored."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import openai
import pytest

from paceline.engine.grammar import Grammars
from paceline.errors import BadField
from paceline.serve import custom_tools
from paceline.serve.call_grammars import CALL_FORMATS
from paceline.serve.constrain import AllowedCalls, Constraints, client_grammar, output_grammar
from paceline.serve.tools import HermesParser, QwenCoderParser
from tests.serve.formats import FORMATS
from tests.serve.service import byte_tokenizer

ASK: list[Any] = [{"role": "user", "content": "Say it."}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
OBJECT = r'\{[ \t\r\n]*"ok"[ \t\r\n]*:[ \t\r\n]*(true|false)[ \t\r\n]*\}'
GBNF = """# as llama.cpp's
root ::= "<" item{2} ">" tail?
item ::= [a-c] | "\\u0064"
tail ::= "\\n" [^\\r\\n"\\\\]{1,3}
"""
LARK = 'start: "<" /[a-d]{2}/ ">"'
ITEMS = r'<[a-d]{2}>(\n[^\r\n"\\]{1,3})?'
TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)


def passes(grammar: str | None, text: str) -> bool:
    """Whether the grammar accepts exactly the text."""
    assert grammar is not None
    tokens = [*TOKENIZER.encode(text, allow_special=True), TOKENIZER.eos_tokens[0]]
    bits = GRAMMARS.matcher(grammar).masks([0, *tokens], [0, *range(len(tokens))])
    return all(bits[index][token // 32] >> (token % 32) & 1 for index, token in enumerate(tokens))


def constraint(**fields: Any) -> str | None:
    return msgspec.convert(fields, Constraints).constraint


ENFORCED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, OBJECT),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, OBJECT),
    ({"structured_outputs": {"json": SCHEMA}}, OBJECT),
    ({"structured_outputs": {"grammar": GBNF}}, ITEMS),
    ({"guided_json": SCHEMA}, OBJECT),
    ({"guided_json": json.dumps(SCHEMA)}, OBJECT),
    ({"guided_regex": "v[0-9]{1,3}"}, "v[0-9]{1,3}"),
    ({"guided_choice": ["yes", 'n"o']}, 'yes|n"o'),
    ({"guided_grammar": LARK}, ITEMS),
    ({"guided_grammar": GBNF}, ITEMS),
    ({"grammar": GBNF}, ITEMS),
    ({"json_schema": SCHEMA}, OBJECT),
    ({"json_schema": json.dumps(SCHEMA)}, OBJECT),
    ({"regex": "[ab]{3}"}, "[ab]{3}"),
    ({"ebnf": GBNF}, ITEMS),
    ({"guided_regex": "a|b", "guided_decoding_backend": "xgrammar", "guided_json": None, "grammar": ""}, "a|b"),
]


@pytest.mark.parametrize(("extra", "pattern"), ENFORCED)
def test_what_constrains_is_enforced(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 7}):
        asked: Any = {"model": "tiny", "max_tokens": 400, "extra_body": extra, **options}
        choice = client.chat.completions.create(messages=ASK, **asked).choices[0]
        assert re.fullmatch(pattern, choice.message.content or "") and choice.finish_reason == "stop"
        assert re.fullmatch(pattern, client.completions.create(prompt="abc", **asked).choices[0].text)


@pytest.mark.parametrize(
    "extra",
    [{"guided_json_object": True}, {"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}],
)
def test_any_object(extra: dict[str, Any]) -> None:
    for text, is_one in (("{}", True), ('{"a": [1]}', True), ("3", False), ("text", False)):
        assert passes(constraint(**extra), text) is is_one


def test_nothing_asked_is_free_text() -> None:
    for extra in (
        {},
        {"response_format": {"type": "text"}},
        {"guided_json_object": False},
        {"grammar": "", "bad_words": []},
    ):
        assert constraint(**extra) is None


def test_a_format_s_schema_means_what_json_schema_says() -> None:
    """A lenient schema allows keys that it does not declare: only a tool's arguments are closed."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for extra in (
        {"response_format": {"type": "json_object", "schema": schema}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {"guided_json": schema},
        {"json_schema": schema},
    ):
        assert passes(constraint(**extra), '{"a": 1, "b": 2}') and not passes(constraint(**extra), '{"a": "x"}')


@pytest.mark.parametrize("name", ["hermes", "deepseek", "dsml", "dsml4", "kimi", "qwen_coder", "glm", "minimax"])
def test_a_forced_call_invents_no_arguments(name: str) -> None:
    """Undeclared keys are refused, unless the tool's schema allows others."""
    form = FORMATS[name]
    kind: Any = form.parser
    inner = {"type": "object", "properties": {"x": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "in": inner}}
    for tool, arguments, allowed in (
        (schema, {"a": 1, "in": {"x": 1}}, True),
        (schema, {"a": 1, "b": 2}, False),
        (schema, {"in": {"x": 1, "y": 2}}, False),
        ({**schema, "properties": {"in": {**inner, "additionalProperties": True}}}, {"in": {"x": 1, "y": 2}}, True),
        ({**schema, "properties": {"in": {"type": "object"}}}, {"in": {"y": 2}}, True),
    ):
        grammar = output_grammar(None, AllowedCalls({"f": tool}, forced=True), kind, TOKENIZER.special_tokens, None)
        assert passes(grammar, form.write([("f", arguments)])) is allowed, arguments
    assert kind in CALL_FORMATS


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json and guided_regex"),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "structured_outputs and guided_choice"),
        ({"response_format": {"type": "json_object"}, "grammar": GBNF}, "response_format and grammar"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"json_schema": SCHEMA, "grammar": GBNF}, "grammar and json_schema"),
        ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, "disable_any_whitespace"),
        ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": GBNF}}, "response_format"),
        ({"grammar": GBNF, "grammar_lazy": True}, "grammar_lazy"),
        ({"allowed_token_ids": [1, 2]}, "allowed_token_ids"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"guided_json": "{"}, "guided_json is not valid JSON"),
        ({"guided_json": {"type": "objekt"}}, "guided_json has an invalid JSON schema"),
        ({"json_schema": "[]"}, "json_schema must be a schema object"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": 3}}},
            "response_format has an invalid JSON schema",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "(a"}, "compile"),
        ({"guided_regex": "a" * 40_000}, "guided_regex is longer"),
        ({"grammar": "root ::= item"}, "grammar is not a valid GBNF grammar: Rule 'item' not found"),
        ({"grammar": 'item ::= "a"'}, "grammar is not a valid GBNF grammar"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar is not a valid GBNF grammar: it is nested too deeply"),
        ({"grammar": "free text"}, "compile"),
        ({"grammar": {"type": "json"}}, "grammar"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI, extra: dict[str, Any], field: str) -> None:
    for ask in (
        lambda: client.chat.completions.create(model="tiny", messages=ASK, extra_body=extra),
        lambda: client.completions.create(model="tiny", prompt="abc", extra_body=extra),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert field in str(caught.value)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        ('root ::= "a" "\\x41" [\\x30-\\x39]+', ["aA0", "aA19"], ["a", "aAb"]),
        ('root ::= "\\u3042\\U0001F600" [\\u3042-\\u3093]', ["あ😀い"], ["あ😀a", "\\u3042"]),
        ('root ::= "\\\\u0041"', ["\\u0041"], ["A"]),
        (
            'root ::= (expr "=" ws num "\\n")+\nexpr ::= num ([-+*/] num)*\nnum ::= [0-9]+ ws\nws ::= [ \\t]*',
            ["1+2= 3\n"],
            ["1+="],
        ),
        ('root-list ::= "- " [^\\r\\n]+ "\\n"\nroot ::= root-list{2,3}', ["- a\n- b\n"], ["- a\n", "- a\n" * 4]),
        ('root ::= "a" | ("b" root)', ["a", "bba"], ["b", "ab"]),
        ('start: "a ::= b"', ["a ::= b"], ["a"]),
    ],
)
def test_gbnf_is_read_as_llama_cpp_reads_it(grammar: str, good: list[str], bad: list[str]) -> None:
    for made in (
        client_grammar(grammar, "grammar"),
        output_grammar(client_grammar(grammar, "grammar"), AllowedCalls({}), None, {}, False),
    ):
        assert all(passes(made, text) for text in good)
        assert not any(passes(made, text) for text in bad)


PATCH = {"syntax": "lark", "definition": 'start: "+" /[a-z]+/'}


@pytest.mark.parametrize("nested", [True, False])  # the chat API has the grammar within the format
@pytest.mark.parametrize("grammar", [PATCH, {"syntax": "regex", "definition": r"\+[a-z]+"}])
def test_a_custom_tool_s_grammar_in_both_apis_forms(nested: bool, grammar: dict[str, str]) -> None:
    written = {"type": "grammar", **({"grammar": grammar} if nested else grammar)}
    form = msgspec.convert(written, custom_tools.InputFormat)
    assert custom_tools.has_grammar(form) and grammar["definition"] in custom_tools.description("Patches.", form)
    calls = AllowedCalls({"patch": custom_tools.parameters(form)}, strict=("patch",))
    made = output_grammar(None, calls, QwenCoderParser, TOKENIZER.special_tokens, None)
    for text, good in (("+abc", True), ("abc", False)):
        assert passes(made, FORMATS["qwen_coder"].write([("patch", {"input": text})])) is good
    made = output_grammar(None, AllowedCalls(calls.schemas, forced=True), HermesParser, TOKENIZER.special_tokens, None)
    assert passes(made, FORMATS["hermes"].write([("patch", {"input": "any text"})]))
    assert not passes(made, FORMATS["hermes"].write([("patch", {"input": "x", "other": 1})]))


def test_custom_tools_without_a_grammar_and_malformed_ones() -> None:
    for free in (None, custom_tools.InputFormat("text")):
        assert custom_tools.parameters(free) == custom_tools.PARAMETERS and not custom_tools.has_grammar(free)
        assert custom_tools.description("Patches.", free) == "Patches."
    for kind, syntax, definition in (
        ("json", "", ""),
        ("grammar", "", "x"),
        ("grammar", "ebnf", "x"),
        ("grammar", "lark", ""),
    ):
        with pytest.raises(BadField, match="custom tool"):
            custom_tools.parameters(custom_tools.InputFormat(kind, syntax, definition))
    assert (
        custom_tools.input_of('{"input": "a\\ud800"}') == "a?"
        and custom_tools.input_of('{"other": 1}') == '{"other": 1}'
    )
