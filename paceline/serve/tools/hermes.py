"""Calls as Qwen 2.5 and 3 and Hermes write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from paceline.serve.tools.calls import CallParser, made_call, read_object
from paceline.serve.tools.reader import Malformed, Steps


class HermesParser(CallParser):
    """The end of the object is found by its brackets, so markers within its strings are part of them."""

    begin = "<tool_call>"

    def section(self) -> Steps[None]:
        yield from self.reader.space()
        text = yield from self.reader.json_object()
        yield from self.reader.space()
        if not (yield from self.reader.literal("</tool_call>")):
            raise Malformed
        value = read_object(text)
        self.give(made_call(value.get("name"), value.get("arguments", {})))
