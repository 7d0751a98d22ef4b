"""Constrained output through OpenAI's own client; drafts do not change it."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest

from paceline.engine.grammar import Grammars
from paceline.serve.call_grammars import CALL_FORMATS, calls_grammar
from paceline.serve.constrain import AllowedCalls, json_schema, output_grammar
from paceline.serve.responses_input import ResponsesBody, responses_tools
from paceline.serve.tools import (
    Call,
    CallParser,
    DeepSeekParser,
    Dsml4Parser,
    DsmlParser,
    GlmParser,
    HermesParser,
    KimiParser,
    MiniMaxParser,
    QwenCoderParser,
)
from tests.serve.formats import FORMATS, SCHEMAS
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, until

ASK: list[Any] = [{"role": "user", "content": "Say it."}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["file", "folder"]}, "empty": {"type": "boolean"}},
    "required": ["kind", "empty"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}


def test_a_reply_has_the_schema_s_form(client: openai.OpenAI) -> None:
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        options = {**options, "model": "tiny", "messages": ASK, "max_tokens": 400, "response_format": FORMAT}
        reply = client.chat.completions.create(**options)
        text = reply.choices[0].message.content or ""
        assert reply.choices[0].finish_reason == "stop"
        assert set(json.loads(text)) == {"kind", "empty"}
        chunks = client.chat.completions.create(**options, stream=True)
        assert "".join(each.choices[0].delta.content or "" for each in chunks) == text
        prediction: Any = {"type": "content", "content": '{"kind": "folder", "empty": true, "more": 1}'}
        predicted = client.chat.completions.create(**options, prediction=prediction)
        assert predicted.choices[0].message.content == text


def test_structured_outputs(client: openai.OpenAI) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"regex": "v[0-9]{1,3}"}, "v[0-9]{1,3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "<" /[a-c]{2}/ ">"'}, "<[a-c]{2}>"),
        ({"json": {"enum": [1, 2]}}, "[12]"),
    ]
    for asked, pattern in cases:
        extra = {"structured_outputs": asked}
        reply = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=50, extra_body=extra)
        assert re.fullmatch(pattern, reply.choices[0].message.content or ""), asked
        text = client.completions.create(model="tiny", prompt="abc", max_tokens=50, extra_body=extra).choices[0].text
        assert re.fullmatch(pattern, text), asked


@pytest.mark.parametrize(
    "extra, word",
    [
        ({"response_format": {"type": "yaml"}}, "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}}, "strin"),
        ({"structured_outputs": {"regex": "(a"}}, "compile"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "nothing"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"json": "{"}}, "JSON"),
    ],
)
def test_what_does_not_compile_is_refused(client: openai.OpenAI, extra: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        client.chat.completions.create(model="tiny", messages=ASK, extra_body=extra)


CALLS = {
    HermesParser: (
        '<tool_call>\n{"name": "read", "arguments": {"path": "a</tool", "n": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "read", "arguments": {"n": 3}}\n</tool_call>',
    ),
    DeepSeekParser: (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>read<｜tool▁sep｜>{"path": "x"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    QwenCoderParser: (
        "<tool_call>\n<function=read>\n<parameter=path>\na\n\n</par\n</parameter>\n<parameter=n>\n3\n</parameter>\n"
        "<parameter=mode>\nb\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=read>\n<parameter=path>\na\n</parameter>\n<parameter=n>\nx\n</parameter>\n"
        "</function>\n</tool_call>",
    ),
    GlmParser: (
        "<tool_call>read\n<arg_key>path</arg_key>\n<arg_value>a b\nc</arg_value>\n"
        "<arg_key>mode</arg_key>\n<arg_value>a</arg_value>\n</tool_call>",
        "<tool_call>read\n</tool_call>",
    ),
    **{
        kind: (
            f'<｜DSML｜{section}>\n<｜DSML｜invoke name="read">\n<｜DSML｜parameter name="path" string="true">a b\nc'
            '</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">-2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            f"</｜DSML｜{section}>",
            f'<｜DSML｜{section}>\n<｜DSML｜invoke name="read">\n<｜DSML｜parameter name="path" string="false">3</｜DSML｜'
            f"parameter>\n</｜DSML｜invoke>\n</｜DSML｜{section}>",
        )
        for kind, section in ((DsmlParser, "function_calls"), (Dsml4Parser, "tool_calls"))
    },
    KimiParser: (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.read:12<|tool_call_argument_begin|>"
        '{"path": "a", "n": 2, "mode": "b"}<|tool_call_end|><|tool_calls_section_end|>',
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.read:0<|tool_call_argument_begin|>"
        '{"path": "a", "mode": "c"}<|tool_call_end|><|tool_calls_section_end|>',
    ),
    MiniMaxParser: (
        '<minimax:tool_call>\n<invoke name="read">\n<parameter name="path">a b\nc</parameter>\n'
        '<parameter name="n">-2</parameter>\n</invoke>\n</minimax:tool_call>',
        '<minimax:tool_call>\n<invoke name="read">\n<parameter name="path">a</parameter>\n'
        '<parameter name="n">1.5</parameter>\n</invoke>\n</minimax:tool_call>',
    ),
}


@pytest.mark.parametrize("form", CALL_FORMATS)
def test_a_forced_call_is_one_of_the_format_s(form: type[CallParser]) -> None:
    """A call as the format writes it passes to its end; one that violates the tool's schema does not."""
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    read = {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "n": {"$ref": "#/$defs/count"},
            "mode": {"type": "string", "enum": ["a", "b"]},
        },
        "$defs": {"count": {"type": "integer"}},
        "required": ["path"],
        "additionalProperties": False,
    }
    grammar = calls_grammar(form, {"read": read}, tokenizer.special_tokens, several=False)
    events = form({"read": read}).feed(CALLS[form][0])
    assert [type(each) for each in events] == [Call]
    good, bad = ([*tokenizer.encode(each, allow_special=True), tokenizer.eos_tokens[0]] for each in CALLS[form])
    assert _allowed(grammars, grammar, good) == len(good)
    assert _allowed(grammars, grammar, bad) < len(bad) - 1


