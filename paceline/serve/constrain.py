"""Constrained decoding: the grammar of an output, from a response format or from tool calls in the model's own format."""

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
from paceline.serve.tools.reasoning import BEGIN, END

_MAX_GRAMMAR_LENGTH = 1 << 15  # characters of a client's grammar or regular expression
_MAX_CHOICES = 4096  # a choice grammar of this size takes the engine about 50 ms to compile
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

    The other fields are refused.
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
    """All fields that constrain the output: OpenAI's, vLLM's current and older ones, llama.cpp's, SGLang's.

    A request may have one constraint; several are refused. Fields that constrain the output and cannot be enforced are
    refused as well, so that none is silently ignored.
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
        """The response formats by field name. A body that has the format in another field overrides this."""
        return {"response_format": self.response_format}

    @property
    def constraint(self) -> str | None:
        """The grammar that constrains the output's text, None for free text.

        Raises BadField for two constraints, and for one that cannot be enforced or is malformed.
        """
        _refuse(self, _REFUSED)
        found = {name: response_format_grammar(form, name) for name, form in self.formats.items()}
        found["structured_outputs"] = structured_outputs_grammar(self.structured_outputs)
        for name, make in _MAKERS.items():
            value = getattr(self, name)
            found[name] = make(value, name) if value not in (None, "") else None
        given = {name: grammar for name, grammar in found.items() if grammar is not None}
        if len(given) > 1:
            raise BadField(
                f"{' and '.join(given)} are not supported together: a request may have one constraint", list(given)[1]
            )
        return next(iter(given.values()), None)


def _refuse(holder: Struct, names: Iterable[str], inside: str = "") -> None:
    for name in names:
        if getattr(holder, name) not in (None, False, "", [], {}):
            field = f"{inside}{name}"
            raise BadField(f"{field} is not supported: it constrains the output and is not enforced", field)


def response_format_grammar(form: ResponseFormat | None, field: str = "response_format") -> str | None:
    """The grammar of a response format, None for free text. Raises BadField, naming `field`, for an unknown format."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_schema(_checked(form.schema, field) if form.schema else {"type": "object"}, lenient=True)
    if form.type != "json_schema":
        raise BadField(f"{field} must be text, json_object or json_schema", f"{field}.type")
    if form.json_schema is None:
        raise BadField(f"{field} of type json_schema needs a schema", field)
    return json_schema(_checked(form.json_schema.schema, field), lenient=not form.json_schema.strict)


def _checked(schema: dict[str, Any], field: str) -> dict[str, Any]:
    reason = problem(schema)
    if reason:
        raise BadField(f"{field} has an invalid JSON schema: {reason}", field)
    return schema


def structured_outputs_grammar(requested: StructuredOutputs | None) -> str | None:
    """The grammar of vLLM's structured_outputs. Raises BadField unless it has exactly one constraint, which is enforceable."""
    if requested is None:
        return None
    _refuse(requested, _STRUCTURE_REFUSED, "structured_outputs.")
    values: dict[str, Any] = {name: getattr(requested, name) for name in _STRUCTURES}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if len(given) != 1:
        raise BadField(f"structured_outputs needs exactly one of {', '.join(_STRUCTURES)}", "structured_outputs")
    return _STRUCTURES[given[0]](values[given[0]], f"structured_outputs.{given[0]}")


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
        raise BadField(f"{field} is not valid JSON: {error}", field) from error
    if not isinstance(value, dict):
        raise BadField(f"{field} must be a schema object", field)
    return value


def regex_grammar(pattern: str, field: str) -> str:
    return regex(_checked_length(pattern, field))


def _of_choice(choice: list[str], field: str) -> str:
    if not choice or not all(choice):
        raise BadField(f"{field} needs texts to choose from", field)
    if len(choice) > _MAX_CHOICES:
        raise BadField(f"{field} can have at most {_MAX_CHOICES} texts", field)
    return "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in choice)


def client_grammar(text: str, field: str) -> str:
    """A client's grammar as Lark: Lark itself is returned as is, GBNF (`root ::= …`) is translated.

    Raises BadField for malformed GBNF.
    """
    if not _GBNF_RULE.search(_checked_length(text, field)):
        return text
    try:
        lark = gbnf_to_lark(_CODE_POINT.sub(_character, text))
        return lark.removeprefix("%llguidance {}")  # which is not allowed in a nested grammar
    except Exception as error:  # llguidance has no exception class of its own for this
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadField(f"{field} is not a valid GBNF grammar: {reason[:500]}", field) from error


def _character(found: re.Match[str]) -> str:
    """Rewrites a code point escape (`\\u…`, `\\U…`) as one that llguidance's translator supports."""
    code = int(found[2] or found[3], 16)
    if code < 0x80:
        return f"{found[1]}\\x{code:02x}"
    return found[1] + (chr(code) if code < 0x110000 and not 0xD800 <= code < 0xE000 else found[0])


def _of_any_object(given: bool, field: str) -> str | None:
    return json_schema({"type": "object"}) if given else None


def _checked_length(text: str, field: str) -> str:
    if len(text) > _MAX_GRAMMAR_LENGTH:
        raise BadField(f"{field} is longer than {_MAX_GRAMMAR_LENGTH} characters", field)
    return text


