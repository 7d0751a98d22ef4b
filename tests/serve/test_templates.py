"""The chat template determines the format of tool calls, and the tool's schema the types of values."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from paceline.serve.tools import (
    DeepSeekParser,
    Dsml4Parser,
    DsmlParser,
    GlmParser,
    HermesParser,
    KimiParser,
    MiniMaxParser,
    QwenCoderParser,
    has_reasoning,
    parser_for,
)
from paceline.serve.tools.values import typed
from tests.serve.formats import FORMATS, SCHEMA
from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted

# How the models' own templates show the call format: within Jinja strings or as plain text, escaped or not.
QWEN = r"""{{- "each within <tool_call></tool_call> tags:\n<tool_call>\n{\"name\": <name>, \"arguments\": <args>}" }}"""
NOUS = '{{- "<tool_call>\n{"arguments": <args-dict>, "name": <function-name>}\n</tool_call>" }}'
CODER = (
    r"{{- 'in this format:\n\n<tool_call>\n<function=example>\n<parameter=first>\nvalue\n</parameter>\n</function>' }}"
)
GLM = "format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n</tool_call>"
DEEPSEEK = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ tool['function']['name'] + '<｜tool▁sep｜>' + arguments }}"
MINIMAX = "{%- set toolcall_begin_token = '<minimax:tool_call>' -%}\n<invoke name=\"tool-name-1\">"
MINIMAX_3 = "{%- set token = ']<]minimax[>[' -%}{%- set begin = token ~ '<tool_call>' -%}"
DSML = """{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }}function_calls>{% for call in message.tool_calls %}"""
DSML_4 = """{{- '<' + '｜DSML｜' + 'tool_calls>' }}{% for call in message.tool_calls %}"""
KIMI = "<|tool_calls_section_begin|>{%- for call in message.tool_calls -%}<|tool_call_begin|>{{ call['id'] }}"
LISTS = 'a list of json objects within <tool_call></tool_call> XML tags:\n<tool_call>\n[{"name": <name>}]'


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (TEMPLATE, HermesParser),
        (QWEN, HermesParser),
        (NOUS, HermesParser),
        (CODER, QwenCoderParser),
        (GLM, GlmParser),
        (DEEPSEEK, DeepSeekParser),
        (MINIMAX, MiniMaxParser),
        (KIMI, KimiParser),
        (DSML, DsmlParser),
        (DSML_4, Dsml4Parser),
        (MINIMAX_3, None),
        (LISTS, None),
        ("{{- '<|tool_call>call' }}", None),
        ("", None),
        (None, None),
    ],
)
def test_the_template_chooses_the_parser(template: str | None, kind: Any) -> None:
    assert parser_for(template) is kind


def test_a_template_with_the_end_marker_has_reasoning() -> None:
    assert has_reasoning("{{- '<think>\\n\\n</think>' }}") and not has_reasoning(TEMPLATE) and not has_reasoning(None)


@pytest.mark.parametrize("name", ["qwen_coder", "glm", "deepseek", "minimax"])
def test_a_served_models_calls_are_read_in_its_templates_format(name: str) -> None:
    marker = {"qwen_coder": CODER, "glm": GLM, "deepseek": "<｜tool▁calls▁begin｜>", "minimax": MINIMAX}[name]
    template = TEMPLATE.replace("{{- '\\nTools", "{#- " + marker.replace("#}", "") + " #}{{- '\\nTools")
    arguments = {"path": "é.py", "limit": 3, "edits": [{"a": "</parameter></arg_value>"}]}
    script = ScriptedEngine("I write.\n" + FORMATS[name].write([("write", arguments)]), size=2)
    script.tokenizer = byte_tokenizer(template=template)
    tools = [{"type": "function", "function": {"name": "write", "parameters": SCHEMA}}]
    with running(scripted(script)) as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "tools": tools}
        choice = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "write" and choice["message"]["content"] == "I write."
    assert httpx.Response(200, text=call["function"]["arguments"]).json() == arguments
    assert choice["finish_reason"] == "tool_calls"


LOOP: dict[str, Any] = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "array"}]}
DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(5000):
    DEEP = {"anyOf": [DEEP]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, " 3\n", 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "three", "three"),
        ({"type": "integer"}, "true", "true"),
        pytest.param({"type": "integer"}, "9" * 5000, "9" * 5000, id="many digits"),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, '{"a": [1, "é"]}', {"a": [1, "é"]}),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        pytest.param({"type": "array"}, "[" * 100_000, "[" * 100_000, id="many brackets"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "number"]}, "1.10", "1.10"),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["ls", "-l"]', ["ls", "-l"]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": "2"}, "2", "2"),
        ({"$ref": "#/$defs/edit"}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/loop"}, "[1]", [1]),
        ({"$ref": "#/nowhere"}, "[1]", "[1]"),
        ({"$ref": "http://elsewhere"}, "[1]", "[1]"),
        (DEEP, "1", 1),
        ({}, "3", "3"),
        (True, "3", "3"),
        ({"type": 3, "anyOf": 3, "enum": 3}, "3", "3"),
    ],
)
def test_a_value_has_the_type_its_schema_says(schema: Any, text: str, value: Any) -> None:
    root = {"properties": {"key": schema}, "$defs": {"edit": {"type": "object"}, "loop": LOOP}}
    given = typed(text, root, "key")
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    "parameters", [None, [], {}, {"properties": None}, {"properties": {"other": {"type": "integer"}}}]
)
def test_a_value_no_schema_speaks_of_is_text(parameters: Any) -> None:
    assert typed("3", parameters, "key") == "3"


def test_properties_that_are_not_listed_have_their_schema_too() -> None:
    assert typed("3", {"additionalProperties": {"type": "integer"}}, "key") == 3
