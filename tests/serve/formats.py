"""Every format of tool calls as its template writes it, and a corpus of sample outputs made from a table of contents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from paceline.serve.tools import (
    Call,
    DeepSeekParser,
    Dsml4Parser,
    DsmlParser,
    Event,
    GlmParser,
    HermesParser,
    KimiParser,
    MiniMaxParser,
    Parser,
    QwenCoderParser,
    ReasoningParser,
    ReasoningText,
    Text,
)

Arguments = dict[str, Any]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "content": {"type": "string"},
        "limit": {"type": "integer"},
        "ratio": {"type": "number"},
        "force": {"type": "boolean"},
        "edits": {"type": "array"},
        "options": {"type": "object"},
        "note": {"type": ["string", "null"]},
    },
}
SCHEMAS = {"write": SCHEMA, "Read.file-2": SCHEMA}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def hermes(calls: list[tuple[str, Arguments]]) -> str:
    bodies = [_json({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def fenced(calls: list[tuple[str, Arguments]]) -> str:
    """A call as Qwen2.5-Coder writes it in the Hermes format: on several lines, in a fence, without the tags."""
    bodies = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False, indent=2) for name, arguments in calls
    ]
    return "\n\n".join(f"```json\n{body}\n```" for body in bodies)


def bare(calls: list[tuple[str, Arguments]]) -> str:
    return "\n".join(_json({"name": name, "arguments": arguments}) for name, arguments in calls)


def in_tools(calls: list[tuple[str, Arguments]]) -> str:
    return f"<tools>\n{bare(calls)}\n</tools>"


def qwen_coder(calls: list[tuple[str, Arguments]]) -> str:
    def one(name: str, arguments: Arguments) -> str:
        values = [f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in arguments.items()]
        return f"<tool_call>\n<function={name}>\n{''.join(values)}</function>\n</tool_call>"

    return "\n".join(one(*each) for each in calls)


def glm(calls: list[tuple[str, Arguments]]) -> str:
    def one(name: str, arguments: Arguments) -> str:
        pairs = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n" for key, value in arguments.items()
        ]
        return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"

    return "\n".join(one(*each) for each in calls)


def glm_in_one_line(calls: list[tuple[str, Arguments]]) -> str:
    def one(name: str, arguments: Arguments) -> str:
        pairs = [f"<arg_key>{key}</arg_key><arg_value>{_plain(value)}</arg_value>" for key, value in arguments.items()]
        return f"<tool_call>{name}{''.join(pairs)}</tool_call>"

    return "".join(one(*each) for each in calls)


def deepseek(calls: list[tuple[str, Arguments]]) -> str:
    bodies = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(each)}<｜tool▁call▁end｜>" for name, each in calls]
    return f"<｜tool▁calls▁begin｜>{''.join(bodies)}<｜tool▁calls▁end｜>"


def deepseek_r1(calls: list[tuple[str, Arguments]]) -> str:
    bodies = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(each)}\n```<｜tool▁call▁end｜>"
        for name, each in calls
    ]
    newline = "\n"
    return f"<｜tool▁calls▁begin｜>{newline.join(bodies)}<｜tool▁calls▁end｜>"


def kimi(calls: list[tuple[str, Arguments]]) -> str:
    bodies = [
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{_json(each)}<|tool_call_end|>"
        for index, (name, each) in enumerate(calls)
    ]
    return f"<|tool_calls_section_begin|>{''.join(bodies)}<|tool_calls_section_end|>"


def dsml(calls: list[tuple[str, Arguments]], section: str = "function_calls") -> str:
    def one(name: str, arguments: Arguments) -> str:
        values = [
            f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
            f"{_plain(value)}</｜DSML｜parameter>\n"
            for key, value in arguments.items()
        ]
        return f'<｜DSML｜invoke name="{name}">\n{"".join(values)}</｜DSML｜invoke>\n'

    return f"<｜DSML｜{section}>\n{''.join(one(*each) for each in calls)}</｜DSML｜{section}>"


def dsml4(calls: list[tuple[str, Arguments]]) -> str:
    return dsml(calls, "tool_calls")


def minimax(calls: list[tuple[str, Arguments]]) -> str:
    def one(name: str, arguments: Arguments) -> str:
        values = [f'<parameter name="{key}">{_plain(value)}</parameter>\n' for key, value in arguments.items()]
        return f'<invoke name="{name}">\n{"".join(values)}</invoke>\n'

    return f"<minimax:tool_call>\n{''.join(one(*each) for each in calls)}</minimax:tool_call>"


@dataclass(frozen=True)
class Format:
    """A call format. `markers` are the pieces of its markup, `garbage` are texts that begin like calls and are not. `turn`
    is the text that the model's template puts before a turn's calls, and the token that ends the turn.

    The calls of an `untagged` format are calls only if no text follows.
    """

    parser: Callable[[dict[str, Any]], Parser]
    write: Callable[[list[tuple[str, Arguments]]], str]
    markers: tuple[str, ...]
    garbage: tuple[str, ...]
    untagged: bool = False
    turn: tuple[str, str] = ("", "<|im_end|>")


_HERMES = ("<tool_call>", "</tool_call>", '{"name": "x", "arguments": {')
_UNTAGGED = ("```json\n", "\n```\n", "<tools>", "</tools>", '{"name": "write", "arguments": {', "\n{")
_QWEN = ("<tool_call>", "<function=x>", "<parameter=path>", "</parameter>", "</function>", "</tool_call>")
_GLM = ("<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
_DSML = (
    "<｜DSML｜function_calls>",
    '<｜DSML｜invoke name="x">',
    '<｜DSML｜parameter name="path" string="true">',
    "</｜DSML｜parameter>",
    "</｜DSML｜invoke>",
    "</｜DSML｜function_calls>",
)
_MINIMAX = (
    "<minimax:tool_call>",
    '<invoke name="x">',
    '<parameter name="path">',
    "</parameter>",
    "</invoke>",
    "</minimax:tool_call>",
)
FORMATS: dict[str, Format] = {
    "hermes": Format(
        HermesParser,
        hermes,
        _HERMES,
        ("<tool_call>read a.py</tool_call>", '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": "x"}} then'),
    ),
    "fenced": Format(
        HermesParser,
        fenced,
        _UNTAGGED,
        (
            '```json\n{"name": "other", "arguments": {}}\n```',
            '```json\n{"name": "write", "arguments": {"path": "a.py"}}\n```\n\nThis writes the file.',
            '```json\n{"name": "write", "arguments": {}}\n',
            '```json\n{"name": "write", "arguments": {"a": nothing}}\n```',
            '```json\n{"name": "write", "arguments": {}, "why": "é"}\n```',
            '```json\n{"version": 3}\n{"name": "write", "arguments": {}}\n```',
            '```python\n{"name": "write", "arguments": {}}\n```',
            'Like this: ```json\n{"name": "write", "arguments": {}}\n```',
            '```\n```json\n{"name": "write", "arguments": {}}\n```',
            '```jsonl {"name": "write", "arguments": {}}\n```',
            "```json\n```",
        ),
        untagged=True,
    ),
    "bare": Format(
        HermesParser,
        bare,
        _UNTAGGED,
        (
            '{"name": "other", "arguments": {}}',
            '{"name": "write", "arguments": {}} writes the file.',
            '{"name": "write", "arguments": []}',
            '{"name": "write", "parameters": {}}',
            '{"name": "writer", "arguments": {}}',
            '{"name": "write"}',
            '{"name": "write", "arguments": {}',
            'Write {"name": "write", "arguments": {}}',
            '[{"name": "write", "arguments": {}}]',
            '{"calls": [\n{"name": "write", "arguments": {}}\n]}',
            "{{}}",
        ),
        untagged=True,
    ),
    "in_tools": Format(
        HermesParser,
        in_tools,
        _UNTAGGED,
        (
            "<tools>",
            "<tools></tools>",
            '<tools>\n{"name": "other", "arguments": {}}\n</tools>',
            '<tools>\n{"type": "function", "function": {"name": "write"}}\n</tools>',
            '<tools>\n{"name": "write", "arguments": {}} and so on',
        ),
    ),
    "qwen_coder": Format(
        QwenCoderParser,
        qwen_coder,
        _QWEN,
        (
            '<tool_call>{"name": "x", "arguments": {}}</tool_call>',
            "<tool_call>\n<function=>\n</function>\n</tool_call>",
            "<tool_call>\n<function=read a>\n</function>\n</tool_call>",
            "<tool_call>\n<function=x>\nhow\n</function>\n</tool_call>",
        ),
    ),
    "glm": Format(
        GlmParser,
        glm,
        _GLM,
        ('<tool_call>{"name": "x"}</tool_call>', "<tool_call>read a.py</tool_call>", "<tool_call></tool_call>"),
        turn=("\n", "<|observation|>"),
    ),
    "glm_in_one_line": Format(GlmParser, glm_in_one_line, _GLM, ("<tool_call>x<arg_key>a</arg_key>b</tool_call>",)),
    "deepseek": Format(
        DeepSeekParser,
        deepseek,
        _DEEPSEEK,
        (
            "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜>write<｜tool▁sep｜>{}",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x<｜tool▁sep｜>[1]<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x<｜tool▁sep｜>{x}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        turn=("", "<｜end▁of▁sentence｜>"),
    ),
    "deepseek_r1": Format(DeepSeekParser, deepseek_r1, _DEEPSEEK, ()),
    "kimi": Format(
        KimiParser,
        kimi,
        _KIMI,
        (
            "<|tool_calls_section_begin|><|tool_calls_section_end|>",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.x<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.x:0<|tool_call_argument_begin|>[1]",
            "<|tool_calls_section_begin|><|tool_call_begin|>x:0<|tool_call_argument_begin|>{x}<|tool_call_end|>",
        ),
    ),
    "dsml": Format(
        DsmlParser,
        dsml,
        _DSML,
        (
            "<｜DSML｜function_calls>\n</｜DSML｜function_calls>",
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="x">{}</｜DSML｜invoke>\n</｜DSML｜function_calls>',
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="x">\n<｜DSML｜parameter name="a" string="maybe">b',
            "<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
        ),
        turn=("\n\n", "<｜end▁of▁sentence｜>"),
    ),
    "dsml4": Format(
        Dsml4Parser,
        dsml4,
        tuple(each.replace("function_calls", "tool_calls") for each in _DSML),
        (),
        turn=("\n\n", "<｜end▁of▁sentence｜>"),
    ),
    "minimax": Format(
        MiniMaxParser,
        minimax,
        _MINIMAX,
        (
            "<minimax:tool_call>\n</minimax:tool_call>",
            '<minimax:tool_call>\n<invoke name="x">how</invoke>\n</minimax:tool_call>',
        ),
        turn=("\n", "[e~["),
    ),
}


def contents(name: str) -> list[Arguments]:
    """Arguments for one call each. The last two contain the format's own markers, and a complete call."""
    written = FORMATS[name]
    return [
        {},
        {"path": "a.py", "limit": 3},
        {"content": "def f(a: int) -> bool:\n    return a < 3 and \"x\" != '\\n'\n\n", "force": True},
        {"options": {"deep": [{"a": [1, 2.5, None, {"b": "}]"}]}, []], "": {}}, "edits": [["x", "y"], {"z": False}]},
        {"path": "日本/é🙂.py", "note": None, "ratio": -2.5, "content": ""},
        {"content": "\n\nspace around \n", "edits": [], "options": {}, "force": False, "note": "1.10"},
        {"content": "".join(f"say('{each}')  # {each}, {each}{each}\n" for each in written.markers), "path": "a.py"},
        {"content": f"For example:\n{written.write([('inner', {'path': 'b', 'limit': 1})])}\nand so on"},
    ]


