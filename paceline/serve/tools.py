"""Tool calls in what a model writes: one incremental parser a format, chosen by the chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Call:
    """A call that is whole and well formed. `arguments` is a JSON object as text."""

    name: str
    arguments: str


Event = Text | Call


class Parser(Protocol):
    """Feeds on text in pieces of any size; what comes out, texts joined, does not depend on the pieces.

    Calls come whole. Malformed and cut-off calls come out as the text they are. White space next to calls is dropped.
    """

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainParser:
    """No calls: text stays text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SPACE = re.compile(r"\s*")


class HermesParser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, the form of Qwen 2.5 and 3 and of Hermes.

    The end of the object is found by its brackets, so markers within its strings are part of them. `_held` is what is
    undecided: white space and perhaps the beginning of a marker, or a call from the white space before it on. In a call
    `_place` is how far its object has been scanned, `_depth` how many brackets are open there, `_in_string` whether
    it is within a string.
    """

    def __init__(self) -> None:
        self._held = ""
        self._in_call = False
        self._place = -1
        self._depth = 0
        self._in_string = False
        self._after_call = False

    def feed(self, text: str) -> list[Event]:
        self._held += text
        events: list[Event] = []
        while self._advance_call(events) if self._in_call else self._advance_text(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The rest; a call that was begun and not ended is text."""
        text, self._held = self._held, ""
        if not self._in_call and self._after_call and not text.strip():
            text = ""
        self._in_call = False
        return [Text(text)] if text else []

    def _advance_text(self, events: list[Event]) -> bool:
        """Gives out text up to a marker; True where there is one."""
        found = self._held.find(_OPEN)
        end = found if found >= 0 else len(self._held) - _overlap(self._held, _OPEN)
        self._say(len(self._held[:end].rstrip()), events)
        self._in_call, self._place = found >= 0, -1
        return self._in_call

    def _advance_call(self, events: list[Event]) -> bool:
        """Gives out the call at the start of `_held`, or the text it turns out to be; False while that is open."""
        held = self._held
        if self._place < 0:
            start = _skip_space(held, held.index(_OPEN) + len(_OPEN))
            if start == len(held):
                return False
            if held[start] != "{":
                return self._give_up(start, events)
            self._place, self._depth, self._in_string = start, 0, False
        if not self._scan():
            return False
        end = _skip_space(held, self._place)
        rest = held[end : end + len(_CLOSE)]
        if len(rest) < len(_CLOSE) and _CLOSE.startswith(rest):
            return False
        call = _read_call(held[held.index("{") : self._place]) if rest == _CLOSE else None
        if call is None:
            return self._give_up(self._place, events)
        events.append(call)
        self._held = held[end + len(_CLOSE) :]
        self._in_call, self._after_call = False, True
        return True

    def _scan(self) -> bool:
        """Moves `_place` to behind the object; False where its end has not come yet."""
        held = self._held
        while self._depth or held[self._place - 1] not in "}]":
            found = (_IN_STRING if self._in_string else _STRUCTURE).search(held, self._place)
            if found is None:
                self._place = len(held)
                return False
            if found[0] == "\\":
                if found.end() == len(held):
                    self._place = found.start()
                    return False
                self._place = found.end() + 1
                continue
            self._place = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    return True
        return True

    def _give_up(self, end: int, events: list[Event]) -> bool:
        self._in_call = False
        self._say(end, events)
        return True

    def _say(self, end: int, events: list[Event]) -> None:
        if end:
            events.append(Text(self._held[:end]))
            self._held = self._held[end:]
            self._after_call = False


def _read_call(text: str) -> Call | None:
    """The call that a JSON object is; None where it is none."""
    try:
        value: Any = json.loads(text, strict=False)
        name, arguments = value["name"], value.get("arguments", {})
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        name.encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    lone = any("\ud800" <= character <= "\udfff" for character in written)
    return Call(name, json.dumps(arguments) if lone else written)


def _skip_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that begins `marker`."""
    return next((size for size in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:size])), 0)


_OTHER_BODIES = ("<function=", "<arg_key>")  # formats that share the marker but not what stands in it


def parser_for(chat_template: str | None) -> type[Parser] | None:
    """The parser of the format that a chat template teaches; None where it teaches none that is known."""
    template = chat_template or ""
    if _OPEN in template and not any(body in template for body in _OTHER_BODIES):
        return HermesParser
    return None
