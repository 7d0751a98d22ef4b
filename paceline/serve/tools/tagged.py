"""The parser of call formats with one tag for each parameter, whose values are not escaped."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from paceline.serve.tools.calls import CallParser, made_call
from paceline.serve.tools.reader import Malformed, ParseSteps
from paceline.serve.tools.values import typed


class NextElement(NamedTuple):
    """What follows a function's name or a value. `kind` is parameter, function or end; `name` is the key or the name.

    For a function, `num_pieces` is the number of pieces that were consumed for the call before it. For a parameter, `form`
    is what `_form` returned.
    """

    kind: str
    name: str = ""
    num_pieces: int | None = None
    form: str = ""


class TaggedParser(CallParser):
    """Parses `begin`, functions, `end`. A function is its name, parameters with their values, and `function_end`.

    `function` and `parameter` are the marker before a name or key and the markers after it, with white space between. If
    `function` is empty, there is one function, whose name follows `begin`, and `function_end` is empty too. One `frame` at
    each end of a value is not part of the value.

    Values are not escaped, so they may contain the format's own markers. A value ends at the first `value_end` that is
    outside of a complete call and is followed (white space aside) by another parameter with its key, or by `function_end`
    and then either the next function with its name or `end`. A complete call within a value, from `begin` and a function
    to `end`, is part of the value.

    If `alternative_begins` has the marker of a function, a function that is one of the tools is a call without `begin`
    too. It ends at its `function_end`, and an `end` that follows belongs to it.
    """

    end: ClassVar[str]
    function: ClassVar[tuple[str, ...]]
    function_end: ClassVar[str]
    parameter: ClassVar[tuple[str, ...]]
    value_end: ClassVar[str]
    frame: ClassVar[str] = ""

    _without_begin = False  # whether the current section began without `begin`

    def section(self) -> ParseSteps[None]:
        reader = self.reader
        self._without_begin = reader.consumed[0] != self.begin
        found: NextElement | None = NextElement("function", (yield from self._first()))
        while found and found.kind == "function":
            name, arguments = found.name, dict[str, Any]()
            found = yield from self._next()
            while found and found.kind == "parameter":
                key, form = found.name, found.form
                value, found = yield from self._value()
                arguments[key] = self._read(value, name, key, form)
            if found:
                self.emit_call(made_call(name, arguments), found.num_pieces)
        if found is None or found.kind != "end":
            raise Malformed
        if self._without_begin:
            yield from reader.space()
            if (yield from reader.literal(self.end)):
                reader.consumed.clear()

    def _first(self) -> ParseSteps[str]:
        """The name of a section's first function. Raises Malformed if there is none."""
        if not self._without_begin:
            yield from self.reader.space()
            if self.function and not (yield from self.reader.literal(self.function[0])):
                raise Malformed
        name = yield from self._name()
        if not name or (self._without_begin and name not in self.schemas):
            raise Malformed
        return name

    def _value(self) -> ParseSteps[tuple[str, NextElement]]:
        """(a value, the element that follows it)."""
        parts: list[str] = []
        depth = 0
        while True:
            text, marker = yield from self.reader.until(self.value_end, self.begin, self.end)
            parts.append(text)
            position = len(self.reader.consumed)
            if marker == self.begin:
                depth += yield from self._at_call_begin()
            elif marker == self.end:
                depth = max(depth - 1, 0)
            elif not depth:
                found = yield from self._next()
                if found:
                    return "".join(parts).removeprefix(self.frame).removesuffix(self.frame), found
            parts.append(marker)
            parts += self.reader.consumed[position:]

    def _at_call_begin(self) -> ParseSteps[bool]:
        """Whether a function begins here, after `begin`."""
        yield from self.reader.space()
        if self.function:
            return bool((yield from self.reader.literal(self.function[0])))
        if not (yield from self._name()):
            return False
        yield from self.reader.space()
        return bool((yield from self.reader.literal(self.parameter[0])))

    def _next(self) -> ParseSteps[NextElement | None]:
        """The element after white space; None if there is none. The text that was consumed to find out stays consumed."""
        reader = self.reader
        yield from reader.space()
        marker = yield from reader.literal(self.parameter[0], self.function_end or self.end)
        if marker == self.parameter[0]:
            key = yield from reader.word()
            form = yield from self._form()
            return NextElement("parameter", key, form=form) if key and form is not None else None
        if not marker or not self.function_end or self._without_begin:
            return NextElement("end") if marker else None
        num_pieces = len(reader.consumed)
        yield from reader.space()
        marker = yield from reader.literal(self.function[0], self.end)
        if marker == self.function[0]:
            name = yield from self._name()
            return NextElement("function", name, num_pieces) if name else None
        return NextElement("end") if marker else None

    def _form(self) -> ParseSteps[str | None]:
        """Consumes the markers that must follow a key; None if they do not. The result is passed to `_read` as `form`."""
        return "" if (yield from self._literals(self.parameter[1:])) else None

    def _read(self, text: str, function: str, key: str, form: str) -> Any:
        """A parameter's value from its text."""
        return typed(text, self.schemas.get(function), key)

    def _name(self) -> ParseSteps[str]:
        """Consumes a function's name and the markers that must follow it; "" if they do not, or if it is not a name."""
        name = (yield from self.reader.word()).strip()
        good = len(name.split()) == 1 and (yield from self._literals(self.function[1:]))
        return name if good else ""

    def _literals(self, markers: tuple[str, ...]) -> ParseSteps[bool]:
        """Consumes the markers in order, with white space between; False if one is missing."""
        for index, marker in enumerate(markers):
            if index:
                yield from self.reader.space()
            if not (yield from self.reader.literal(marker)):
                return False
        return True
