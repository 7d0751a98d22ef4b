"""What of a JSON schema is enforced, what is left out where it is lenient, and how strings may be written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paceline.engine.grammar import Grammars, json_schema
from paceline.engine.schemas import problem
from paceline.errors import BadGrammar
from tests.serve.service import byte_tokenizer

TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)


def holds(schema: dict[str, Any], text: str, lenient: bool = False) -> bool:
    """Whether the schema's grammar lets the text pass, and end there."""
    tokens = [*TOKENIZER.encode(text), TOKENIZER.eos_tokens[0]]
    bits = GRAMMARS.follow(json_schema(schema, lenient)).masks([0, *tokens], [0, *[1] * len(tokens)])
    return all(bits[index][token // 32] >> (token % 32) & 1 for index, token in enumerate(tokens))


@pytest.mark.parametrize("more", [{}, {"additionalProperties": True}, {"additionalProperties": {"type": "string"}}])
def test_strings_may_be_written_with_escapes(more: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}, "required": ["a"], **more}
    for text in (r"{'a': '\u00e9'}", r"{'a': '\u0041b'}", r"{'a': '\ud83d\ude00\n'}", "{'a': 'é', 'ü': '\\u00e9'}"):
        assert holds(schema, text.replace("'", '"')), text
    for text in (r"{'a': '\ud83d'}", r"{'a': '\u004'}", r"{'a': '\u0041\u0041\u0041'}"):
        assert not holds(schema, text.replace("'", '"')), text


def test_an_escape_does_not_bring_a_property_again_past_its_schema() -> None:
    for schema in (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}]},
    ):
        assert holds(schema, '{"a": 1, "c": "\\u00e9", "d": [{"\\u0061": 1}]}')
        assert not holds(schema, '{"a": 1, "\\u0061": "x"}')
        assert not holds(schema, '{"a": 1, "a": "x"}')


@pytest.mark.parametrize(
    ("schema", "text", "word"),
    [
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]", "uniqueItems"),
        ({"type": "integer", "not": {"const": 1}}, "1", "not"),
        ({"type": "integer", "if": {"const": 1}, "then": False}, "1", "if"),
        ({"type": "array", "contains": {"const": 1}}, "[]", "contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1}', "dependentRequired"),
        ({"type": "object", "propertyNames": {"maxLength": 1}}, '{"ab": 1}', "propertyNames"),
        ({"type": "string", "format": "iri"}, '"no"', "iri"),
        ({"type": "string", "pattern": "(?=a)b"}, '"c"', "look-around"),
        ({"type": "string", "pattern": "(a)\\1"}, '"c"', "backreferences"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 1}]}, '"a"', "oneOf"),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, '{"ab": 1}', "not disjoint"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2}, "{}", "maxProperties"),
        ({"properties": {"in": {"not": {}}}, "required": ["in"], "type": "object"}, '{"in": 1}', "not"),
    ],
)
def test_what_cannot_be_enforced_is_left_out_of_a_lenient_schema_and_refused_in_a_strict_one(
    schema: dict[str, Any], text: str, word: str
) -> None:
    assert holds(schema, text, lenient=True)
    assert not holds({"type": "object", "properties": {"x": schema}, "required": ["x"]}, "{}", lenient=True)
    with pytest.raises(BadGrammar, match=word) as raised:
        GRAMMARS.follow(json_schema(schema))
    assert "does not compile" in str(raised.value) and "%json" not in str(raised.value)


def test_what_can_be_enforced_is_enforced_in_a_lenient_schema_too() -> None:
    for schema, good, bad in (
        ({"type": "string", "pattern": "^a+$"}, '"aa"', '"b"'),
        ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, '{"a": 1}', '{"a": "b"}'),
        ({"type": "object", "minProperties": 1}, '{"a": 1}', "{}"),
        ({"type": "string", "format": "date"}, '"2026-01-31"', '"2026-01-32"'),
        ({"type": "object", "properties": {"pattern": {"const": "(?=a)"}}}, '{"pattern": "(?=a)"}', '{"pattern": 1}'),
        (
            {"type": "object", "properties": {"patternProperties": {"type": "integer"}}},
            '{"patternProperties": 1}',
            '{"patternProperties": {}}',
        ),
    ):
        assert holds(schema, good, lenient=True) and not holds(schema, bad, lenient=True), schema


def test_a_schemas_own_guidance_holds() -> None:
    schema = {"type": "array", "x-guidance": {"whitespace_pattern": ""}}
    assert holds(schema, '["\\u0041"]') and not holds(schema, "[ 1]")
    with pytest.raises(BadGrammar):
        GRAMMARS.follow(json_schema({"x-guidance": 3}))


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "objekt"}, "type"),
        ({"type": 3}, "type"),
        ({"enum": 3}, "enum"),
        ({"x-lark": 3}, "x-lark"),
        ({"$ref": 3}, "$ref"),
        ({"required": "a"}, "required"),
        ({"required": [1]}, "required"),
        ({"properties": ["a"]}, "properties"),
        ({"properties": {"a": 3}}, "properties"),
        ({"$defs": []}, "$defs"),
        ({"anyOf": {}}, "anyOf"),
        ({"oneOf": []}, "oneOf"),
        ({"items": 3}, "items"),
        ({"items": [3]}, "items"),
        ({"not": "a"}, "not"),
        ({"pattern": 3}, "pattern"),
        ({"maxLength": -1}, "maxLength"),
        ({"maxItems": 1.5}, "maxItems"),
        ({"minimum": "1"}, "minimum"),
        ({"minimum": True}, "minimum"),
        ({"uniqueItems": 1}, "uniqueItems"),
    ],
)
def test_a_keyword_of_another_form_is_found_wherever_it_stands(schema: dict[str, Any], word: str) -> None:
    assert problem(schema).startswith(f"{word} must be")
    for outer in (
        {"items": schema},
        {"properties": {"a": schema}},
        {"anyOf": [True, schema]},
        {"$defs": {"a": schema}},
    ):
        assert problem({"type": "object", "properties": {"x": outer}}).startswith(f"{word} must be")


def test_what_is_no_keyword_is_not_looked_at() -> None:
    schema = {
        "type": ["object", "null"],
        "properties": {"enum": {"type": "string"}, "required": True},
        "default": {"enum": 3},
        "enum": [{"type": 3}],
        "exclusiveMinimum": True,
        "required": [],
        "nullable": 3,
    }
    assert problem(schema) == "" == problem({})
    deep: Any = {}
    for _ in range(5000):
        deep = {"items": deep}
    assert problem(deep) == ""
    assert json.loads(json_schema({"title": "x"}).partition("%json ")[2])["title"] == "x"