def _allowed(grammars: Grammars, grammar: str, tokens: list[int]) -> int:
    """The number of leading tokens that the grammar allows."""
    bits = grammars.matcher(grammar).masks([0, *tokens], [0, *range(len(tokens))])
    passes = [bits[index][token // 32] >> (token % 32) & 1 for index, token in enumerate(tokens)]
    return passes.index(0) if 0 in passes else len(tokens)


# format names by parser class
PARSED_FORMATS = ("hermes", "deepseek", "dsml", "dsml4", "kimi", "qwen_coder", "glm", "minimax")


@pytest.mark.parametrize("spoken", [True, False])  # whether the format's markers are special tokens
@pytest.mark.parametrize("name", PARSED_FORMATS)
def test_a_forced_turn_may_end_as_the_model_s_template_ends_it(name: str, spoken: bool) -> None:
    """The turn ends directly, or after white space, which models write too, but of bounded length."""
    form = FORMATS[name]
    before, end = form.turn
    markers = [each for each in form.markers if re.fullmatch(r"<[^ ]*>", each)] if spoken else []
    markers = ["｜DSML｜"] if spoken and name.startswith("dsml") else markers
    tokenizer = byte_tokenizer(markers=tuple(dict.fromkeys((*markers, "<|im_end|>", end))))
    tokenizer.eos_tokens = (tokenizer.special_tokens[end],)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    calls = [("write", {"path": "a.py", "limit": 3}), ("Read.file-2", {"path": "b"})]
    for several in (True, False):
        kind: Any = form.parser
        thinking = False if before else None  # after the end of reasoning that the prompt has opened
        wanted = AllowedCalls(SCHEMAS, forced=True, max_calls=None if several else 1)
        grammar = output_grammar(None, wanted, kind, tokenizer.special_tokens, thinking)
        assert grammar is not None
        for count in (1, 2):
            for after in ("", "\n", "\n\n", " \n", " " * 9, "\nDone."):
                written = f"{before}{form.write(calls[:count])}{after}"
                tokens = tokenizer.encode(f"{written}{end}", allow_special=True)
                assert tokens[-1] in tokenizer.eos_tokens
                holds = (several or count == 1) and len(after) < 4
                assert (_allowed(grammars, grammar, tokens) == len(tokens)) is holds, (several, count, written)


def test_every_form_is_tried_with_its_end_of_turn() -> None:
    assert {FORMATS[name].parser for name in PARSED_FORMATS} == set(CALL_FORMATS)


def _called(*arguments: dict[str, Any]) -> str:
    return FORMATS["hermes"].write([("read", each) for each in arguments])


@pytest.mark.parametrize("size", [1, 7, 4000])
def test_a_forced_call_made_again_ends_the_turn(size: int) -> None:
    """The repetition is dropped, the engine's request ends, and its tokens are counted. All other calls are returned."""
    once = {"mode": "all", "n": True}
    again = [once, {"mode": "head"}, {"n": True, "mode": "all"}, *[once] * 60]
    text = _called(*again)
    script = ScriptedEngine(text, size=size)
    service = scripted(script)
    tools = [{"type": "function", "function": READ}]
    body = {"model": "tiny", "messages": ASK, "tools": tools, "tool_choice": "required", "max_tokens": 4000}
    with running(service) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        choice = reply["choices"][0]
        made = [json.loads(each["function"]["arguments"]) for each in choice["message"]["tool_calls"]]
        assert made == again[:2] and choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        assert reply["usage"]["completion_tokens"] >= len(_called(*again[:3]))
        assert size > 7 or reply["usage"]["completion_tokens"] < len(text) - 1000
        until(lambda: not script.busy and service.host.num_open == 0)
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        lines = httpx.post(f"{url}/v1/chat/completions", json=streamed).text.split("\n\n")
        chunks = [json.loads(each[6:]) for each in lines if each.startswith("data: {")]
        deltas = [each["choices"][0] for each in chunks if each["choices"]]
        assert [each["delta"]["tool_calls"][0]["index"] for each in deltas if "tool_calls" in each["delta"]] == [0, 1]
        assert deltas[-1]["finish_reason"] == "tool_calls" and chunks[-1]["usage"]["completion_tokens"] > 0
        inputs = [{"name": "read", "input_schema": READ["parameters"]}]
        asked = {"model": "tiny", "messages": ASK, "tools": inputs, "max_tokens": 4000, "tool_choice": {"type": "any"}}
        message = httpx.post(f"{url}/v1/messages", json=asked).json()
        assert [each["input"] for each in message["content"]] == again[:2] and message["stop_reason"] == "tool_use"
        free = httpx.post(f"{url}/v1/chat/completions", json={**body, "tool_choice": "auto"}).json()
        assert len(free["choices"][0]["message"]["tool_calls"]) == len(again)
        metrics = httpx.get(f"{url}/metrics").text
        assert 'request_success_total{model_name="tiny"} 4.0' in metrics
        assert 'request_cancelled_total{model_name="tiny"} 0.0' in metrics


READ: Any = {
    "name": "read",
    "parameters": {
        "type": "object",
        "properties": {"mode": {"enum": ["all", "head"]}, "n": {"type": "boolean"}},
        "required": ["mode"],
        "additionalProperties": False,
    },
}
OTHER: Any = {"name": "other", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: Any = [{"type": "function", "function": READ}, {"type": "function", "function": OTHER}]


@pytest.mark.parametrize(
    "choice, names",
    [
        ("required", {"read", "other"}),
        ({"type": "function", "function": {"name": "read"}}, {"read"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]},
            },
            {"other"},
        ),
    ],
)
def test_chat_calls_what_it_must(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    for extra in ({}, {"temperature": 1.0, "seed": 5}):
        options: Any = {
            "model": "tiny",
            "messages": ASK,
            "tools": TOOLS,
            "tool_choice": choice,
            "max_tokens": 300,
            **extra,
        }
        reply = client.chat.completions.create(**options, parallel_tool_calls=False)
        calls = reply.choices[0].message.tool_calls or []
        assert reply.choices[0].finish_reason == "tool_calls" and len(calls) == 1
        function = getattr(calls[0], "function")  # noqa: B009 (custom calls have none)
        assert function.name in names
        arguments = json.loads(function.arguments)
        assert arguments.get("mode") in ("all", "head") if function.name == "read" else arguments == {}


def test_the_other_apis_call_what_they_must(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **READ}, {"type": "function", **OTHER}]
    for choice in ("required", {"type": "function", "name": "read"}):
        reply = client.responses.create(
            model="tiny",
            input="Say it.",
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=300,
        )
        call = reply.output[0]
        assert call.type == "function_call" and call.name in ("read", "other")
    form: Any = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA}}
    text = client.responses.create(model="tiny", input="Say it.", text=form, max_output_tokens=400).output_text
    assert set(json.loads(text)) == {"kind", "empty"}

    url = str(client.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
        inputs: Any = [{"name": "read", "input_schema": READ["parameters"]}]
        for wanted in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "read"}):
            asked: Any = {"tool_choice": wanted, "tools": inputs, "messages": ASK, "max_tokens": 300}
            message = other.messages.create(model="tiny", **asked)
            assert message.stop_reason == "tool_use" and message.content[0].type == "tool_use"
            assert message.content[0].name == "read"


