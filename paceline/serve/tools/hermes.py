"""Calls as Qwen 2.5 and 3 and Hermes write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json

from paceline.serve.tools.calls import CallParser, made_call, read_object
from paceline.serve.tools.events import Call, Schemas
from paceline.serve.tools.reader import Cut, Malformed, Steps

_END = "</tool_call>"
_TOOLS, _TOOLS_END = "<tools>", "</tools>"
_FENCE = "```"


class HermesParser(CallParser):
    """The end of the object is found by its brackets, so markers within its strings are part of them.

    Qwen2.5-Coder, taught the tags, mostly writes the object alone, in a fence of Markdown, or in `<tools>`. There it is a
    call where it holds the name of one of the tools, then arguments, and nothing else. Alone or in a fence it must begin
    a line, and nothing but further calls may follow: an object that is explained afterwards is an example. Its template
    shows the braces of the object doubled, and so it may write them.
    """

    begin = "<tool_call>"
    flaws = ("{", _FENCE, _TOOLS)

    def __init__(self, schemas: Schemas, only_taught: bool = False) -> None:
        super().__init__(schemas, only_taught or not schemas)
        self._names = tuple(json.dumps(each, ensure_ascii=False) for each in schemas)
        self._begins_line = True
        self._fenced = False

    def section(self) -> Steps[None]:
        reader = self.reader
        marker = reader.taken[0]
        calls: list[Call] = []
        while True:
            calls += yield from self._calls(marker)
            num_pieces = len(reader.taken)
            if reader.taken[-1] in (_END, _TOOLS_END):
                break
            try:
                yield from reader.space()
            except Cut:
                break
            marker = yield from reader.literal(self.begin, *self.flaws, _END)
            if marker == _END:
                num_pieces = len(reader.taken)
                break
            if not marker:
                raise Malformed
        for each in calls:
            self.give(each, num_pieces)
            num_pieces = 0
        self._begins_line = True

    def _say(self, text: str) -> None:
        _, newline, line = text.rpartition("\n")
        self._begins_line = not line.strip() and (bool(newline) or self._begins_line)
        super()._say(text)

    def _calls(self, marker: str) -> Steps[list[Call]]:
        """The calls that begin with `marker`, which is taken. Raises Malformed where none do."""
        if marker == self.begin:
            return [(yield from self._taught())]
        if marker == _TOOLS:
            return (yield from self._objects(_TOOLS_END))
        if marker == _FENCE:
            return (yield from self._fence())
        if self._fenced or not self._begins_line:
            raise Malformed
        return [(yield from self._object())]

    def _fence(self) -> Steps[list[Call]]:
        """The calls in a fence that begins here. Raises Malformed where it holds something else, or another one ends."""
        if self._fenced and self._begins_line:
            self._fenced = not (yield from self.reader.peek()).isspace()
            raise Malformed
        self._fenced = not self._fenced
        if not (self._fenced and self._begins_line):
            raise Malformed
        yield from self.reader.literal("json")
        calls = yield from self._objects(_FENCE)
        self._fenced = False
        return calls

    def _taught(self) -> Steps[Call]:
        yield from self.reader.space()
        text = yield from self.reader.json_object()
        yield from self.reader.space()
        if not (yield from self.reader.literal(_END)):
            raise Malformed
        value = read_object(text[1:-1] if text.startswith("{{") else text)
        return made_call(value.get("name"), value.get("arguments", {}))

    def _objects(self, end: str) -> Steps[list[Call]]:
        """One object or more, up to `end`."""
        calls: list[Call] = []
        while True:
            yield from self.reader.space()
            if calls and (yield from self.reader.literal(end)):
                return calls
            if not (yield from self.reader.literal("{")):
                raise Malformed
            calls.append((yield from self._object()))

    def _object(self) -> Steps[Call]:
        """A call behind its `{`, refused at the first character that does not fit, so that other JSON is not held back."""
        name = ""
        end = "}}" if (yield from self.reader.literal("{")) else "}"
        for options in (('"name"',), (":",), self._names, (",",), ('"arguments"',), (":",)):
            yield from self.reader.space()
            found = yield from self.reader.literal(*options)
            if not found:
                raise Malformed
            name = found if options is self._names else name
        yield from self.reader.space()
        arguments = yield from self.reader.json_object()
        yield from self.reader.space()
        if not (yield from self.reader.literal(end)):
            raise Malformed
        return made_call(json.loads(name), read_object(arguments))
