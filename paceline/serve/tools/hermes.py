"""The call format of Qwen 2.5, Qwen 3 and Hermes: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

import json

from paceline.serve.tools.calls import CallParser, made_call, read_object
from paceline.serve.tools.events import Call, Schemas
from paceline.serve.tools.reader import Malformed, OutOfText, ParseSteps

_END = "</tool_call>"
_TOOLS, _TOOLS_END = "<tools>", "</tools>"
_FENCE = "```"


class HermesParser(CallParser):
    """Parses JSON calls in tags, and JSON calls without tags.

    The end of the object is found by matching brackets, so that markers within its strings are part of them.

    Qwen2.5-Coder mostly omits the tags of its template and writes the object alone, in a Markdown fence, or in `<tools>`.
    Such an object is a call if it has the name of one of the tools, then arguments, and nothing else. Alone or in a fence
    it must begin a line, and only further calls may follow: an object with text after it is an example. The object's
    braces may be doubled, as the template shows them.
    """

    begin = "<tool_call>"
    alternative_begins = ("{", _FENCE, _TOOLS)

    def __init__(self, schemas: Schemas, only_template_format: bool = False) -> None:
        super().__init__(schemas, only_template_format or not schemas)
        self._names = tuple(json.dumps(each, ensure_ascii=False) for each in schemas)
        self._begins_line = True
        self._fenced = False

    def section(self) -> ParseSteps[None]:
        reader = self.reader
        marker = reader.consumed[0]
        calls: list[Call] = []
        while True:
            calls += yield from self._calls(marker)
            num_pieces = len(reader.consumed)
            if reader.consumed[-1] in (_END, _TOOLS_END):
                break
            try:
                yield from reader.space()
            except OutOfText:
                break
            marker = yield from reader.literal(self.begin, *self.alternative_begins, _END)
            if marker == _END:
                num_pieces = len(reader.consumed)
                break
            if not marker:
                raise Malformed
        for each in calls:
            self.emit_call(each, num_pieces)
            num_pieces = 0
        self._begins_line = True

    def emit_text(self, text: str) -> None:
        _, newline, line = text.rpartition("\n")
        self._begins_line = not line.strip() and (bool(newline) or self._begins_line)
        super().emit_text(text)

    def _calls(self, marker: str) -> ParseSteps[list[Call]]:
        """The calls that begin with `marker`, which is consumed. Raises Malformed if there are none."""
        if marker == self.begin:
            return [(yield from self._tagged_call())]
        if marker == _TOOLS:
            return (yield from self._objects(_TOOLS_END))
        if marker == _FENCE:
            return (yield from self._fence())
        if self._fenced or not self._begins_line:
            raise Malformed
        return [(yield from self._object())]

    def _fence(self) -> ParseSteps[list[Call]]:
        """The calls in a fence that begins here. Raises Malformed if it has other content, or if a fence ends here."""
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

    def _tagged_call(self) -> ParseSteps[Call]:
        yield from self.reader.space()
        text = yield from self.reader.json_object()
        yield from self.reader.space()
        if not (yield from self.reader.literal(_END)):
            raise Malformed
        value = read_object(text[1:-1] if text.startswith("{{") else text)
        return made_call(value.get("name"), value.get("arguments", {}))

    def _objects(self, end: str) -> ParseSteps[list[Call]]:
        """One or more calls, up to `end`."""
        calls: list[Call] = []
        while True:
            yield from self.reader.space()
            if calls and (yield from self.reader.literal(end)):
                return calls
            if not (yield from self.reader.literal("{")):
                raise Malformed
            calls.append((yield from self._object()))

    def _object(self) -> ParseSteps[Call]:
        """A call after its `{`. Raises Malformed at the first character that does not match, so that streaming of other JSON
        is not delayed.
        """
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
