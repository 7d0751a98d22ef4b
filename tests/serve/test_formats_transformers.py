"""Compares our parsers with the response parsing of transformers for the same models.

They agree on well-formed calls. Cases in which transformers differs, on purpose or by accident, are not compared: it drops
white space at the ends of a Qwen3-Coder value, does not allow the format's markers in a value, raises for a truncated or
malformed Hermes call, returns a truncated Qwen3-Coder call without its last values, and replaces the text before a call by a
newline between two calls or by text after the call.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from paceline.serve.tools import Call
from tests.serve.formats import FORMATS, SCHEMAS, contents, parser_of

TOOLS = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in SCHEMAS.items()]


def template_of(model_type: str) -> Any:
    utils = pytest.importorskip("transformers.cli.serving.utils")
    carried = getattr(utils, "_RESPONSE_TEMPLATE_FALLBACKS", {})
    found = next((each for types, each in carried.items() if model_type in types), None)
    return found or pytest.skip(f"this version of transformers carries no template for {model_type}")


def stripped(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: each.strip() if isinstance(each, str) else each for key, each in arguments.items()}


@pytest.mark.parametrize(("name", "model_type"), [("hermes", "qwen3"), ("qwen_coder", "qwen3_5")])
def test_well_formed_calls_are_the_same(name: str, model_type: str) -> None:
    from transformers.utils.chat_parsing import parse_response

    template = template_of(model_type)
    calls = [("write", each) for each in contents(name)[:6]]  # the others contain the format's markers
    for some in (*([each] for each in calls), calls):
        text = FORMATS[name].write(some)
        message = parse_response(text, template, prefix="", tools=TOOLS)
        theirs = [(each["function"]["name"], each["function"]["arguments"]) for each in message["tool_calls"]]
        parser = parser_of(name)
        made = [each for each in parser.feed(text) + parser.finish() if isinstance(each, Call)]
        ours = [(each.name, json.loads(each.arguments)) for each in made]
        assert ours == some
        if name == "qwen_coder":
            ours, theirs = ([(called, stripped(values)) for called, values in each] for each in (ours, theirs))
        assert theirs == ours
