"""Text that comes in pieces, and the steps that read it: what a step takes never depends on the pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]

_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r'[^<>"\n]*')


class Cut(Exception):
    """The text ended where a step needed more."""


class Malformed(Exception):
    """What was read is no call."""


class Reader:
    """Its steps are generators that yield where they need more text, and raise Cut where none will come.

    Of several markers none may hold another's beginning. Everything taken is kept in `taken`, in pieces, until the
    caller clears it: a call that turns out to be none is the text it was read from. Little more than the last piece is
    ever unread, so the time is linear in the text.
    """

    def __init__(self) -> None:
        self.taken: list[str] = []
        self._text = ""
        self._place = 0
        self._ended = False

    def add(self, text: str) -> None:
        self._text = self._text[self._place :] + text
        self._place = 0

    def end(self) -> None:
        self._ended = True

    def rest(self) -> str:
        """All that was taken and all that is unread."""
        text = "".join(self.taken) + self._text[self._place :]
        self.taken.clear()
        self._text, self._place = "", 0
        return text

    def stream(self, markers: tuple[str, ...], say: Callable[[str], None]) -> Steps[str]:
        """Gives `say` what comes before the first of `markers`, as it comes, without keeping it; takes the marker."""
        while (found := _any_of(markers).search(self._text, self._place)) is None:
            say(self._pop(len(self._text) - max(map(self._overlap, markers))))
            yield from self._more()
        say(self._pop(found.start()))
        return self._take(found.end())

    def until(self, *markers: str) -> Steps[tuple[str, str]]:
        """Takes what comes before the first of `markers`, and the marker."""
        parts: list[str] = []
        while (found := _any_of(markers).search(self._text, self._place)) is None:
            parts.append(self._take(len(self._text) - max(map(self._overlap, markers))))
            yield from self._more()
        parts.append(self._take(found.start()))
        return "".join(parts), self._take(found.end())

    def literal(self, *options: str) -> Steps[str]:
        """Takes the one of `options` that comes next; takes and gives nothing where none does."""
        while True:
            rest = self._text[self._place : self._place + max(map(len, options))]
            for option in options:
                if rest.startswith(option):
                    return self._take(self._place + len(option))
            if not any(option.startswith(rest) for option in options):
                return ""
            yield from self._more()

    def peek(self) -> Steps[str]:
        """The next character, which is not taken."""
        while self._place == len(self._text):
            yield from self._more()
        return self._text[self._place]

    def space(self) -> Steps[str]:
        return self._while(_SPACE)

    def word(self) -> Steps[str]:
        """Takes a name or key: all up to an angle bracket, a double quote or the line's end."""
        return self._while(_WORD)

    def json_object(self) -> Steps[str]:
        """Takes an object, its end found by its brackets, so that markers within its strings are part of it.

        Raises Malformed where none begins here.
        """
        if (yield from self.peek()) != "{":
            raise Malformed
        parts: list[str] = []
        depth, in_string = 0, False
        while True:
            place = self._place
            while found := (_IN_STRING if in_string else _STRUCTURE).search(self._text, place):
                place = found.end()
                if found[0] == "\\":
                    if place == len(self._text):
                        break  # what it escapes has not come
                    place += 1
                elif found[0] == '"':
                    in_string = not in_string
                else:
                    depth += 1 if found[0] in "{[" else -1
                    if not depth:
                        parts.append(self._take(place))
                        return "".join(parts)
            parts.append(self._take(found.start() if found else len(self._text)))
            yield from self._more()

    def _while(self, pattern: re.Pattern[str]) -> Steps[str]:
        parts: list[str] = []
        while True:
            found = pattern.match(self._text, self._place)
            assert found is not None
            parts.append(self._take(found.end()))
            if self._place < len(self._text):
                return "".join(parts)
            yield from self._more()

    def _more(self) -> Steps[None]:
        if self._ended:
            raise Cut
        yield

    def _take(self, end: int) -> str:
        text = self._pop(end)
        if text:
            self.taken.append(text)
        return text

    def _pop(self, end: int) -> str:
        text, self._place = self._text[self._place : end], end
        return text

    def _overlap(self, marker: str) -> int:
        """The length of the longest end of the unread text that begins `marker`."""
        most = min(len(self._text) - self._place, len(marker) - 1)
        return next((size for size in range(most, 0, -1) if self._text.endswith(marker[:size])), 0)


class Trimmer:
    """Text in pieces whose white space is held back until something follows it, so that it can be dropped.

    While `at_start` is set, white space that comes next is dropped too.
    """

    def __init__(self, at_start: bool = False) -> None:
        self.at_start = at_start
        self._held: list[str] = []

    def feed(self, text: str) -> str:
        if self.at_start:
            text = text.lstrip()
        kept = text.rstrip()
        if not kept:
            self._held.append(text)
            return ""
        self.at_start = False
        given = "".join(self._held) + kept
        self._held = [text[len(kept) :]]
        return given

    def drop(self) -> str:
        """Forgets the white space that is held, and tells it."""
        held = "".join(self._held)
        self._held.clear()
        return held


@cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))
