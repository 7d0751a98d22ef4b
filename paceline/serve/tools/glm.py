"""The call format of GLM 4.5 to 4.7."""

from __future__ import annotations

from paceline.serve.tools.tagged import TaggedParser


class GlmParser(TaggedParser):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`, on one line or on several."""

    begin, end = "<tool_call>", "</tool_call>"
    function, function_end = (), ""
    parameter, value_end = ("<arg_key>", "</arg_key>", "<arg_value>"), "</arg_value>"