@pytest.mark.parametrize(
    "choice",
    [
        "always",
        {"type": "function", "function": {"name": "none"}},
        {"type": "function", "function": {"name": ["read"]}},
        {"type": "allowed_tools", "mode": "required", "tools": [{"name": {}}]},
        {"type": "function"},
        {},
    ],
)
def test_a_choice_there_is_not_is_refused(client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice)


def test_reasoning_is_free_and_comes_first() -> None:
    """Only the text after reasoning is constrained, whether the prompt or the model opens the reasoning."""
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    answer = '{"kind": "file", "empty": true}'
    for thinking, text in (
        (True, f"so, {{be it}}\n</think>\n\n{answer}"),
        (False, f"<think>\nso\n</think>\n\n{answer}"),
        (False, answer),
        (None, answer),
    ):
        grammar = output_grammar(json_schema(SCHEMA), AllowedCalls({}), None, tokenizer.special_tokens, thinking)
        assert grammar is not None
        tokens = [*tokenizer.encode(text), tokenizer.eos_tokens[0]]
        assert _allowed(grammars, grammar, tokens) == len(tokens), (thinking, text)
    grammar = output_grammar(json_schema(SCHEMA), AllowedCalls({}), None, tokenizer.special_tokens, True)
    unended = [*tokenizer.encode(f"so {answer}"), tokenizer.eos_tokens[0]]
    assert grammar is not None and _allowed(grammars, grammar, unended) == len(unended) - 1


