"""A parameter's value from the text a model wrote for it, typed by the tool's JSON schema."""

from __future__ import annotations

import json
from typing import Any

from paceline.engine.schemas import resolve

_WORDS = {"True": True, "False": False, "None": None}  # as templates write them into earlier calls
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
    """The value of parameter `key` of a tool whose schema `parameters` is; the text where that says nothing else.

    Text that is JSON of a type the schema allows is that value; text that is none stays text. Where a string is
    allowed too, numbers and booleans stay text: "1.10" may be a version.
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
    """The value that text is as JSON; the text where it is none."""
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
    """The JSON types a schema names, of all its alternatives; empty where it names none. References into `root` count."""
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
    """The types a schema itself names, or those of the values it lists."""
    named = schema.get("type")
    if named is not None:
        return {each for each in (_list(named) or [named]) if isinstance(each, str)}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    return {_KINDS[type(each)] for each in values if type(each) in _KINDS}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
