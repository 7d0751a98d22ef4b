"""What a client wants output held to, as a grammar: a response format, or calls of tools in the model's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance.gbnf_to_lark import gbnf_to_lark
from msgspec import Struct, field

from paceline.engine.grammar import json_schema, regex
from paceline.engine.schemas import problem
from paceline.errors import BadField
from paceline.serve.call_grammars import SPACE, TEXT, Rules, calls_grammar
from paceline.serve.tools import CallParser, Schemas
from paceline.serve.tools.thoughts import BEGIN, END

_LONGEST = 1 << 15  # characters of a client's own grammar
_MOST_CHOICES = 4096  # whose grammar takes the engine 50 ms to read
_GBNF_RULE = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.MULTILINE)
_CODE_POINT = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8}))")


class Schema(Struct):
    name: str = ""
    schema: dict[str, Any] = field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's response_format: `text`, `json_object`, or `json_schema` with its schema.

    `schema` beside `json_object` is llama.cpp's and Together's.
    """

    type: str
    json_schema: Schema | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct):
    """vLLM's structured_outputs: one of a JSON schema, any JSON object, a regular expression, texts to choose from, a grammar.

    The rest is refused.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: Any = None
    disable_additional_properties: Any = None


class Constraints(Struct, kw_only=True):
    """All that a body can say of the output's form: OpenAI's, vLLM's of today and of before, llama.cpp's, SGLang's.

    One is enforced, more are refused. So are the fields that constrain an output and cannot be enforced: nothing of the
    kind is left unread.
    """

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    guided_whitespace_pattern: Any = None
    structural_tag: Any = None
    grammar_lazy: Any = None
    grammar_triggers: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    custom_logit_processor: Any = None

    @property
    def formats(self) -> dict[str, ResponseFormat | None]:
        """The response format by the field's name. A body that has it in another place overrides this."""
        return {"response_format": self.response_format}

    @property
    def constraint(self) -> str | None:
        """The grammar that the output's text is held to, None for free text.

        Raises BadField for two wishes, for one that cannot be enforced, or is malformed.
        """
        _refuse(self, _REFUSED)
        found = {name: of_format(form, name) for name, form in self.formats.items()}
        found["structured_outputs"] = of_structure(self.structured_outputs)
        for name, make in _MAKERS.items():
            value = getattr(self, name)
            found[name] = make(value, name) if value not in (None, "") else None
        given = {name: grammar for name, grammar in found.items() if grammar is not None}
        if len(given) > 1:
            raise BadField(
                f"{' and '.join(given)} cannot be had together: a request takes one constraint", list(given)[1]
            )
        return next(iter(given.values()), None)


def _refuse(holder: Struct, names: Iterable[str], inside: str = "") -> None:
    for name in names:
        if getattr(holder, name) not in (None, False, "", [], {}):
            field = f"{inside}{name}"
            raise BadField(f"{field} is not supported: it constrains the output and is not enforced", field)


def of_format(form: ResponseFormat | None, field: str = "response_format") -> str | None:
    """The grammar of a response format, None for free text. Raises BadField, naming `field`, for a format there is not."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema(_checked(form.schema, field) if form.schema else {"type": "object"}, lenient=True)
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
    """The grammar of vLLM's structured_outputs. Raises BadField unless it holds exactly one wish, which can be enforced."""
    if asked is None:
        return None
    _refuse(asked, _STRUCTURE_REFUSED, "structured_outputs.")
    wishes: dict[str, Any] = {name: getattr(asked, name) for name in _STRUCTURES}
    given = [name for name, wish in wishes.items() if wish is not None and wish is not False]
    if len(given) != 1:
        raise BadField(f"structured_outputs needs exactly one of {', '.join(_STRUCTURES)}", "structured_outputs")
    return _STRUCTURES[given[0]](wishes[given[0]], f"structured_outputs.{given[0]}")


def _of_schema(given: dict[str, Any] | str, field: str) -> str:
    return json_schema(_checked(_read_schema(given, field), field))


def _of_lenient_schema(given: dict[str, Any] | str, field: str) -> str:
    return json_schema(_checked(_read_schema(given, field), field), lenient=True)


def _read_schema(given: dict[str, Any] | str, field: str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        value = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise BadField(f"{field} is no JSON: {error}", field) from error
    if not isinstance(value, dict):
        raise BadField(f"{field} must be a schema object", field)
    return value


def of_regex(pattern: str, field: str) -> str:
    return regex(_short(pattern, field))


def _of_choice(choice: list[str], field: str) -> str:
    if not choice or not all(choice):
        raise BadField(f"{field} needs texts to choose from", field)
    if len(choice) > _MOST_CHOICES:
        raise BadField(f"{field} can have at most {_MOST_CHOICES} texts", field)
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choice)


