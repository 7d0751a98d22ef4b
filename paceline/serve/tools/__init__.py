"""Tool calls and reasoning in what a model writes: one incremental parser a format, chosen by the chat template."""

from __future__ import annotations

import re
from functools import cache

from paceline.serve.tools.calls import CallParser
from paceline.serve.tools.deepseek import DeepSeekParser
from paceline.serve.tools.dsml import Dsml4Parser, DsmlParser
from paceline.serve.tools.events import Call, Event, Parser, PlainParser, Schemas, Text, Thought
from paceline.serve.tools.glm import GlmParser
from paceline.serve.tools.hermes import HermesParser
from paceline.serve.tools.kimi import KimiParser
from paceline.serve.tools.minimax import MiniMaxParser
from paceline.serve.tools.qwen_coder import QwenCoderParser
from paceline.serve.tools.thoughts import ThoughtParser

__all__ = [
    "Call",
    "CallParser",
    "DeepSeekParser",
    "Dsml4Parser",
    "DsmlParser",
    "Event",
    "GlmParser",
    "HermesParser",
    "KimiParser",
    "MiniMaxParser",
    "Parser",
    "PlainParser",
    "QwenCoderParser",
    "Schemas",
    "Text",
    "Thought",
    "ThoughtParser",
    "parser_for",
    "thinks",
]

# What a template must hold, in the order in which they are looked for: several formats share a marker.
_TAUGHT: tuple[tuple[re.Pattern[str], type[CallParser]], ...] = (
    (re.compile("｜DSML｜(?s:.*)function_calls>"), DsmlParser),
    (re.compile("｜DSML｜(?s:.*)tool_calls>"), Dsml4Parser),
    (re.compile("<｜tool▁calls▁begin｜>"), DeepSeekParser),
    (re.compile(r"<\|tool_calls_section_begin\|>"), KimiParser),
    (re.compile("<minimax:tool_call>"), MiniMaxParser),
    (re.compile("<tool_call>(?s:.*)<arg_key>"), GlmParser),
    (re.compile("<tool_call>(?s:.*)<function="), QwenCoderParser),
    (re.compile(r"<tool_call>(\s|\\n)*\{"), HermesParser),
)


@cache
def parser_for(chat_template: str | None) -> type[CallParser] | None:
    """The parser of the format that a chat template teaches; None where it teaches none that is known.

    It is made with the tools' schemas: name to JSON schema of the parameters.
    """
    return next((kind for taught, kind in _TAUGHT if taught.search(chat_template or "")), None)


def thinks(chat_template: str | None) -> bool:
    """Whether a chat template knows reasoning."""
    return "</think>" in (chat_template or "")
