"""JSON schemas as clients send them: checks of their keywords, and their translation for llguidance."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import llguidance

from paceline.errors import BadGrammar

LARK = "x-lark"  # keyword in a string's schema: its grammar, enforced by tool formats that write strings unescaped
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_UNICODE = "json_allow_general_unicode_escapes"
_TOO_DEEP = "the JSON schema is nested too deeply"


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
    lambda value: _is_number(value) and value >= 0 and (isinstance(value, int) or value.is_integer()),
)
_NUMBER: Form = ("a number", _is_number)
_LIMIT: Form = (
    "a number",
    lambda value: isinstance(value, (int, float)),
)  # an old draft of the specification allows true and false here
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
    """The first keyword whose value has a wrong form, anywhere in the schema, as a message; "" if there is none."""
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
    """The schemas within a keyword's value, which has the keyword's form."""
    form = _FORMS[word]
    if form is _NAMED:
        yield from value.values()
    elif form is _SCHEMA or form is _SCHEMAS or word == "items":
        yield from value if isinstance(value, list) else [value]


def lark(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """The `bounded` schema as a Lark expression. Raises BadGrammar for one that is nested too deeply."""
    try:
        return f"%json {json.dumps(bounded(schema, lenient))}"
    except RecursionError as error:
        raise BadGrammar(_TOO_DEEP) from error


def bounded(schema: Mapping[str, Any], lenient: bool = False) -> dict[str, Any]:
    r"""The schema as it is given to llguidance.

    White space between the parts is free, but bounded: a model that is held where it does not want to be likes to write
    spaces for ever. Strings may be written with `\u` escapes. What the schema says of this itself, in `x-guidance`, holds.
    A lenient one is not refused for what cannot be enforced (docs/server.md); that is left out.
    """
    own = schema.get("x-guidance", {})
    options = {"whitespace_pattern": r"[ \t\r\n]{0,64}", _UNICODE: True, "lenient": lenient}
    guidance = {**options, **own} if isinstance(own, Mapping) else own
    return {**_changed(schema, lenient), "x-guidance": guidance}


def _within(schema: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The schema with `change` applied to the schemas within it."""
    changed: dict[str, Any] = {}
    for word, value in schema.items():
        form = _FORMS.get(word)
        if form is _NAMED and isinstance(value, Mapping):
            value = {name: change(each) for name, each in value.items()}
        elif isinstance(value, list) and (form is _SCHEMAS or word == "items"):
            value = [change(each) for each in value]
        elif form is _SCHEMA or word == "items":
            value = change(value)
        changed[word] = value
    return changed


def _changed(schema: Any, lenient: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    changed = _within(schema, functools.partial(_changed, lenient=lenient))
    if lenient and "pattern" in changed and not _compiles({"pattern": changed["pattern"]}):
        del changed["pattern"]
    if lenient and not _compiles(_names_alone(changed)):
        if "patternProperties" in changed:  # the names that they allow must not be refused
            changed["additionalProperties"] = True
        changed = {word: value for word, value in changed.items() if word not in _NAME_LIMITS}
    if (
        "properties" in changed
        and "patternProperties" not in changed
        and changed.get("additionalProperties", True) is True
    ):
        # a name constrained by an expression is written without escapes, so no declared property can be written twice
        changed |= {"patternProperties": {"": True}, "additionalProperties": False}
    return changed


_NAME_LIMITS = ("patternProperties", "minProperties", "maxProperties")


def _names_alone(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The constraints on an object's property names that llguidance may refuse; empty if there are none."""
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


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with `additionalProperties` false where an object declares properties and does not mention others.

    Left open is what is one of several schemas of the same object (`allOf`, or `anyOf`, `$ref` and the like beside
    properties), for each would forbid what the others declare; so is what requires a name that it does not declare.
    Raises BadGrammar for one that is nested too deeply.
    """
    may_close: dict[int, bool] = {}
    budget = iter(range(_MAX_MEMBERS))
    seen: set[tuple[int, bool]] = set()
    left: list[tuple[Any, bool]] = [(schema, False)]  # with true for one of several
    while left:
        each, shared = left.pop()
        if not isinstance(each, Mapping) or (id(each), shared) in seen:
            continue
        seen.add((id(each), shared))
        may_close[id(each)] = may_close.get(id(each), True) and not shared and _is_whole(each, schema, budget)
        groups = list(_groups(each, schema))
        shared = shared or len(groups) > 1 or bool(_names(each))
        left += [(member, shared) for group in groups for member in group]
        left += [(each[word], True) for word in ("not", "if") if word in each]
        for word in each:
            if word in _FORMS and word not in _IN_PLACE:
                left += [(inner, False) for inner in _inner(word, each[word])]
    try:
        changed: dict[str, Any] = _close(schema, may_close)
    except RecursionError as error:
        raise BadGrammar(_TOO_DEEP) from error
    return changed


def _close(schema: Any, may_close: Mapping[int, bool]) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    changed = _within(schema, functools.partial(_close, may_close=may_close))
    return {**changed, "additionalProperties": False} if may_close.get(id(schema)) else changed


_IN_PLACE = ("allOf", "anyOf", "oneOf", "then", "else", "dependentSchemas", "not", "if")
_MAX_MEMBERS = (
    10_000  # members visited in all; beyond, objects of several schemas stay open. Bounds the time for any request body
)


def _groups(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The other schemas of the same object, grouped; of each group one applies at a time."""
    yield from ([each] for each in schema.get("allOf", ()))
    yield from (schema[word] for word in ("anyOf", "oneOf") if word in schema)
    yield from ([schema[word]] for word in ("then", "else") if word in schema)
    yield from ([each] for each in schema.get("dependentSchemas", {}).values())
    if "$ref" in schema:
        yield [resolve(schema["$ref"], root)]


def _names(schema: Mapping[str, Any]) -> set[str | None]:
    """The property names that a schema itself mentions; None among them if it covers all names."""
    names: set[str | None] = {*schema.get("properties", ()), *schema.get("required", ())}
    if any(word in schema for word in ("patternProperties", "additionalProperties")):
        names.add(None)
    return names


def _is_whole(schema: Mapping[str, Any], root: Mapping[str, Any], budget: Iterator[int]) -> bool:
    """Whether an object's schema declares every name that it, or others of the same object, mention. `budget` is spent on
    the others.
    """
    declared = schema.get("properties", {}).keys()
    if not declared or schema.get("unevaluatedProperties", False) is not False:
        return False
    seen: set[int] = set()
    left: list[Any] = [schema]
    while left:
        each = left.pop()
        if not isinstance(each, Mapping) or id(each) in seen:
            continue
        seen.add(id(each))
        if not _names(each) <= declared or (each is not schema and next(budget, None) is None):
            return False
        left += [member for group in _groups(each, root) for member in group]
    return True


def resolve(reference: str, root: Any) -> Any:
    """The target of a reference into the schema itself, such as `#/$defs/Edit`; None if it does not exist."""
    head, *names = reference.split("/")
    if head != "#":
        return None
    for name in names:
        root = root.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(root, dict) else None
    return root
