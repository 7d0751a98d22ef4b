"""Custom tools of OpenAI's APIs: the model has functions only, so that one is a function with a text as its parameter."""

from __future__ import annotations

import json
from typing import Any

from msgspec import Struct

from paceline.engine.schemas import LARK
from paceline.errors import BadField
from paceline.serve.constrain import of_grammar, of_regex

# what the model is told that a custom tool takes
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class Grammar(Struct):
    syntax: str = ""
    definition: str = ""


class InputFormat(Struct):
    """The form of a custom tool's input: `text`, or `grammar`, told beside the type (responses) or within `grammar` (chats)."""

    type: str = "text"
    syntax: str = ""
    definition: str = ""
    grammar: Grammar | None = None

    @property
    def asked(self) -> Grammar:
        """The grammar, empty where the input is free."""
        return self.grammar or Grammar(self.syntax, self.definition)


def description(text: str | None, form: InputFormat | None) -> str:
    """What the model is told of a custom tool: its description, and the grammar of its input."""
    asked = form.asked if form is not None else Grammar()
    if not asked.definition:
        return text or ""
    return f"{text or ''}\n\n`input` follows this {asked.syntax} grammar:\n{asked.definition}".strip()


def parameters(form: InputFormat | None, field: str = "tools") -> dict[str, Any]:
    """The schema that calls are held to. One with a grammar is to be named among `Calls.strict`: see `is_held`.

    Raises BadField for a format there is not.
    """
    if not is_held(form):
        return PARAMETERS
    assert form is not None
    asked = form.asked
    if asked.syntax not in ("lark", "regex"):
        raise BadField(f"a custom tool's grammar has the syntax lark or regex, not {asked.syntax!r}", field)
    make = of_regex if asked.syntax == "regex" else of_grammar
    return {**PARAMETERS, "properties": {"input": {"type": "string", LARK: make(asked.definition, field)}}}


def is_held(form: InputFormat | None) -> bool:
    """Whether a format says what the input must be. Raises BadField for a type of format there is not."""
    if form is not None and form.type not in ("text", "grammar"):
        raise BadField(f"a custom tool's format can be text or grammar, not {form.type!r}", "tools")
    if form is not None and form.type == "grammar" and not form.asked.definition:
        raise BadField("a custom tool's format of type grammar needs a definition", "tools")
    return form is not None and form.type == "grammar"


def input_of(arguments: str) -> str:
    """A custom tool's input from a call's arguments; where they are others than asked for, the client sees them all."""
    value = json.loads(arguments).get("input")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else arguments
