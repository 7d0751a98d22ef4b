"""What of a JSON schema is enforced, what is left out where it is lenient, and how strings may be written."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from paceline.engine.grammar import Grammars, json_schema
from paceline.engine.schemas import closed, problem
from paceline.errors import BadGrammar
from tests.serve.service import byte_tokenizer

TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)


def holds(schema: dict[str, Any], text: str, lenient: bool = False) -> bool:
    """Whether the schema's grammar lets the text pass, and end there."""
    tokens = [*TOKENIZER.encode(text), TOKENIZER.eos_tokens[0]]
    bits = GRAMMARS.matcher(json_schema(schema, lenient)).masks([0, *tokens], [0, *range(len(tokens))])
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
        GRAMMARS.matcher(json_schema(schema))
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
        GRAMMARS.matcher(json_schema({"x-guidance": 3}))


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


@pytest.mark.parametrize("lenient", [False, True])
def test_white_space_is_bounded(lenient: bool) -> None:
    """Between all parts, at any depth; around the whole there is none."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    for form in ({}, {"type": "object"}, schema):
        text = '{@"a"@:@[@1@,@2@]@}'
        assert holds(form, text.replace("@", ""), lenient) and holds(form, text.replace("@", "\n\t  "), lenient)
        for place in range(text.count("@")):
            before, after = (each.replace("@", "") for each in _split(text, place))
            assert holds(form, f"{before}{' ' * 64}{after}", lenient), place
            assert not holds(form, f"{before}{' ' * 65}{after}", lenient), place
            assert not holds(form, f"{before}{chr(10) * 65}{after}", lenient), place
        assert not holds(form, '{"a": [1]} ', lenient) and not holds(form, ' {"a": [1]}', lenient)


def _split(text: str, place: int) -> tuple[str, str]:
    parts = text.split("@")
    return "@".join(parts[: place + 1]), "@".join(parts[place + 1 :])


NAMED: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
OTHER: dict[str, Any] = {"type": "object", "properties": {"b": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "good", "invented"),
    [
        (NAMED, '{"a": 1}', '{"a": 1, "c": 2}'),
        ({**NAMED, "unevaluatedProperties": False}, '{"a": 1}', '{"c": 2}'),
        ({"properties": {"in": NAMED}}, '{"in": {"a": 1}}', '{"in": {"a": 1, "c": 2}}'),
        ({"properties": {"in": {"type": "array", "items": NAMED}}}, '{"in": [{}]}', '{"in": [{"c": 2}]}'),
        (
            {"properties": {"in": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}, "$defs": {"N": NAMED}},
            '{"in": {"a": 1}}',
            '{"in": {"c": 2}}',
        ),
        ({"properties": {"in": {"allOf": [NAMED], "title": "In"}}}, '{"in": {"a": 1}}', '{"in": {"c": 2}}'),
        ({"properties": {"in": {"additionalProperties": NAMED}}}, '{"in": {"x": {"a": 1}}}', '{"in": {"x": {"c": 2}}}'),
        ({"anyOf": [NAMED, OTHER]}, '{"b": 1}', '{"a": 1, "b": 1}'),
        ({**NAMED, "anyOf": [{"required": ["a"]}, {"minProperties": 1}]}, '{"a": 1}', '{"a": 1, "c": 2}'),
        ({**NAMED, "minProperties": 5}, '{"a": 1}', '{"c": 2}'),
    ],
)
def test_where_a_tool_says_nothing_of_other_keys_there_are_none(
    schema: dict[str, Any], good: str, invented: str
) -> None:
    given = json.dumps(schema)
    assert holds(closed(schema), good, lenient=True)
    assert not holds(closed(schema), invented, lenient=True)
    assert holds(schema, good, lenient=True) and holds(schema, invented, lenient=True)
    assert json.dumps(schema) == given


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, '{"c": 2}'),
        ({"type": "object"}, '{"c": 2}'),
        ({"type": "object", "properties": {}}, '{"c": 2}'),
        ({"properties": {"in": {"type": "object"}}}, '{"in": {"c": 2}}'),
        ({**NAMED, "additionalProperties": True}, '{"a": 1, "c": "x"}'),
        ({**NAMED, "additionalProperties": {}}, '{"a": 1, "c": "x"}'),
        ({**NAMED, "additionalProperties": {"type": "string"}}, '{"a": 1, "c": "x"}'),
        ({**NAMED, "patternProperties": {"^c": {"type": "string"}}}, '{"a": 1, "c": "x"}'),
        ({**NAMED, "unevaluatedProperties": True}, '{"a": 1, "c": "x"}'),
        ({**NAMED, "required": ["c"]}, '{"a": 1, "c": "x"}'),
        ({"allOf": [NAMED, OTHER]}, '{"a": 1, "b": 2}'),
        ({**NAMED, "allOf": [OTHER]}, '{"a": 1, "b": 2}'),
        ({**NAMED, "anyOf": [OTHER, {"required": ["a"]}]}, '{"a": 1, "b": 2}'),
        ({**NAMED, "$ref": "#/$defs/O", "$defs": {"O": OTHER}}, '{"a": 1, "b": 2}'),
        (
            {"properties": {"x": {"$ref": "#/$defs/O"}, "y": {**NAMED, "$ref": "#/$defs/O"}}, "$defs": {"O": OTHER}},
            '{"y": {"a": 1, "b": 2}}',
        ),
        ({**NAMED, "if": {"required": ["a"]}, "then": OTHER}, '{"a": 1, "b": 2}'),
        ({**NAMED, "dependentSchemas": {"a": OTHER}}, '{"a": 1, "b": 2}'),
    ],
)
def test_an_object_stays_open_where_its_schema_says_or_needs_it(schema: dict[str, Any], text: str) -> None:
    assert holds(closed(schema), text, lenient=True)


def test_closing_takes_time_in_proportion_and_ends_on_cycles() -> None:
    cycle = {"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, {"properties": {"a": {}}}]}}}
    assert closed(cycle)["$ref"] == "#/$defs/A"
    count = 20_000
    links = {str(index): {**NAMED, "anyOf": [{"$ref": f"#/$defs/{index + 1}"}]} for index in range(count)}
    begin = time.process_time()
    closed({"$ref": "#/$defs/0", "$defs": links})
    assert time.process_time() - begin < 5  # minutes were each followed to its end


def test_a_schema_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(2000):
        schema = {"properties": {"a": schema}}
    for make in (closed, json_schema):
        with pytest.raises(BadGrammar, match="nested too deeply"):
            make(schema)
