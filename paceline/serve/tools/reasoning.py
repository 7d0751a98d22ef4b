"""Separates the reasoning that a model writes before its answer."""

from __future__ import annotations

from paceline.serve.tools.events import Event, Parser, ReasoningText
from paceline.serve.tools.reader import OutOfText, ParseSteps, Reader, Trimmer

BEGIN, END = "<think>", "</think>"


class ReasoningParser:
    """Parses reasoning up to `</think>`, if the output begins with `<think>` or the prompt ended with it (`inside`). The
    rest goes to the parser `answer`. Call markers within reasoning are reasoning.

    White space at both ends of the reasoning and next to its markers is dropped; leading white space is kept if the output
    continues a message (`continued`). Reasoning that does not end extends to the last character.
    """

    def __init__(self, answer: Parser, inside: bool, continued: bool = False) -> None:
        self._answer = answer
        self._inside = inside
        self._continued = continued
        self._reader = Reader()
        self._trimmer = Trimmer(at_start=not continued)
        self._events: list[Event] = []
        self._parser = self._parse()
        self._answering = False

    def feed(self, text: str) -> list[Event]:
        if self._answering:
            return self._answer.feed(text)
        self._reader.add(text)
        next(self._parser, None)
        return self._release()

    def finish(self) -> list[Event]:
        if not self._answering:
            self._reader.end()
            next(self._parser, None)
        return self._release() + self._answer.finish()

    def _parse(self) -> ParseSteps[None]:
        reader, thinking, closed = self._reader, self._inside, False
        try:
            if not self._continued:
                yield from reader.space()
                thinking = bool((yield from reader.literal(BEGIN))) or thinking
            if thinking:
                reader.consumed.clear()
                yield from reader.stream((END,), self._emit_reasoning)
                thinking, closed = False, True
                yield from reader.space()
                reader.consumed.clear()
        except OutOfText:
            rest = reader.rest()
            if thinking:
                self._emit_reasoning(rest)
            elif not closed:
                self._events += self._answer.feed(rest)
        else:
            self._events += self._answer.feed(reader.rest())
        self._answering = True

    def _emit_reasoning(self, text: str) -> None:
        if emitted := self._trimmer.feed(text):
            self._events.append(ReasoningText(emitted))

    def _release(self) -> list[Event]:
        events, self._events = self._events, []
        return events
