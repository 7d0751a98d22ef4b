"""Our parsers beside the templates that transformers carries for the same models.

They agree on well-formed calls. Not compared is where theirs differ on purpose or by accident: white space at the ends of a
Qwen3-Coder value is dropped, a value may not hold the format's markers, a hermes call that is cut off or malformed raises,
a Qwen3-Coder call that is cut off is a call without its last values, and a line's end between two calls or a text after a
call takes the place of the text before it.
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
    calls = [("write", each) for each in contents(name)[:6]]  # the rest hold the format's markers
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
