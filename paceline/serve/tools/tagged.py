"""Calls in tags, one a parameter, whose values are written as they are: how the formats of this kind are read."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from paceline.serve.tools.calls import CallParser, made_call
from paceline.serve.tools.reader import Malformed, Steps
from paceline.serve.tools.values import typed


class Found(NamedTuple):
    """What comes after a function's name or a value: a parameter's key, the next function's name, or the end.

    Before a next function, `num_pieces` is how many pieces were taken for the call before it; `form` is a parameter's.
    """

    kind: str
    name: str = ""
    num_pieces: int | None = None
    form: str = ""


class TaggedParser(CallParser):
    """`begin`, functions, `end`; a function is its name, parameters with their values, and `function_end`.

    `function` and `parameter` are what stands before a name or key and what must come after it, white space between.
    Where `function` is empty there is one function and its name follows `begin`; `function_end` is then empty too.
    One `frame` at each end of a value is no part of it.

    Values are not escaped, so they may hold the format's own markers. A value ends at the first `value_end` outside of
    a whole call that, white space aside, is followed by another parameter's beginning with its key, or by
    `function_end` and then the next function's beginning with its name, or `end`. A whole call within a value, from
    `begin` with a function's beginning to `end`, is part of the value with all that it holds.

    A function that is one of the tools counts without `begin` too, where `flaws` say so: it ends at its `function_end`,
    and an `end` that follows goes with it.
    """

    end: ClassVar[str]
    function: ClassVar[tuple[str, ...]]
    function_end: ClassVar[str]
    parameter: ClassVar[tuple[str, ...]]
    value_end: ClassVar[str]
    frame: ClassVar[str] = ""

    _bare = False  # whether what is read began without `begin`

    def section(self) -> Steps[None]:
        reader = self.reader
        self._bare = reader.taken[0] != self.begin
        found: Found | None = Found("function", (yield from self._first()))
        while found and found.kind == "function":
            name, arguments = found.name, dict[str, Any]()
            found = yield from self._next()
            while found and found.kind == "parameter":
                key, form = found.name, found.form
                value, found = yield from self._value()
                arguments[key] = self._read(value, name, key, form)
            if found:
                self.give(made_call(name, arguments), found.num_pieces)
        if found is None or found.kind != "end":
            raise Malformed
        if self._bare:
            yield from reader.space()
            if (yield from reader.literal(self.end)):
                reader.taken.clear()

    def _first(self) -> Steps[str]:
        """The name of a section's first function. Raises Malformed where there is none."""
        if not self._bare:
            yield from self.reader.space()
            if self.function and not (yield from self.reader.literal(self.function[0])):
                raise Malformed
        name = yield from self._name()
        if not name or (self._bare and name not in self.schemas):
            raise Malformed
        return name

    def _value(self) -> Steps[tuple[str, Found]]:
        """A value up to its end, and what follows it."""
        parts: list[str] = []
        depth = 0
        while True:
            text, marker = yield from self.reader.until(self.value_end, self.begin, self.end)
            parts.append(text)
            place = len(self.reader.taken)
            if marker == self.begin:
                depth += yield from self._begins()
            elif marker == self.end:
                depth = max(depth - 1, 0)
            elif not depth:
                found = yield from self._next()
                if found:
                    return "".join(parts).removeprefix(self.frame).removesuffix(self.frame), found
            parts.append(marker)
            parts += self.reader.taken[place:]

    def _begins(self) -> Steps[bool]:
        """Whether a function begins here, behind `begin`."""
        yield from self.reader.space()
        if self.function:
            return bool((yield from self.reader.literal(self.function[0])))
        if not (yield from self._name()):
            return False
        yield from self.reader.space()
        return bool((yield from self.reader.literal(self.parameter[0])))

    def _next(self) -> Steps[Found | None]:
        """What comes after white space; None where it is none of those, with what was taken to see that."""
        reader = self.reader
        yield from reader.space()
        marker = yield from reader.literal(self.parameter[0], self.function_end or self.end)
        if marker == self.parameter[0]:
            key = yield from reader.word()
            form = yield from self._form()
            return Found("parameter", key, form=form) if key and form is not None else None
        if not marker or not self.function_end or self._bare:
            return Found("end") if marker else None
        num_pieces = len(reader.taken)
        yield from reader.space()
        marker = yield from reader.literal(self.function[0], self.end)
        if marker == self.function[0]:
            name = yield from self._name()
            return Found("function", name, num_pieces) if name else None
        return Found("end") if marker else None

    def _form(self) -> Steps[str | None]:
        """Takes what must come after a key, and tells of it what the value depends on; None where it does not come."""
        return "" if (yield from self._follow(self.parameter[1:])) else None

    def _read(self, text: str, function: str, key: str, form: str) -> Any:
        """A value from its text."""
        return typed(text, self.schemas.get(function), key)

    def _name(self) -> Steps[str]:
        """A function's name and what must come after it; nothing where that does not, or it is no name."""
        name = (yield from self.reader.word()).strip()
        good = len(name.split()) == 1 and (yield from self._follow(self.function[1:]))
        return name if good else ""

    def _follow(self, markers: tuple[str, ...]) -> Steps[bool]:
        """Takes the markers, one after the other with white space between; False where one does not come."""
        for index, marker in enumerate(markers):
            if index:
                yield from self.reader.space()
            if not (yield from self.reader.literal(marker)):
                return False
        return True