_STRUCTURES: dict[str, Callable[[Any, str], str | None]] = {
    "json": _of_schema,
    "json_object": _of_any_object,
    "regex": regex_grammar,
    "choice": _of_choice,
    "grammar": client_grammar,
}
_STRUCTURE_REFUSED = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)
_MAKERS: dict[str, Callable[[Any, str], str | None]] = {
    "guided_json": _of_schema,
    "guided_regex": regex_grammar,
    "guided_choice": _of_choice,
    "guided_grammar": client_grammar,
    "guided_json_object": _of_any_object,
    "grammar": client_grammar,
    "json_schema": _of_lenient_schema,
    "regex": regex_grammar,
    "ebnf": client_grammar,
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
class AllowedCalls:
    """The tool calls that an output may have.

    `schemas` are the parameters' JSON schemas by tool name, `max_calls` is the limit of calls (None: no limit). With
    `forced` the output must be a call. `strict` names tools whose schemas are enforced exactly or refused; if it is not
    empty, the schemas of all tools are enforced even if no call is forced.
    """

    schemas: Schemas
    forced: bool = False
    max_calls: int | None = None
    strict: Collection[str] = ()


def check_schemas(schemas: Schemas) -> None:
    """Raises BadField for parameters that are not a JSON schema of an object, or have a keyword of the wrong type."""
    for name, schema in schemas.items():
        reason = problem(schema or {})
        if not reason and "object" not in (schema or {}).get("type", "object"):
            reason = "type must be object"
        if reason:
            raise BadField(f"the parameters of the tool {name!r} are not a JSON schema of an object: {reason}", "tools")


def openai_calls(
    choice: str | dict[str, Any] | None, max_calls: int | None, schemas: Schemas, strict: Collection[str] = ()
) -> AllowedCalls:
    """The allowed calls under OpenAI's tool_choice, in the format of either of its APIs, and a limit of `max_calls`.

    `allowed_tools` without mode `required` allows all tools, as the prompt lists all of them anyway. Raises BadField for
    an unknown choice, and for one of a tool that is not defined.
    """
    if choice in (None, "auto"):
        return AllowedCalls(schemas, max_calls=max_calls, strict=strict)
    if choice == "none":
        return AllowedCalls({})
    if choice == "required":
        return forced_calls(schemas, schemas, max_calls, strict)
    if isinstance(choice, dict):
        kind, own = choice.get("type"), choice.get(str(choice.get("type")))
        inner = own if isinstance(own, dict) else choice
        if kind in ("function", "custom"):
            return forced_calls([inner.get("name")], schemas, 1, strict)
        if kind == "allowed_tools" and isinstance(inner.get("tools"), list):
            if inner.get("mode") != "required":
                return AllowedCalls(schemas, max_calls=max_calls, strict=strict)
            named = [each.get("function", each) for each in inner["tools"] if isinstance(each, dict)]
            return forced_calls(
                [each.get("name") for each in named if isinstance(each, dict)], schemas, max_calls, strict
            )
    raise BadField("tool_choice must be auto, none, required, or name a tool", "tool_choice")


def forced_calls(
    names: Iterable[Any], schemas: Schemas, max_calls: int | None, strict: Collection[str] = ()
) -> AllowedCalls:
    """A forced call of one of the tools `names`. Raises BadField if `names` is empty or has an unknown tool."""
    chosen = list(names)
    for name in chosen:
        if not isinstance(name, str) or name not in schemas:
            raise BadField(f"tool_choice names {name!r}, which is none of the tools", "tool_choice")
    if not chosen:
        raise BadField("tool_choice forces a call, but there are no tools", "tool_choice")
    return AllowedCalls({name: schemas[name] for name in chosen}, forced=True, max_calls=max_calls, strict=strict)


def output_grammar(
    answer: str | None,
    calls: AllowedCalls,
    kind: type[CallParser] | None,
    special: Mapping[str, int],
    thinking: bool | None,
) -> str | None:
    """The grammar of an output, None for unconstrained output.

    `answer` is the grammar of the output's text; if calls are allowed, the output may be calls instead. Strict calls may
    follow free text, if the model's calls begin with a special token (one of `special`). `thinking` is None for a model
    without reasoning, else whether the prompt has opened the reasoning, which is never constrained.
    """
    grammar = answer
    strict = bool(calls.strict) and answer is None and kind is not None and kind.begin in special
    if kind is not None and calls.schemas and (calls.forced or strict or answer is not None):
        grammar = calls_grammar(kind, calls.schemas, special, several=calls.max_calls != 1, strict=calls.strict)
        if not calls.forced:
            rules = Rules(special)
            written = rules.grammar(grammar)
            start = f"{TEXT} {written}?" if answer is None else f"{written} | {rules.grammar(answer)}"
            grammar = "\n".join([f"start: {start}", *rules.rules])
    if grammar is None or thinking is None:
        return grammar
    rules = Rules(special)
    rest = f"{rules.until(END)} {SPACE}"
    reasoning = rest if thinking else f"({rules.text(BEGIN)} {rest})? {SPACE if calls.forced else ''}"
    return "\n".join([f"start: {reasoning} {rules.grammar(grammar)}", *rules.rules])