@dataclass(frozen=True)
class Sample:
    """An output and its expected events, merged; None if a test checks only that splits do not matter. A `cut` text is the
    beginning of one call and nothing else."""

    text: str
    events: list[Event] | None
    cut: bool = False
    has_reasoning: bool = False


def samples(name: str) -> Iterator[Sample]:
    written = FORMATS[name]
    table = contents(name)
    calls = [("write" if index % 2 else "Read.file-2", each) for index, each in enumerate(table)]
    made = [Call(called, _json(each)) for called, each in calls]
    first = written.write([calls[1]])
    variant = name in ("glm_in_one_line", "deepseek_r1", "dsml4")
    for index in range(0, len(calls), 3 if variant else 1):
        other = (index + 1) % 3
        one, both = written.write([calls[index]]), written.write([calls[index], calls[other]])
        yield Sample(one, [made[index]])
        yield Sample(f"I write é.\n\n{both}\n", [Text("I write é."), made[index], made[other]])
        after = f" <tool a < b\n{one}\n\nDone. \n"
        between = f"{first} then {one}"
        if written.untagged:
            yield Sample(after, [Text(after)])
            yield Sample(between, [Text(between)])
        else:
            yield Sample(after, [Text(" <tool a < b"), made[index], Text("Done. \n")])
            yield Sample(between, [made[1], Text("then"), made[index]])
        yield Sample(
            f"<think>\nFirst {written.markers[0]}, then…\n{first}</think>\n\n{one}",
            [ReasoningText(f"First {written.markers[0]}, then…\n{first}"), made[index]],
            has_reasoning=True,
        )
        for part in (2, 4, 6):
            yield Sample(one[: len(one) * part // 8], None, cut=True)
    yield Sample(written.write(calls[:6]), made[:6])
    for each in written.garbage:
        yield Sample(each, [Text(each)])
        yield Sample(f"{each}\n{first}", None)
        both = f"{first}\n{each}"
        yield Sample(both, [Text(both)] if written.untagged else [made[1], Text(each)])


def parser_of(name: str, has_reasoning: bool = False) -> Parser:
    parser = FORMATS[name].parser(SCHEMAS)
    return ReasoningParser(parser, inside=False) if has_reasoning else parser