def test_where_an_answer_is_held_tools_may_be_called_instead() -> None:
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    calls = AllowedCalls({"read": READ["parameters"]})
    grammar = output_grammar(json_schema(SCHEMA), calls, HermesParser, tokenizer.special_tokens, None)
    assert grammar is not None
    for text in (
        '{"kind": "file", "empty": true}',
        '<tool_call>\n{"name": "read", "arguments": {"mode": "all"}}\n</tool_call>',
    ):
        tokens = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_tokens[0]]
        assert _allowed(grammars, grammar, tokens) == len(tokens)
    assert output_grammar(None, calls, HermesParser, tokenizer.special_tokens, None) is None


PATCH = """start: "*** Begin Patch" LF line+ "*** End Patch" LF?
line: /[+ -][^\\n]*/ LF
%import common.LF
"""


def test_strict_calls_may_follow_text_and_have_their_schemas() -> None:
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    calls = AllowedCalls({"read": READ["parameters"]}, strict={"read"})
    grammar = output_grammar(None, calls, HermesParser, tokenizer.special_tokens, None)
    assert grammar is not None
    for text, holds in (
        ("Just words about a <tool_call>.", True),
        ('I read.\n<[call]>\n{"name": "read", "arguments": {"mode": "all"}}\n<[end]>', True),
        ('<[call]>\n{"name": "read", "arguments": {"mode": "none"}}\n<[end]>', False),
        ('<[call]>\n{"name": "write", "arguments": {"mode": "all"}}\n<[end]>', False),
    ):
        tokens = [tokenizer.eos_tokens[0]]
        for piece in reversed(re.split(r"(<\[call\]>|<\[end\]>)", text)):
            marker = {"<[call]>": "<tool_call>", "<[end]>": "</tool_call>"}.get(piece)
            tokens = (tokenizer.encode(piece) if marker is None else [tokenizer.special_tokens[marker]]) + tokens
        assert (_allowed(grammars, grammar, tokens) == len(tokens)) is holds, text
    without = {name: token for name, token in tokenizer.special_tokens.items() if name != "<tool_call>"}
    assert output_grammar(None, calls, HermesParser, without, None) is None


