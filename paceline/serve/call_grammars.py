"""Grammars of tool calls, one for each call format. Constrained decoding uses them to force or to check calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from paceline.engine.schemas import LARK, closed, lark
from paceline.serve.tools import (
    CallParser,
    DeepSeekParser,
    Dsml4Parser,
    DsmlParser,
    GlmParser,
    HermesParser,
    KimiParser,
    MiniMaxParser,
    QwenCoderParser,
    Schemas,
)
from paceline.serve.tools.values import kinds_of

TEXT = r"/(.|\n)*/"
SPACE = r"/[ \n]{0,8}/"  # bounded: a model that is forced to call may otherwise emit white space without end


class Rules:
    """Builds a Lark grammar. `special` are the tokenizer's added tokens: text in a grammar never matches one of them.

    JSON schemas are added as `lenient` (see `engine.schemas`) until that attribute is set to False.
    """

    lenient = True

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """A Lark expression that matches `text`. A marker that is a special token is matched as that token."""
        return " ".join(
            f"<[{self._special[part]}]>" if index % 2 else json.dumps(part, ensure_ascii=False)
            for index, part in enumerate(self._split.split(text))
            if part
        )

    def rule(self, body: str, attribute: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{attribute}: {body}")
        return name

    def grammar(self, text: str) -> str:
        """Adds a nested grammar with its own rule names; returns the rule that matches it."""
        return self.rule("%lark {\n" + text + "\n}")

    def json(self, schema: Mapping[str, Any]) -> str:
        kept = {name: _without_lark(each) for name, each in (schema.get("properties") or {}).items()}
        whole = {**schema, "properties": kept} if kept else schema
        return self.rule(lark(_without_lark(whole), self.lenient))

    def value(self, schema: Any, root: Any, end: str) -> str:
        """A parameter value followed by `end`: strings unquoted, other types as JSON, as `tools.values` parses them."""
        known = schema if isinstance(schema, Mapping) else {}
        kinds = kinds_of(known, root)
        if kinds and "string" not in kinds:
            return f"{self.json(known)} {self.text(end)}"
        if LARK in known:
            return f"{self.grammar(known[LARK])} {self.text(end)}"
        choices = [known["const"]] if "const" in known else known.get("enum")
        if kinds == {"string"} and choices:
            return f"({' | '.join(self.text(str(each)) for each in choices)}) {self.text(end)}"
        return self.until(end)

    def until(self, end: str) -> str:
        """Any text up to and including `end`."""
        head = self._split.split(end)[0]
        if head != end:  # a special token follows the head, and text in a grammar never contains one
            last = re.escape(head).replace("/", "\\/").replace("\\\n", "\\n")
            return f"{self.rule(f'{TEXT[:-1]}{last}/')} {self.text(end.removeprefix(head))}"
        return self.rule(f"{TEXT} {self.text(end)}", "[lazy]")

    def parameters(self, schema: Mapping[str, Any], before: Callable[[str], str], after: str) -> str:
        """A schema's properties in their order; those that are not required are optional."""
        required = schema.get("required") or ()
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        written = []
        for name, each in (schema.get("properties") or {}).items():
            own = each | shared if isinstance(each, dict) else each
            pair = f"{self.text(before(name))} {self.value(own, schema, after)}"
            written.append(pair if name in required else f"({pair})?")
        return " ".join(written)


def _without_lark(schema: Any) -> Any:
    return {key: each for key, each in schema.items() if key != LARK} if isinstance(schema, Mapping) else schema


@dataclass(frozen=True)
class CallFormat:
    """How a format writes calls. `call` builds the parts of one call; `before` and `after` enclose all calls."""

    call: Callable[[Rules, str, Mapping[str, Any]], list[str]]
    before: str = ""
    after: str = ""


def _hermes(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    begin = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '
    return [rules.text(begin), rules.json(schema), rules.text("}\n</tool_call>")]


def _deepseek(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    begin = f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>"
    return [rules.text(begin), rules.json(schema), rules.text("<｜tool▁call▁end｜>")]


def _dsml(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    def before(key: str) -> str:
        kinds = kinds_of(schema["properties"][key], schema)
        return f'<｜DSML｜parameter name="{key}" string="{"false" if kinds and "string" not in kinds else "true"}">'

    inner = rules.parameters(schema, before, "</｜DSML｜parameter>\n")
    return [rules.text(f'<｜DSML｜invoke name="{name}">\n'), inner, rules.text("</｜DSML｜invoke>\n")]


def _kimi(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    begin = f"<|tool_call_begin|>functions.{name}:"
    number = rules.rule("/[0-9]+/")
    argument, end = rules.text("<|tool_call_argument_begin|>"), rules.text("<|tool_call_end|>")
    return [rules.text(begin), number, argument, rules.json(schema), end]


def _qwen_coder(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    inner = rules.parameters(schema, lambda each: f"<parameter={each}>\n", "\n</parameter>\n")
    return [rules.text(f"<tool_call>\n<function={name}>\n"), inner, rules.text("</function>\n</tool_call>")]


def _glm(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    inner = rules.parameters(schema, lambda each: f"<arg_key>{each}</arg_key>\n<arg_value>", "</arg_value>\n")
    return [rules.text(f"<tool_call>{name}\n"), inner, rules.text("</tool_call>")]


def _minimax(rules: Rules, name: str, schema: Mapping[str, Any]) -> list[str]:
    inner = rules.parameters(schema, lambda each: f'<parameter name="{each}">', "</parameter>\n")
    return [rules.text(f'<invoke name="{name}">\n'), inner, rules.text("</invoke>\n")]


CALL_FORMATS: dict[type[CallParser], CallFormat] = {
    HermesParser: CallFormat(_hermes),
    DeepSeekParser: CallFormat(_deepseek, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    DsmlParser: CallFormat(_dsml, "<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    Dsml4Parser: CallFormat(_dsml, "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
    KimiParser: CallFormat(_kimi, "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    QwenCoderParser: CallFormat(_qwen_coder),
    GlmParser: CallFormat(_glm),
    MiniMaxParser: CallFormat(_minimax, "<minimax:tool_call>\n", "</minimax:tool_call>"),
}


def calls_grammar(
    kind: type[CallParser],
    tools: Schemas,
    special: Mapping[str, int],
    *,
    several: bool = True,
    strict: Collection[str] = (),
) -> str:
    """The grammar of an output that consists of one call of one of `tools`, or of `several`, in the format that `kind` parses.

    White space is allowed between calls and after the last one: Qwen2.5-Coder writes a newline before it ends its turn,
    and if only another call could follow that newline, it would call without end. Schemas are lenient except those of the
    tools named in `strict`. Arguments have only declared keys, unless the schema says otherwise (`schemas.closed`).
    """
    how, rules = CALL_FORMATS[kind], Rules(special)
    calls = []
    for name, schema in tools.items():
        rules.lenient = name not in strict
        calls.append(rules.rule(" ".join(how.call(rules, name, closed({**(schema or {}), "type": "object"})))))
    call = rules.rule(" | ".join(calls))
    parts = [rules.text(how.before), call]
    if several:
        parts.append(f"({SPACE} {call})*")
    if how.after:
        parts += [SPACE, rules.text(how.after)]
    parts.append(SPACE)
    return "\n".join([f"start: {' '.join(part for part in parts if part)}", *rules.rules, ""])
