"""What the parsers of all formats share: text outside of calls, and a call's way from what was read to the event."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, ClassVar

from paceline.serve.tools.events import Call, Event, Schemas, Text
from paceline.serve.tools.reader import Cut, Malformed, Reader, Steps, Trimmer

_LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot hold: it stays escaped


class CallParser(ABC):
    """Text up to `begin`, then calls, and so on. Raises nothing: what is no call is text.

    `flaws` are what calls begin with where a model forgets `begin`; with `only_taught` those are text.
    """

    begin: ClassVar[str]
    flaws: ClassVar[tuple[str, ...]] = ()

    def __init__(self, schemas: Schemas, only_taught: bool = False) -> None:
        self.schemas = schemas
        self._markers = (self.begin,) if only_taught else (self.begin, *self.flaws)
        self.reader = Reader()
        self._events: list[Event] = []
        self._trimmer = Trimmer()
        self._steps = self._parse()

    def feed(self, text: str) -> list[Event]:
        self.reader.add(text)
        next(self._steps)
        return self._release()

    def finish(self) -> list[Event]:
        """The rest; a call that was begun and not ended is text."""
        self.reader.end()
        next(self._steps, None)
        return self._release()

    @abstractmethod
    def section(self) -> Steps[None]:
        """Reads what comes after `begin` or a flaw, which is the first piece in the reader's `taken`; gives each call.

        Raises Malformed where what was taken since the last call is no call; what is left there becomes text.
        """

    def give(self, call: Call, num_pieces: int | None = None) -> None:
        """Gives a call that was read from the first `num_pieces` taken, or from all."""
        del self.reader.taken[:num_pieces]
        self._trimmer.drop()
        self._trimmer.at_start = True
        self._events.append(call)

    def _parse(self) -> Steps[None]:
        try:
            while True:
                yield from self.reader.stream(self._markers, self._say)
                with suppress(Malformed):
                    yield from self.section()
                self._say("".join(self.reader.taken))
                self.reader.taken.clear()
        except Cut:
            self._say(self.reader.rest())
            space = self._trimmer.drop()
            if space and not self._trimmer.at_start:
                self._events.append(Text(space))

    def _say(self, text: str) -> None:
        if given := self._trimmer.feed(text):
            self._events.append(Text(given))

    def _release(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class SectionParser(CallParser):
    """Calls between `begin` and `end`, each behind its `call_begin`.

    Each call comes when it is whole; what follows it within the section and is none is text.
    """

    end: ClassVar[str]
    call_begin: ClassVar[str]

    @abstractmethod
    def call(self) -> Steps[Call]:
        """Reads a call behind `call_begin`. Raises Malformed where there is none."""

    def section(self) -> Steps[None]:
        given = False
        yield from self.reader.space()
        while (marker := (yield from self.reader.literal(self.call_begin, self.end))) == self.call_begin:
            self.give((yield from self.call()))
            given = True
            yield from self.reader.space()
        if not marker or not given:
            raise Malformed
        self.reader.taken.clear()

    def expect(self, marker: str) -> Steps[None]:
        """Takes `marker`. Raises Malformed where something else comes."""
        if not (yield from self.reader.literal(marker)):
            raise Malformed


def made_call(name: Any, arguments: Any) -> Call:
    """Raises Malformed where the name is no text, the arguments are no object, or JSON cannot hold them."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise Malformed
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        name.encode()
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return Call(name, json.dumps(arguments) if _LONE.search(written) else written)


def read_object(text: str) -> dict[str, Any]:
    """Raises Malformed where the text is no JSON object."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    if not isinstance(value, dict):
        raise Malformed
    return value
