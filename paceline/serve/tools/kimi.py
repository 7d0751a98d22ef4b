"""The call format of Kimi K2."""

from __future__ import annotations

import re

from paceline.serve.tools.calls import SectionParser, made_call, read_object
from paceline.serve.tools.events import Call
from paceline.serve.tools.reader import Malformed, ParseSteps

_IDENTITY = re.compile(r"(?:functions\.)?(.+):\d+")


class KimiParser(SectionParser):
    """`<|tool_calls_section_begin|>`, calls, `<|tool_calls_section_end|>`; a call is
    `<|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>{…}<|tool_call_end|>`.

    NUMBER counts the conversation's calls.
    """

    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call_begin = "<|tool_call_begin|>"

    def call(self) -> ParseSteps[Call]:
        named = _IDENTITY.fullmatch((yield from self.reader.word()).strip())
        if not named:
            raise Malformed
        yield from self.expect("<|tool_call_argument_begin|>")
        yield from self.reader.space()
        text = yield from self.reader.json_object()
        yield from self.reader.space()
        yield from self.expect("<|tool_call_end|>")
        return made_call(named[1], read_object(text))
