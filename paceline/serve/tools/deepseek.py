"""The call format of DeepSeek V3.1, and the older one of V3 and R1."""

from __future__ import annotations

from paceline.serve.tools.calls import SectionParser, made_call, read_object
from paceline.serve.tools.events import Call
from paceline.serve.tools.reader import ParseSteps


class DeepSeekParser(SectionParser):
    """`<｜tool▁calls▁begin｜>`, calls, `<｜tool▁calls▁end｜>`; a call is
    `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`. In the older format a call has its type before the
    separator, and after it the name, a newline and the object in a Markdown fence.

    The end of the object is found by matching brackets.
    """

    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin = "<｜tool▁call▁begin｜>"

    def call(self) -> ParseSteps[Call]:
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
