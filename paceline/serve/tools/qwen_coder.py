"""The call format of Qwen3-Coder, Qwen 3.5 and later."""

from __future__ import annotations

from paceline.serve.tools.tagged import TaggedParser


class QwenCoderParser(TaggedParser):
    """`<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`.

    Qwen3-Coder often omits the `<tool_call>` after a sentence of text.
    """

    begin, end = "<tool_call>", "</tool_call>"
    function, function_end = ("<function=", ">"), "</function>"
    parameter, value_end = ("<parameter=", ">"), "</parameter>"
    frame = "\n"
    alternative_begins = ("<function=",)
