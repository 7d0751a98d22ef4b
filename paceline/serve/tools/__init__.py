"""Parses tool calls and reasoning in a model's output: an incremental parser for each format, chosen by the chat template."""

from __future__ import annotations

import re
from functools import cache

from paceline.serve.tools.calls import CallParser
from paceline.serve.tools.deepseek import DeepSeekParser
from paceline.serve.tools.dsml import Dsml4Parser, DsmlParser
from paceline.serve.tools.events import Call, Event, Parser, PlainParser, ReasoningText, Schemas, Text
from paceline.serve.tools.glm import GlmParser
from paceline.serve.tools.hermes import HermesParser
from paceline.serve.tools.kimi import KimiParser
from paceline.serve.tools.minimax import MiniMaxParser
from paceline.serve.tools.qwen_coder import QwenCoderParser
from paceline.serve.tools.reasoning import ReasoningParser

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
    "ReasoningParser",
    "ReasoningText",
    "Schemas",
    "Text",
    "has_reasoning",
    "parser_for",
]

# Formats by what their chat templates contain. The order matters, as several formats share a marker.
_TEMPLATE_PATTERNS: tuple[tuple[re.Pattern[str], type[CallParser]], ...] = (
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
    """The parser class of the call format in a chat template; None if it has none that is known.

    The class is constructed with the tools' schemas: name to JSON schema of the parameters.
    """
    return next((kind for pattern, kind in _TEMPLATE_PATTERNS if pattern.search(chat_template or "")), None)


def has_reasoning(chat_template: str | None) -> bool:
    """Whether a chat template supports reasoning."""
    return "</think>" in (chat_template or "")
