"""What a model writes, taken apart: text, reasoning and tool calls, and what every parser of them promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Schemas = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Thought:
    """Reasoning that comes before the answer, without its markers."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call that is whole and well formed. `arguments` is a JSON object as text."""

    name: str
    arguments: str


Event = Text | Thought | Call


class Parser(Protocol):
    """Feeds on text in pieces of any size; what comes out, texts joined, does not depend on the pieces.

    Calls come whole. Malformed and cut-off calls come out as the text they are. White space next to calls is dropped.
    """

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


class PlainParser:
    """No calls: text stays text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []
