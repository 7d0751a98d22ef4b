"""The events of a parsed output: text, reasoning and tool calls, and the contract of their parsers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Schemas = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class ReasoningText:
    """Reasoning before the answer, without its markers."""

    text: str


@dataclass(frozen=True)
class Call:
    """A complete, well-formed call. `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Event = Text | ReasoningText | Call


class Parser(Protocol):
    """Parses text that is fed in pieces of any size. The events, with text merged, do not depend on the pieces.

    Calls are emitted complete. Malformed and truncated calls are emitted as text. White space next to calls is dropped.
    """

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainParser:
    """A parser without calls: all output is text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []
