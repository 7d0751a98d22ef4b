"""Calls as DeepSeek V3.1 writes them, and V3 and R1 in their older way."""

from __future__ import annotations

from paceline.serve.tools.calls import CallParser, made_call, read_object
from paceline.serve.tools.events import Call
from paceline.serve.tools.reader import Malformed, Steps

_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_END = "<｜tool▁calls▁end｜>"


class DeepSeekParser(CallParser):
    """`<｜tool▁calls▁begin｜>`, calls, `<｜tool▁calls▁end｜>`; a call is
    `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, or in the older way has its type before the separator
    and behind it the name, a line's end and the object in a fence of Markdown.

    The end of the object is found by its brackets. Each call comes when it is whole; what follows it within the
    markers and is none is text.
    """

    begin = "<｜tool▁calls▁begin｜>"

    def section(self) -> Steps[None]:
        given = False
        yield from self.reader.space()
        while (marker := (yield from self.reader.literal(_CALL, _END))) == _CALL:
            self.give((yield from self._call()))
            given = True
            yield from self.reader.space()
        if not marker or not given:
            raise Malformed
        self.reader.taken.clear()

    def _call(self) -> Steps[Call]:
        reader = self.reader
        name = yield from reader.word()
        yield from self._expect(_SEPARATOR)
        fenced = (yield from reader.peek()) != "{"
        if fenced:
            name = yield from reader.word()
            yield from self._expect("\n```json\n")
        text = yield from reader.json_object()
        if fenced:
            yield from self._expect("\n```")
        yield from reader.space()
        yield from self._expect(_CALL_END)
        return made_call(name.strip(), read_object(text))

    def _expect(self, marker: str) -> Steps[None]:
        if not (yield from self.reader.literal(marker)):
            raise Malformed
