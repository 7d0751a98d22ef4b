"""JSON schemas as clients send them: whether their keywords have their form, and how they are put to llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import llguidance

LARK = "x-lark"  # in the schema of a string: the grammar it follows, enforced by formats that write strings as they are
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_UNICODE = "json_allow_general_unicode_escapes"


def _is_schema(value: Any) -> bool:
    return isinstance(value, (dict, bool))


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _are_named(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_type(value: Any) -> bool:
    return all(isinstance(each, str) and each in _TYPES for each in (value if isinstance(value, list) else [value]))


Form = tuple[str, Callable[[Any], bool]]
_SCHEMA: Form = ("a schema", _is_schema)
_SCHEMAS: Form = ("a list of schemas", _are_schemas)
_NAMED: Form = ("schemas by name", _are_named)
_TEXT: Form = ("a string", lambda value: isinstance(value, str))
_COUNT: Form = (
    "a whole number of 0 or more",
    lambda value: _is_number(value) and value >= 0 and float(value).is_integer(),
)
_NUMBER: Form = ("a number", _is_number)
_LIMIT: Form = ("a number", lambda value: isinstance(value, (int, float)))  # an old draft has true and false here
_FORMS: dict[str, Form] = {
    "type": (f"one of {', '.join(_TYPES)}, or a list of them", _is_type),
    "enum": ("a list", lambda value: isinstance(value, list)),
    "required": ("a list of names", _are_texts),
    "uniqueItems": ("true or false", lambda value: isinstance(value, bool)),
    "items": ("a schema", lambda value: _is_schema(value) or (isinstance(value, list) and all(map(_is_schema, value)))),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), _NAMED),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), _SCHEMAS),
    **dict.fromkeys(("additionalProperties", "additionalItems", "propertyNames", "contains"), _SCHEMA),
    **dict.fromkeys(("not", "if", "then", "else", "unevaluatedItems", "unevaluatedProperties"), _SCHEMA),
    **dict.fromkeys(("$ref", "pattern", "format", LARK), _TEXT),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), _NUMBER),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _LIMIT),
}


def problem(schema: Mapping[str, Any]) -> str:
    """What is wrong with the form of a keyword, wherever in the schema it stands; "" where nothing is."""
    left: list[Any] = [schema]
    while left:
        each = left.pop()
        if not isinstance(each, Mapping):
            continue
        for word, (form, holds) in _FORMS.items():
            if word in each and not holds(each[word]):
                return f"{word} must be {form}"
            if word in each:
                left += _inner(word, each[word])
    return ""


def _inner(word: str, value: Any) -> Iterator[Any]:
    """The schemas within a keyword's value, which has its form."""
    form = _FORMS[word]
    if form is _NAMED:
        yield from value.values()
    elif form is _SCHEMA or form is _SCHEMAS or word == "items":
        yield from value if isinstance(value, list) else [value]


def bounded(schema: Mapping[str, Any], lenient: bool = False) -> dict[str, Any]:
    r"""The schema as it is put to llguidance.

    White space between the parts is free, but bounded: a model that is held where it does not want to be likes to write
    spaces for ever. Strings may be written with `\u` escapes. What the schema says of this itself, in `x-guidance`, holds.
    A lenient one is not refused for what cannot be enforced (docs/server.md); that is left out.
    """
    own = schema.get("x-guidance", {})
    options = {"whitespace_pattern": r"[ \t\r\n]{0,64}", _UNICODE: True, "lenient": lenient}
    guidance = {**options, **own} if isinstance(own, Mapping) else own
    return {**_changed(schema, lenient), "x-guidance": guidance}


def _changed(schema: Any, lenient: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    changed: dict[str, Any] = {}
    for word, value in schema.items():
        form = _FORMS.get(word)
        if form is _NAMED and isinstance(value, Mapping):
            value = {name: _changed(each, lenient) for name, each in value.items()}
        elif isinstance(value, list) and (form is _SCHEMAS or word == "items"):
            value = [_changed(each, lenient) for each in value]
        elif form is _SCHEMA or word == "items":
            value = _changed(value, lenient)
        changed[word] = value
    if lenient and "pattern" in changed and not _compiles({"pattern": changed["pattern"]}):
        del changed["pattern"]
    if lenient and not _compiles(_names_alone(changed)):
        changed = {word: value for word, value in changed.items() if word not in _NAME_LIMITS}
        changed["additionalProperties"] = True
    if (
        "properties" in changed
        and "patternProperties" not in changed
        and changed.get("additionalProperties", True) is True
    ):
        # the same, but a name held to an expression is written without escapes: none of the properties can come again so
        changed |= {"patternProperties": {"": True}, "additionalProperties": False}
    return changed


_NAME_LIMITS = ("patternProperties", "minProperties", "maxProperties")


def _names_alone(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a schema says of an object's names that llguidance may refuse; empty where it says nothing of the kind."""
    if not any(word in schema for word in _NAME_LIMITS):
        return {}
    names = {word: schema[word] for word in (*_NAME_LIMITS, "required") if word in schema}
    for word in ("properties", "patternProperties"):
        if isinstance(schema.get(word), Mapping):
            names[word] = dict.fromkeys(schema[word], True)
    return {"type": "object", **names}


def _compiles(schema: Mapping[str, Any]) -> bool:
    return not schema or _is_grammar(f"start: %json {json.dumps(schema)}")


@functools.lru_cache(maxsize=1024)  # agents send the same tools with every turn
def _is_grammar(text: str) -> bool:
    return not llguidance.LLMatcher.validate_grammar(text)
