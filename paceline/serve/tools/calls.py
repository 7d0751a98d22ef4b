"""What the parsers of all call formats share: text outside of calls, and making Call events."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, ClassVar

from paceline.serve.tools.events import Call, Event, Schemas, Text
from paceline.serve.tools.reader import Malformed, OutOfText, ParseSteps, Reader, Trimmer

_LONE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which UTF-8 cannot encode: it stays escaped


class CallParser(ABC):
    """Parses text up to `begin`, then calls, then text again. It raises nothing: malformed calls are text.

    `alternative_begins` also begin a call, for models that forget `begin`; with `only_template_format` they are text.
    """

    begin: ClassVar[str]
    alternative_begins: ClassVar[tuple[str, ...]] = ()

    def __init__(self, schemas: Schemas, only_template_format: bool = False) -> None:
        self.schemas = schemas
        self._markers = (self.begin,) if only_template_format else (self.begin, *self.alternative_begins)
        self.reader = Reader()
        self._events: list[Event] = []
        self._trimmer = Trimmer()
        self._parser = self._parse()

    def feed(self, text: str) -> list[Event]:
        self.reader.add(text)
        next(self._parser)
        return self._release()

    def finish(self) -> list[Event]:
        """The remaining events. An incomplete call is text."""
        self.reader.end()
        next(self._parser, None)
        return self._release()

    @abstractmethod
    def section(self) -> ParseSteps[None]:
        """Parses calls after `begin` or an alternative, which is the first piece in the reader's `consumed`; emits each.

        Raises Malformed if the text consumed since the last call is not a call; that text is then emitted as text.
        """

    def emit_call(self, call: Call, num_pieces: int | None = None) -> None:
        """Emits a call that was parsed from the first `num_pieces` consumed pieces, or from all."""
        del self.reader.consumed[:num_pieces]
        self._trimmer.drop()
        self._trimmer.at_start = True
        self._events.append(call)

    def _parse(self) -> ParseSteps[None]:
        try:
            while True:
                yield from self.reader.stream(self._markers, self.emit_text)
                with suppress(Malformed):
                    yield from self.section()
                self.emit_text("".join(self.reader.consumed))
                self.reader.consumed.clear()
        except OutOfText:
            self.emit_text(self.reader.rest())
            space = self._trimmer.drop()
            if space and not self._trimmer.at_start:
                self._events.append(Text(space))

    def emit_text(self, text: str) -> None:
        if emitted := self._trimmer.feed(text):
            self._events.append(Text(emitted))

    def _release(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class SectionParser(CallParser):
    """Parses calls between `begin` and `end`, each after a `call_begin`.

    Each call is emitted when it is complete. Other content that follows it within the section is text.
    """

    end: ClassVar[str]
    call_begin: ClassVar[str]

    @abstractmethod
    def call(self) -> ParseSteps[Call]:
        """Parses a call after `call_begin`. Raises Malformed if there is none."""

    def section(self) -> ParseSteps[None]:
        emitted = False
        yield from self.reader.space()
        while (marker := (yield from self.reader.literal(self.call_begin, self.end))) == self.call_begin:
            self.emit_call((yield from self.call()))
            emitted = True
            yield from self.reader.space()
        if not marker or not emitted:
            raise Malformed
        self.reader.consumed.clear()

    def expect(self, marker: str) -> ParseSteps[None]:
        """Consumes `marker`. Raises Malformed if something else follows."""
        if not (yield from self.reader.literal(marker)):
            raise Malformed


def made_call(name: Any, arguments: Any) -> Call:
    """A Call. Raises Malformed if the name is not text, the arguments are not an object, or JSON cannot encode them."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise Malformed
    try:
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        name.encode()
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    return Call(name, json.dumps(arguments) if _LONE.search(written) else written)


def read_object(text: str) -> dict[str, Any]:
    """The JSON object of a text. Raises Malformed if it is not one."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    if not isinstance(value, dict):
        raise Malformed
    return value
