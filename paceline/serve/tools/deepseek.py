"""Calls as DeepSeek V3.1 writes them, and V3 and R1 in their older way."""

from __future__ import annotations

from paceline.serve.tools.calls import SectionParser, made_call, read_object
from paceline.serve.tools.events import Call
from paceline.serve.tools.reader import Steps


class DeepSeekParser(SectionParser):
    """`<｜tool▁calls▁begin｜>`, calls, `<｜tool▁calls▁end｜>`; a call is
    `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`, or in the older way has its type before the separator
    and behind it the name, a line's end and the object in a fence of Markdown.

    The end of the object is found by its brackets.
    """

    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin = "<｜tool▁call▁begin｜>"

    def call(self) -> Steps[Call]:
        reader = self.reader
        name = yield from reader.word()
        yield from self.expect("<｜tool▁sep｜>")
        fenced = (yield from reader.peek()) != "{"
        if fenced:
            name = yield from reader.word()
            yield from self.expect("\n```json\n")
        text = yield from reader.json_object()
        if fenced:
            yield from self.expect("\n```")
        yield from reader.space()
        yield from self.expect("<｜tool▁call▁end｜>")
        return made_call(name.strip(), read_object(text))
