"""Reasoning that a model writes before its answer, taken off the front of it."""

from __future__ import annotations

from paceline.serve.tools.events import Event, Parser, Thought
from paceline.serve.tools.reader import Cut, Reader, Steps, Trimmer

BEGIN, END = "<think>", "</think>"


class ThoughtParser:
    """What comes up to `</think>` is reasoning, where the output begins with `<think>` or, as `inside` says, the prompt
    ended with it. The rest goes to `answer`. Markers of calls within reasoning are reasoning.

    White space at both ends of the reasoning, and next to its markers, is dropped, but not before reasoning that the prompt
    has `begun`. Reasoning that does not end is reasoning to the last character.
    """

    def __init__(self, answer: Parser, inside: bool, begun: bool = False) -> None:
        self._answer = answer
        self._inside = inside
        self._begun = begun
        self._reader = Reader()
        self._trimmer = Trimmer(at_start=not begun)
        self._events: list[Event] = []
        self._steps = self._parse()
        self._answering = False

    def feed(self, text: str) -> list[Event]:
        if self._answering:
            return self._answer.feed(text)
        self._reader.add(text)
        next(self._steps, None)
        return self._release()

    def finish(self) -> list[Event]:
        if not self._answering:
            self._reader.end()
            next(self._steps, None)
        return self._release() + self._answer.finish()

    def _parse(self) -> Steps[None]:
        reader, thinking, thought = self._reader, self._inside, False
        try:
            if not self._begun:
                yield from reader.space()
                thinking = bool((yield from reader.literal(BEGIN))) or thinking
            if thinking:
                reader.taken.clear()
                yield from reader.stream((END,), self._think)
                thinking, thought = False, True
                yield from reader.space()
                reader.taken.clear()
        except Cut:
            rest = reader.rest()
            if thinking:
                self._think(rest)
            elif not thought:
                self._events += self._answer.feed(rest)
        else:
            self._events += self._answer.feed(reader.rest())
        self._answering = True

    def _think(self, text: str) -> None:
        if given := self._trimmer.feed(text):
            self._events.append(Thought(given))

    def _release(self) -> list[Event]:
        events, self._events = self._events, []
        return events
