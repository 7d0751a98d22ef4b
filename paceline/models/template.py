"""Chat templates: rendered in a sandbox, left open within their last message, and asked what ends a turn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from paceline.errors import RequestError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]

# What Python raises inside a template that meets messages it was not written for.
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_THOUGHT = "<think>"
_NO_THOUGHT = re.compile(r"(<think>\s*)?</think>\s*\Z")
_MARKS = range(0x10FFFD, 0x100000, -1)  # private code points, other than those that hide markup
_CONTROL = re.compile(r"<[|｜].+[|｜]>")


def render(template: str, values: Mapping[str, Any]) -> str:
    """What a template writes, given its variables. Raises RequestError where it refuses."""
    try:
        return str(_compiled(template).render(values))
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        raise RequestError(f"the chat template refuses these messages: {error}") from error


def said_last(messages: Sequence[Message]) -> str:
    """The text of the last message. Raises RequestError where that is not one which can be continued."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise RequestError("only a last message whose role is assistant can be continued")
    if last.get("tool_calls"):
        raise RequestError("a last message with tool calls cannot be continued")
    text = last.get("content")
    if not isinstance(text, str):
        raise RequestError("only a last message whose content is text can be continued")
    return text


def left_open(messages: Sequence[Message], said: str, render: Render) -> str:
    """What a template writes before the text `said` of the last message, so that the prompt can end with it.

    No reasoning that a template inserts (an empty `<think></think>`) stays before a text that begins with its own.
    Raises RequestError for a template that drops or rewrites the text, or has it within reasoning or before it.
    """
    whole = render(messages)
    before, after = _around(messages, whole, render)
    thinks = said.lstrip().startswith(_THOUGHT)
    if thinks:
        before = _NO_THOUGHT.sub("", before)
    kept = whole.startswith(before) and whole[len(before) :].lstrip().startswith(said.strip())
    if not kept and not thinks and said.strip():
        raise RequestError("this chat template rewrites the last message, so it cannot be continued")
    if before.rstrip().endswith(_THOUGHT) or _THOUGHT in after:
        raise RequestError("this chat template opens reasoning around the last message, so it cannot be continued")
    return before


def turn_end(added: re.Pattern[str], render: Render) -> str | None:
    """The added token that a template writes right after what the assistant says; None where there is none, or it cannot
    be seen.

    `added` splits text at the added tokens. A token that opens a turn, as far as its place shows, ends none.
    """
    asked = chr(_MARKS[-1])
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "x"}]
    try:
        before, after = _around(messages, render(messages), render)
    except RequestError:
        return None
    first, *rest = added.split(after.lstrip())
    if first or not rest or rest[1][:1].strip():  # a name follows what opens a turn, as in <|im_start|>user
        return None
    openers = [added.split(part.rstrip())[-2:] for part in before.split(asked)]
    return None if [rest[0], ""] in openers else rest[0]


def looks_like_control(token: str) -> bool:
    """Whether an added token is written as those are that no text is meant to hold."""
    return _CONTROL.fullmatch(token) is not None


def _around(messages: Sequence[Message], whole: str, render: Render) -> tuple[str, str]:
    """What a template writes before and after the last message's content; `whole` is what it writes with it."""
    mark = next(chr(code) for code in _MARKS if chr(code) not in whole)
    before, found, after = render([*messages[:-1], {**messages[-1], "content": mark}]).partition(mark)
    if not found or mark in after:
        raise RequestError("this chat template does not write the last message once, so it cannot be continued")
    return before, after


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks, for training, what the assistant says; here it is nothing but its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(template: str) -> jinja2.Template:
    """The template in the sandbox, with the filters and functions that templates written for transformers expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, **options)
        if not ensure_ascii:
            return text
        # all but the private characters, which may be stand-ins that have to be found again
        return re.sub("[^\0-\x7f\U000f0000-\U000ffffd]", lambda found: json.dumps(found[0])[1:-1], text)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
