"""The call format of DeepSeek V3.2 and V4, a markup of their own."""

from __future__ import annotations

from typing import Any

from paceline.serve.tools.reader import ParseSteps
from paceline.serve.tools.tagged import TaggedParser
from paceline.serve.tools.values import parsed

_TEXT, _JSON = '" string="true">', '" string="false">'


class DsmlParser(TaggedParser):
    """DeepSeek V3.2: `<｜DSML｜function_calls>`, calls as `<｜DSML｜invoke name="NAME">` with
    `<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>` and `</｜DSML｜invoke>`, and the end.

    The attribute `string` says whether a value is text or JSON; the schema is not used.
    """

    begin, end = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    function, function_end = ('<｜DSML｜invoke name="', '">'), "</｜DSML｜invoke>"
    parameter, value_end = ('<｜DSML｜parameter name="',), "</｜DSML｜parameter>"

    def _form(self) -> ParseSteps[str | None]:
        return (yield from self.reader.literal(_TEXT, _JSON)) or None

    def _read(self, text: str, function: str, key: str, form: str) -> Any:
        return text if form == _TEXT else parsed(text)


class Dsml4Parser(DsmlParser):
    """DeepSeek V4: the same between `<｜DSML｜tool_calls>` and `</｜DSML｜tool_calls>`."""

    begin, end = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
