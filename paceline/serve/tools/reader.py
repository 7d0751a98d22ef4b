"""Incremental parsing of text that arrives in pieces. The result never depends on how the text is split into pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

Parsed = TypeVar("Parsed")
ParseSteps = Generator[None, None, Parsed]

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r'[^<>"\n]*')


class OutOfText(Exception):
    """The text ended where the parser needed more."""


class Malformed(Exception):
    """The text is not a call."""


class Reader:
    """A text buffer with parsing functions, which are generators: they yield when they need more text, and raise OutOfText
    when there will be none.

    Of several markers, none may contain the beginning of another. All consumed text is kept in `consumed`, in pieces,
    until the caller clears it: a malformed call is emitted as the text that it was parsed from. At most a little more than
    the last piece is unread, so that parsing takes linear time.
    """

    def __init__(self) -> None:
        self.consumed: list[str] = []
        self._text = ""
        self._position = 0
        self._ended = False

    def add(self, text: str) -> None:
        self._text = self._text[self._position :] + text
        self._position = 0

    def end(self) -> None:
        self._ended = True

    def rest(self) -> str:
        """Removes and returns all consumed and all unread text."""
        text = "".join(self.consumed) + self._text[self._position :]
        self.consumed.clear()
        self._text, self._position = "", 0
        return text

    def stream(self, markers: tuple[str, ...], emit: Callable[[str], None]) -> ParseSteps[str]:
        """Passes text before the first of `markers` to `emit` as it arrives, without keeping it; consumes the marker."""
        while (found := _any_of(markers).search(self._text, self._position)) is None:
            emit(self._advance(len(self._text) - max(map(self._overlap, markers))))
            yield from self._need_text()
        emit(self._advance(found.start()))
        return self._consume(found.end())

    def until(self, *markers: str) -> ParseSteps[tuple[str, str]]:
        """Consumes the text before the first of `markers`, and the marker. Returns both."""
        parts: list[str] = []
        while (found := _any_of(markers).search(self._text, self._position)) is None:
            parts.append(self._consume(len(self._text) - max(map(self._overlap, markers))))
            yield from self._need_text()
        parts.append(self._consume(found.start()))
        return "".join(parts), self._consume(found.end())

    def literal(self, *options: str) -> ParseSteps[str]:
        """Consumes and returns the one of `options` that follows; "" if none does."""
        while True:
            rest = self._text[self._position : self._position + max(map(len, options))]
            for option in options:
                if rest.startswith(option):
                    return self._consume(self._position + len(option))
            if not any(option.startswith(rest) for option in options):
                return ""
            yield from self._need_text()

    def peek(self) -> ParseSteps[str]:
        """The next character, which is not consumed."""
        while self._position == len(self._text):
            yield from self._need_text()
        return self._text[self._position]

    def space(self) -> ParseSteps[str]:
        return self._while(_SPACE)

    def word(self) -> ParseSteps[str]:
        """Consumes a name or key: all text up to an angle bracket, a double quote or the end of the line."""
        return self._while(_WORD)

    def json_object(self) -> ParseSteps[str]:
        """Consumes a JSON object. Its end is found by matching brackets, so that markers within its strings are part of it.

        Raises Malformed if no object begins here.
        """
        if (yield from self.peek()) != "{":
            raise Malformed
        parts: list[str] = []
        depth, in_string = 0, False
        while True:
            position = self._position
            while found := (_IN_STRING if in_string else _STRUCTURE).search(self._text, position):
                position = found.end()
                if found[0] == "\\":
                    if position == len(self._text):
                        break  # the escaped character has not arrived
                    position += 1
                elif found[0] == '"':
                    in_string = not in_string
                else:
                    depth += 1 if found[0] in "{[" else -1
                    if not depth:
                        parts.append(self._consume(position))
                        return "".join(parts)
            parts.append(self._consume(found.start() if found else len(self._text)))
            yield from self._need_text()

    def _while(self, pattern: re.Pattern[str]) -> ParseSteps[str]:
        parts: list[str] = []
        while True:
            found = pattern.match(self._text, self._position)
            assert found is not None
            parts.append(self._consume(found.end()))
            if self._position < len(self._text):
                return "".join(parts)
            yield from self._need_text()

    def _need_text(self) -> ParseSteps[None]:
        if self._ended:
            raise OutOfText
        yield

    def _consume(self, end: int) -> str:
        text = self._advance(end)
        if text:
            self.consumed.append(text)
        return text

    def _advance(self, end: int) -> str:
        text, self._position = self._text[self._position : end], end
        return text

    def _overlap(self, marker: str) -> int:
        """The length of the longest suffix of the unread text that is a prefix of `marker`."""
        most = min(len(self._text) - self._position, len(marker) - 1)
        return next((size for size in range(most, 0, -1) if self._text.endswith(marker[:size])), 0)


class Trimmer:
    """Holds back the trailing white space of streamed text until other text follows, so that it can be dropped.

    While `at_start` is set, leading white space is dropped as well.
    """

    def __init__(self, at_start: bool = False) -> None:
        self.at_start = at_start
        self._pending_space: list[str] = []

    def feed(self, text: str) -> str:
        if self.at_start:
            text = text.lstrip()
        kept = text.rstrip()
        if not kept:
            self._pending_space.append(text)
            return ""
        self.at_start = False
        given = "".join(self._pending_space) + kept
        self._pending_space = [text[len(kept) :]]
        return given

    def drop(self) -> str:
        """Drops the buffered white space, and returns it."""
        space = "".join(self._pending_space)
        self._pending_space.clear()
        return space


@cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
