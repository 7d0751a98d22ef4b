"""Custom tools of OpenAI's APIs, which take text. For the model, one is a function with a single string parameter."""

from __future__ import annotations

import json
from typing import Any

from msgspec import Struct

from paceline.engine.schemas import LARK
from paceline.errors import BadField
from paceline.serve.constrain import client_grammar, regex_grammar

# a custom tool's parameters as the model sees them
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class Grammar(Struct):
    syntax: str = ""
    definition: str = ""


class InputFormat(Struct):
    """The format of a custom tool's input: `text` or `grammar`.

    The grammar's fields are beside `type` (Responses API) or within `grammar` (chat API).
    """

    type: str = "text"
    syntax: str = ""
    definition: str = ""
    grammar: Grammar | None = None

    @property
    def grammar_spec(self) -> Grammar:
        """The grammar of the input; its `definition` is empty for free text."""
        return self.grammar or Grammar(self.syntax, self.definition)


def description(text: str | None, form: InputFormat | None) -> str:
    """A custom tool's description for the model, with the grammar of its input."""
    grammar_spec = form.grammar_spec if form is not None else Grammar()
    if not grammar_spec.definition:
        return text or ""
    return f"{text or ''}\n\n`input` follows this {grammar_spec.syntax} grammar:\n{grammar_spec.definition}".strip()


def parameters(form: InputFormat | None, field: str = "tools") -> dict[str, Any]:
    """The schema that constrains calls. A tool with a grammar (`has_grammar`) must be in `AllowedCalls.strict`.

    Raises BadField for an unknown format.
    """
    if not has_grammar(form):
        return PARAMETERS
    assert form is not None
    grammar_spec = form.grammar_spec
    if grammar_spec.syntax not in ("lark", "regex"):
        raise BadField(
            f"a custom tool's grammar must have the syntax lark or regex, not {grammar_spec.syntax!r}", field
        )
    make = regex_grammar if grammar_spec.syntax == "regex" else client_grammar
    return {**PARAMETERS, "properties": {"input": {"type": "string", LARK: make(grammar_spec.definition, field)}}}


def has_grammar(form: InputFormat | None) -> bool:
    """Whether a format constrains the input by a grammar. Raises BadField for an unknown type of format."""
    if form is not None and form.type not in ("text", "grammar"):
        raise BadField(f"a custom tool's format must be text or grammar, not {form.type!r}", "tools")
    if form is not None and form.type == "grammar" and not form.grammar_spec.definition:
        raise BadField("a custom tool's format of type grammar needs a definition", "tools")
    return form is not None and form.type == "grammar"


def input_of(arguments: str) -> str:
    """A custom tool's input from a call's arguments. Arguments without a string `input` are returned whole."""
    value = json.loads(arguments).get("input")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else arguments