def test_a_custom_tools_grammar_holds_where_the_format_writes_strings_as_they_are() -> None:
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    form = {"type": "grammar", "syntax": "lark", "definition": PATCH}
    tools: Any = [{"type": "custom", "name": "apply_patch", "format": form}]
    body = msgspec.convert(
        {"model": "tiny", "input": "x", "tools": msgspec.Raw(msgspec.json.encode(tools))}, ResponsesBody
    )
    calls = responses_tools(body).calls(body)
    assert calls.strict
    for kind, begin, end in (
        (QwenCoderParser, "<function=apply_patch>\n<parameter=input>\n", "\n</parameter>\n</function>\n"),
        (HermesParser, '{"name": "apply_patch", "arguments": {"input": "', '"}}\n'),
    ):
        grammar = output_grammar(None, calls, kind, tokenizer.special_tokens, None)
        assert grammar is not None
        for patch, is_patch in (("*** Begin Patch\n+x = 1\n*** End Patch", True), ("*** Begin Patch\nx\n", False)):
            written = json.dumps(patch)[1:-1] if kind is HermesParser else patch
            text = f"<tool_call>\n{begin}{written}{end}</tool_call>"
            tokens = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_tokens[0]]
            holds = is_patch or kind is HermesParser  # within JSON it is an ordinary string
            assert (_allowed(grammars, grammar, tokens) == len(tokens)) is holds, text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": 3},
        {"type": "object", "properties": ["a"]},
        {"type": "object", "properties": {"a": 3}},
        {"type": "object", "properties": {"a": {"type": "strin"}}},
        {"type": "object", "required": "a"},
    ],
)
def test_a_tool_without_a_json_schema_is_refused(client: openai.OpenAI, schema: Any) -> None:
    tool: Any = {"name": "odd", "parameters": schema}
    with pytest.raises(openai.BadRequestError, match="'odd' are not a JSON schema"):
        client.chat.completions.create(model="tiny", messages=ASK, tools=[{"type": "function", "function": tool}])
    with pytest.raises(openai.BadRequestError, match="'odd' are not a JSON schema"):
        client.responses.create(model="tiny", input="x", tools=[{"type": "function", **tool}])


