"""What a client wants output held to, as a grammar: a response format, or calls of tools in the model's own format."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import Struct, field

from paceline.engine.grammar import json_schema, regex
from paceline.engine.schemas import problem
from paceline.errors import BadField
from paceline.serve.call_grammars import TEXT, Rules, calls_grammar
from paceline.serve.tools import CallParser, Schemas
from paceline.serve.tools.thoughts import BEGIN, END

_LONGEST = 1 << 15  # characters of a client's own grammar
_SPACE = r"/[ \n]{0,8}/"


class Schema(Struct):
    name: str = ""
    schema: dict[str, Any] = field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's response_format: `text`, `json_object`, or `json_schema` with its schema."""

    type: str
    json_schema: Schema | None = None


class StructuredOutputs(Struct):
    """vLLM's structured_outputs: one of a JSON schema, a regular expression, texts to choose from, a Lark grammar."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def of_format(form: ResponseFormat | None, field: str = "response_format") -> str | None:
    """The grammar of a response format, None for free text. Raises BadField, naming `field`, for a format there is not."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema({"type": "object"})
    if form.type != "json_schema":
        raise BadField(f"{field} can be text, json_object or json_schema", f"{field}.type")
    if form.json_schema is None:
        raise BadField(f"{field} of type json_schema needs a schema", field)
    return json_schema(_checked(form.json_schema.schema, field), lenient=not form.json_schema.strict)


def _checked(schema: dict[str, Any], field: str) -> dict[str, Any]:
    reason = problem(schema)
    if reason:
        raise BadField(f"{field} has no JSON schema: {reason}", field)
    return schema


def of_structure(asked: StructuredOutputs | None) -> str | None:
    """The grammar of vLLM's structured_outputs. Raises BadField unless it holds exactly one wish."""
    if asked is None:
        return None
    wishes = [each for each in (asked.json, asked.regex, asked.choice, asked.grammar) if each is not None]
    if len(wishes) != 1:
        raise BadField("structured_outputs needs exactly one of json, regex, choice, grammar", "structured_outputs")
    if asked.json is not None:
        return json_schema(_checked(_schema(asked.json), "structured_outputs.json"))
    if asked.regex is not None:
        return regex(asked.regex)
    if asked.choice is not None:
        if not asked.choice or not all(asked.choice):
            raise BadField("structured_outputs.choice needs texts to choose from", "structured_outputs.choice")
        return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in asked.choice)
    if asked.grammar is not None and len(asked.grammar) > _LONGEST:
        raise BadField(f"structured_outputs.grammar is longer than {_LONGEST} characters", "structured_outputs.grammar")
    return asked.grammar


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        value = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise BadField(f"structured_outputs.json is no JSON: {error}", "structured_outputs.json") from error
    if not isinstance(value, dict):
        raise BadField("structured_outputs.json must be a schema object", "structured_outputs.json")
    return value


@dataclass(frozen=True)
class Calls:
    """What the model may call: schemas of parameters by name. `forced`: it must, `several` times if it wants to.

    `strict` names tools whose schemas are enforced as they are, or refused; where there is one, all calls have their
    schemas also where none is forced.
    """

    schemas: Schemas
    forced: bool = False
    several: bool = True
    strict: Collection[str] = ()


def check_schemas(schemas: Schemas) -> None:
    """Raises BadField for parameters that are no JSON schema of an object: every keyword must have its form."""
    for name, schema in schemas.items():
        reason = problem(schema or {})
        if not reason and "object" not in (schema or {}).get("type", "object"):
            reason = "type must be object"
        if reason:
            raise BadField(f"the parameters of the tool {name!r} are no JSON schema of an object: {reason}", "tools")


def openai_calls(
    choice: str | dict[str, Any] | None, parallel: bool | None, schemas: Schemas, strict: Collection[str] = ()
) -> Calls:
    """What OpenAI's tool_choice, in either of its APIs' forms, makes of the tools.

    A choice of allowed tools that forces nothing leaves all of them: the model reads what it may not call anyway. Raises
    BadField for a choice there is not, or of a tool there is not.
    """
    several = parallel is not False
    if choice in (None, "auto"):
        return Calls(schemas, several=several, strict=strict)
    if choice == "none":
        return Calls({})
    if choice == "required":
        return force(schemas, schemas, several, strict)
    if isinstance(choice, dict):
        kind, own = choice.get("type"), choice.get(str(choice.get("type")))
        inner = own if isinstance(own, dict) else choice
        if kind in ("function", "custom"):
            return force([inner.get("name")], schemas, several=False, strict=strict)
        if kind == "allowed_tools" and isinstance(inner.get("tools"), list):
            if inner.get("mode") != "required":
                return Calls(schemas, several=several, strict=strict)
            named = [each.get("function", each) for each in inner["tools"] if isinstance(each, dict)]
            return force([each.get("name") for each in named if isinstance(each, dict)], schemas, several, strict)
    raise BadField("tool_choice can be auto, none, required, or name a tool", "tool_choice")


def force(names: Iterable[Any], schemas: Schemas, several: bool, strict: Collection[str] = ()) -> Calls:
    """Calls of the tools `names`. Raises BadField where there is none, or one is not among the tools."""
    chosen = list(names)
    for name in chosen:
        if name not in schemas:
            raise BadField(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    if not chosen:
        raise BadField("tool_choice forces a call and there are no tools", "tool_choice")
    return Calls({name: schemas[name] for name in chosen}, forced=True, several=several, strict=strict)


def held(
    answer: str | None, calls: Calls, kind: type[CallParser] | None, special: Mapping[str, int], thinking: bool | None
) -> str | None:
    """The grammar of an output, None for a free one.

    `answer` is that of its text; where tools may be called, so they may instead. Strict calls may follow free text, in a
    model whose calls begin with a token of their own. `thinking` is None for a model that knows no reasoning, else
    whether the prompt has opened it: reasoning is free.
    """
    grammar = answer
    strict = bool(calls.strict) and answer is None and kind is not None and kind.begin in special
    if kind is not None and calls.schemas and (calls.forced or strict or answer is not None):
        grammar = calls_grammar(kind, calls.schemas, special, several=calls.several, strict=calls.strict)
        if not calls.forced:
            rules = Rules(special)
            written = rules.grammar(grammar)
            start = f"{TEXT} {written}?" if answer is None else f"{written} | {rules.grammar(answer)}"
            grammar = "\n".join([f"start: {start}", *rules.rules])
    if grammar is None or thinking is None:
        return grammar
    rules = Rules(special)
    rest = f"{rules.until(END)} {_SPACE}"
    thought = rest if thinking else f"({rules.text(BEGIN)} {rest})?"
    return "\n".join([f"start: {thought} {rules.grammar(grammar)}", *rules.rules])
