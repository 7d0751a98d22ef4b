"""The call format of MiniMax-M2."""

from __future__ import annotations

from paceline.serve.tools.tagged import TaggedParser


class MiniMaxParser(TaggedParser):
    """`<minimax:tool_call>`, calls as `<invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>`, and
    `</minimax:tool_call>`."""

    begin, end = "<minimax:tool_call>", "</minimax:tool_call>"
    function, function_end = ('<invoke name="', '">'), "</invoke>"
    parameter, value_end = ('<parameter name="', '">'), "</parameter>"