def of_grammar(text: str, field: str) -> str:
    """The Lark of a client's grammar: of Lark itself, or of GBNF (`root ::= …`). Raises BadField for GBNF that is none."""
    if not _GBNF_RULE.search(_short(text, field)):
        return text
    try:
        return gbnf_to_lark(_CODE_POINT.sub(_character, text)).removeprefix(
            "%llguidance {}"
        )  # not allowed inside another
    except Exception as error:  # it raises no class of its own for what does not resolve
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadField(f"{field} is no GBNF grammar: {reason[:500]}", field) from error


def _character(found: re.Match[str]) -> str:
    """An escape by code point as the translator can take it over."""
    code = int(found[2] or found[3], 16)
    if code < 0x80:
        return f"{found[1]}\\x{code:02x}"
    return found[1] + (chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else found[0])


def _of_any_object(given: bool, field: str) -> str | None:
    return json_schema({"type": "object"}) if given else None


def _short(text: str, field: str) -> str:
    if len(text) > _LONGEST:
        raise BadField(f"{field} is longer than {_LONGEST} characters", field)
    return text


_STRUCTURES: dict[str, Callable[[Any, str], str | None]] = {
    "json": _of_schema,
    "json_object": _of_any_object,
    "regex": of_regex,
    "choice": _of_choice,
    "grammar": of_grammar,
}
_STRUCTURE_REFUSED = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)
_MAKERS: dict[str, Callable[[Any, str], str | None]] = {
    "guided_json": _of_schema,
    "guided_regex": of_regex,
    "guided_choice": _of_choice,
    "guided_grammar": of_grammar,
    "guided_json_object": _of_any_object,
    "grammar": of_grammar,
    "json_schema": _of_lenient_schema,
    "regex": of_regex,
    "ebnf": of_grammar,
}
_REFUSED = (
    "guided_whitespace_pattern",
    "structural_tag",
    "grammar_lazy",
    "grammar_triggers",
    "allowed_token_ids",
    "bad_words",
    "logits_processors",
    "custom_logit_processor",
)


@dataclass(frozen=True)
class Calls:
    """What the model may call: schemas of parameters by name, at most `most` times where that is said. `forced`: it must.

    `strict` names tools whose schemas are enforced as they are, or refused; where there is one, all calls have their
    schemas also where none is forced.
    """

    schemas: Schemas
    forced: bool = False
    most: int | None = None
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
    choice: str | dict[str, Any] | None, most: int | None, schemas: Schemas, strict: Collection[str] = ()
) -> Calls:
    """What OpenAI's tool_choice, in either of its APIs' forms, makes of the tools; there may be at most `most` calls.

    A choice of allowed tools that forces nothing leaves all of them: the model reads what it may not call anyway. Raises
    BadField for a choice there is not, or of a tool there is not.
    """
    if choice in (None, "auto"):
        return Calls(schemas, most=most, strict=strict)
    if choice == "none":
        return Calls({})
    if choice == "required":
        return force(schemas, schemas, most, strict)
    if isinstance(choice, dict):
        kind, own = choice.get("type"), choice.get(str(choice.get("type")))
        inner = own if isinstance(own, dict) else choice
        if kind in ("function", "custom"):
            return force([inner.get("name")], schemas, 1, strict)
        if kind == "allowed_tools" and isinstance(inner.get("tools"), list):
            if inner.get("mode") != "required":
                return Calls(schemas, most=most, strict=strict)
            named = [each.get("function", each) for each in inner["tools"] if isinstance(each, dict)]
            return force([each.get("name") for each in named if isinstance(each, dict)], schemas, most, strict)
    raise BadField("tool_choice can be auto, none, required, or name a tool", "tool_choice")


def force(names: Iterable[Any], schemas: Schemas, most: int | None, strict: Collection[str] = ()) -> Calls:
    """Calls of the tools `names`. Raises BadField where there is none, or one is not among the tools."""
    chosen = list(names)
    for name in chosen:
        if not isinstance(name, str) or name not in schemas:
            raise BadField(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    if not chosen:
        raise BadField("tool_choice forces a call and there are no tools", "tool_choice")
    return Calls({name: schemas[name] for name in chosen}, forced=True, most=most, strict=strict)


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
        grammar = calls_grammar(kind, calls.schemas, special, several=calls.most != 1, strict=calls.strict)
        if not calls.forced:
            rules = Rules(special)
            written = rules.grammar(grammar)
            start = f"{TEXT} {written}?" if answer is None else f"{written} | {rules.grammar(answer)}"
            grammar = "\n".join([f"start: {start}", *rules.rules])
    if grammar is None or thinking is None:
        return grammar
    rules = Rules(special)
    rest = f"{rules.until(END)} {SPACE}"
    thought = rest if thinking else f"({rules.text(BEGIN)} {rest})? {SPACE if calls.forced else ''}"
    return "\n".join([f"start: {thought} {rules.grammar(grammar)}", *rules.rules])
