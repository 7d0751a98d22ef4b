"""Chat templates: rendering in a sandbox, prompts that continue the last message, and the token that ends a turn."""

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

ChatMessage = Mapping[str, Any]
Render = Callable[[Sequence[ChatMessage]], str]

# what Python raises inside a template that is given messages it was not written for
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_THINK_TAG = "<think>"
_EMPTY_THINKING = re.compile(r"(<think>\s*)?</think>\s*\Z")
_PLACEHOLDERS = range(0x10FFFD, 0x100000, -1)  # private code points that special_tokens.py does not use
_CONTROL = re.compile(r"<[|｜].+[|｜]>")


def render(template: str, values: Mapping[str, Any]) -> str:
    """Renders a template with its variables. Raises RequestError if it fails or refuses the messages."""
    try:
        return str(_compiled(template).render(values))
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        raise RequestError(f"the chat template refuses these messages: {error}") from error


def text_to_continue(messages: Sequence[ChatMessage]) -> str:
    """The text of the last message. Raises RequestError if that message cannot be continued."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise RequestError("only a last message whose role is assistant can be continued")
    if last.get("tool_calls"):
        raise RequestError("a last message with tool calls cannot be continued")
    text = last.get("content")
    if not isinstance(text, str):
        raise RequestError("only a last message whose content is text can be continued")
    return text


def prompt_before(messages: Sequence[ChatMessage], text: str, render: Render) -> str:
    """What a template writes before `text`, the last message's: the prompt to which that text can be appended.

    Empty reasoning that a template inserts (`<think></think>`) is removed before a text that begins with its own reasoning.
    Raises RequestError for a template that drops or rewrites the text, or that puts it inside or before reasoning.
    """
    whole = render(messages)
    before, after = _around_last_content(messages, whole, render)
    begins_with_thinking = text.lstrip().startswith(_THINK_TAG)
    if begins_with_thinking:
        before = _EMPTY_THINKING.sub("", before)
    is_unchanged = whole.startswith(before) and whole[len(before) :].lstrip().startswith(text.strip())
    if not is_unchanged and not begins_with_thinking and text.strip():
        raise RequestError("this chat template rewrites the last message, so it cannot be continued")
    if before.rstrip().endswith(_THINK_TAG) or _THINK_TAG in after:
        raise RequestError("this chat template opens reasoning around the last message, so it cannot be continued")
    return before


def turn_end_token(added: re.Pattern[str], render: Render) -> str | None:
    """The added token that a template writes directly after an assistant's text; None if there is none or it is unclear.

    `added` splits text at the added tokens. A token that opens a turn does not count, so far as its place shows that.
    """
    placeholder = chr(_PLACEHOLDERS[-1])
    messages = [{"role": "user", "content": placeholder}, {"role": "assistant", "content": "x"}]
    try:
        before, after = _around_last_content(messages, render(messages), render)
    except RequestError:
        return None
    first, *rest = added.split(after.lstrip())
    if first or not rest or rest[1][:1].strip():  # a role follows a token that opens a turn, as in <|im_start|>user
        return None
    openers = [added.split(part.rstrip())[-2:] for part in before.split(placeholder)]
    return None if [rest[0], ""] in openers else rest[0]


def looks_like_control(token: str) -> bool:
    """Whether an added token has the form of a control token, such as `<|im_end|>`, which ordinary text never holds."""
    return _CONTROL.fullmatch(token) is not None


def _around_last_content(messages: Sequence[ChatMessage], whole: str, render: Render) -> tuple[str, str]:
    """What a template writes before and after the last message's content. `whole` is the whole chat as it writes it."""
    placeholder = next(chr(code) for code in _PLACEHOLDERS if chr(code) not in whole)
    before, found, after = render([*messages[:-1], {**messages[-1], "content": placeholder}]).partition(placeholder)
    if not found or placeholder in after:
        raise RequestError("this chat template does not write the last message once, so it cannot be continued")
    return before, after


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training. Here it only renders its content."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compiled(template: str) -> jinja2.Template:
    """The template, compiled in a sandbox that has the filters and functions of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, **options)
        if not ensure_ascii:
            return text
        # private characters stay as they are: they may be stand-ins, which have to be found again
        return re.sub("[^\0-\x7f\U000f0000-\U000ffffd]", lambda found: json.dumps(found[0])[1:-1], text)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template)