@pytest.mark.parametrize("form", [QwenCoderParser, GlmParser, MiniMaxParser])  # only its schemas define the types
@pytest.mark.parametrize(
    "schema, written, value",
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "two words", "two words"),
        ({"type": ["string", "null"]}, "null", None),
        ({}, "as it is", "as it is"),
        ({"enum": ["a b", "c"]}, "a b", "a b"),
        ({"const": "d"}, "d", "d"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "7", 7),
        ({"$ref": "#/$defs/Text"}, "by reference", "by reference"),
    ],
)
def test_what_a_grammar_lets_a_model_write_is_read_as_it_was_meant(
    form: type[CallParser], schema: Any, written: str, value: Any
) -> None:
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    tools = {"f": {"properties": {"p": schema}, "required": ["p"], "$defs": {"Text": {"type": "string"}}}}
    text = {
        QwenCoderParser: f"<tool_call>\n<function=f>\n<parameter=p>\n{written}\n</parameter>\n</function>\n</tool_call>",
        GlmParser: f"<tool_call>f\n<arg_key>p</arg_key>\n<arg_value>{written}</arg_value>\n</tool_call>",
        MiniMaxParser: (
            f'<minimax:tool_call>\n<invoke name="f">\n<parameter name="p">{written}</parameter>\n</invoke>\n'
            "</minimax:tool_call>"
        ),
    }[form]
    grammar = calls_grammar(form, tools, tokenizer.special_tokens, several=False)
    tokens = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_tokens[0]]
    assert _allowed(grammars, grammar, tokens) == len(tokens)
    events = form(tools).feed(text)
    assert [json.loads(each.arguments) for each in events if isinstance(each, Call)] == [{"p": value}]


def test_arguments_are_an_object_whatever_the_tool_says() -> None:
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    for schema in (None, {}, {"properties": {}}):
        grammar = calls_grammar(HermesParser, {"f": schema}, tokenizer.special_tokens)
        for arguments, holds in (("{}", True), ('{"a": [1]}', True), ("3", False), ('"a"', False)):
            text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
            tokens = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_tokens[0]]
            assert (_allowed(grammars, grammar, tokens) == len(tokens)) is holds, (schema, arguments)


def test_log_probabilities_are_numbers_where_a_grammar_leaves_no_choice(client: openai.OpenAI) -> None:
    options: Any = {"response_format": FORMAT, "logprobs": True, "top_logprobs": 4, "max_tokens": 400}
    reply = client.chat.completions.create(model="tiny", messages=ASK, **options)
    content = reply.choices[0].logprobs.content if reply.choices[0].logprobs else None
    assert content and reply.choices[0].message.content == "".join(each.token for each in content)
    assert all(isinstance(top.logprob, float) for each in content for top in each.top_logprobs)
    assert min(top.logprob for each in content for top in each.top_logprobs) == -9999.0


def test_a_grammar_too_large_to_follow_is_refused_and_the_server_lives(client: openai.OpenAI) -> None:
    """Long chains of rules or references overflow llguidance's stack, which would end the process."""
    count = 5000
    chains = ["".join(f"r{index}: r{index + 1}\n" for index in range(length)) for length in (900, 1400)]
    rules, many = (f'start: r0\n{chain}r{len(chain.splitlines())}: "a"\n' for chain in chains)
    links = {f"a{index}": {"anyOf": [{"$ref": f"#/$defs/a{index + 1}"}, {"type": "null"}]} for index in range(count)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**links, f"a{count}": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for extra in (
        {"structured_outputs": {"grammar": many}},
        {"structured_outputs": {"grammar": rules + "# " + "x" * 40_000}},
        {"response_format": form},
    ):
        with pytest.raises(openai.BadRequestError, match=r"at most|longer|compile"):
            client.chat.completions.create(model="tiny", messages=ASK, extra_body=extra)
    fits = {"structured_outputs": {"grammar": rules}}
    reply = client.chat.completions.create(model="tiny", messages=ASK, extra_body=fits, max_tokens=5)
    assert reply.choices[0].message.content == "a"


def test_a_choice_beside_tools(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    reply = client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS, extra_body=extra, max_tokens=300)
    assert reply.choices[0].message.content in ("yes", "no") or reply.choices[0].message.tool_calls
