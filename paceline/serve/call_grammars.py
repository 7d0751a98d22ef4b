"""Grammars of tool calls, one a format: what holds a model to calling."""

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
SPACE = r"/[ \n]{0,8}/"  # bounded: a model held where it does not want to be would write it for ever


class Rules:
    """Lark under construction. `special` are the tokenizer's added tokens: text in a grammar never stands for one.

    Schemas put into it are `lenient` until that is changed.
    """

    lenient = True

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """An expression for `text`; a marker that is a token of its own stands as that token."""
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
        """A grammar of its own, whose names are its own too."""
        return self.rule("%lark {\n" + text + "\n}")

    def json(self, schema: Mapping[str, Any]) -> str:
        kept = {name: _without_lark(each) for name, each in (schema.get("properties") or {}).items()}
        whole = {**schema, "properties": kept} if kept else schema
        return self.rule(lark(_without_lark(whole), self.lenient))

    def value(self, schema: Any, root: Any, end: str) -> str:
        """A parameter where strings stand as they are and all else as JSON; then `end`. As `tools.values` reads it."""
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
        """Any text up to `end`, and that."""
        head = self._split.split(end)[0]
        if head != end:  # what follows the head is a token, which no text holds
            last = re.escape(head).replace("/", "\\/").replace("\\\n", "\\n")
            return f"{self.rule(f'{TEXT[:-1]}{last}/')} {self.text(end.removeprefix(head))}"
        return self.rule(f"{TEXT} {self.text(end)}", "[lazy]")

    def parameters(self, schema: Mapping[str, Any], before: Callable[[str], str], after: str) -> str:
        """A schema's properties in their order, those not required optional."""
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
class Form:
    """How a format writes calls: `call` gives one; around all of them stand `before` and `after`."""

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


FORMS: dict[type[CallParser], Form] = {
    HermesParser: Form(_hermes),
    DeepSeekParser: Form(_deepseek, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    DsmlParser: Form(_dsml, "<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    Dsml4Parser: Form(_dsml, "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"),
    KimiParser: Form(_kimi, "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    QwenCoderParser: Form(_qwen_coder),
    GlmParser: Form(_glm),
    MiniMaxParser: Form(_minimax, "<minimax:tool_call>\n", "</minimax:tool_call>"),
}


def calls_grammar(
    kind: type[CallParser],
    tools: Schemas,
    special: Mapping[str, int],
    *,
    several: bool = True,
    strict: Collection[str] = (),
) -> str:
    """The grammar of an output that is a call of one of `tools`, of which there is one, or `several`: as `kind` reads it.

    White space may stand between calls and after the last: Qwen2.5-Coder writes a line's end before it ends its turn, and
    where only another call may follow that it calls for ever. Schemas but those of the tools named in `strict` are
    lenient. Arguments have no keys but those declared, where the schema does not say otherwise (`schemas.closed`).
    """
    how, rules = FORMS[kind], Rules(special)
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
