"""Converts the text of a parameter to a value of a type that the tool's JSON schema allows."""

from __future__ import annotations

import json
from typing import Any

from paceline.engine.schemas import resolve

_WORDS = {"True": True, "False": False, "None": None}  # templates write earlier calls' values so
_KINDS: dict[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    list: "array",
    dict: "object",
}
_SAFE_BESIDE_STRING = ("null", "array", "object")


def typed(text: str, parameters: Any, key: str) -> Any:
    """The value of the parameter `key` of a tool with the schema `parameters`.

    Text that is JSON of a type that the schema allows becomes that value; other text stays text. If the schema also allows
    a string, numbers and booleans stay text: "1.10" may be a version.
    """
    kinds = kinds_of(_schema(parameters, key), parameters)
    if "string" in kinds:
        kinds &= {"string", *_SAFE_BESIDE_STRING}
    if not kinds - {"string"}:
        return text
    value = parsed(text)
    kind = _KINDS[type(value)]
    if kind == "number" and "number" not in kinds and value.is_integer():
        kind, value = "integer", int(value)
    fits = kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds))
    return value if fits else text


def parsed(text: str) -> Any:
    """The JSON value of a text; the text itself if it is not JSON."""
    try:
        word = text.strip()
        value: Any = _WORDS[word] if word in _WORDS else json.loads(word, strict=False, parse_constant=_refuse)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


def _schema(parameters: Any, key: str) -> Any:
    if not isinstance(parameters, dict):
        return None
    properties = parameters.get("properties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]
    return parameters.get("additionalProperties")


def kinds_of(schema: Any, root: Any) -> set[str]:
    """The JSON types that a schema and its alternatives name; empty if it names none. `root` resolves its references."""
    kinds: set[str] = set()
    seen: set[int] = set()
    left = [schema]
    while left:
        each = left.pop()
        if not isinstance(each, dict) or id(each) in seen:
            continue
        seen.add(id(each))
        kinds |= _named(each)
        for word in ("anyOf", "oneOf", "allOf"):
            left += _list(each.get(word))
        if isinstance(each.get("$ref"), str):
            left.append(resolve(each["$ref"], root))
    return kinds


def _named(schema: dict[str, Any]) -> set[str]:
    """The types that a schema itself names, or those of the values that it lists."""
    named = schema.get("type")
    if named is not None:
        return {each for each in (_list(named) or [named]) if isinstance(each, str)}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    return {_KINDS[type(each)] for each in values if type(each) in _KINDS}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not valid JSON")
