"""What speaks against a merge by rule: what would stand twice, or beside another form of itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from paceline.tasks.align import Placed, weight
from paceline.tasks.definitions import Code, indent, is_closer
from paceline.tasks.lines import Row
from paceline.tasks.names import KINDS, key_of

_IMPORT = re.compile(r"(import|from|use|using|include|require)\b|#include\b")
_BROUGHT = re.compile(
    r"(?:import|use|using)\s+(?:static\s+)?[\w.:\\]*[.:\\](\w+)\s*;$"
)  # what Java, Rust, C# or PHP import
_IMPORTS = {"i", "f", "u", "r", "#"}  # what a match of `_IMPORT` begins with
_SOME_ROWS, _MOSTLY = 3, 0.8  # rows of a body, and the share of them that another has, from which it may be the same
_DECLARED = re.compile(r"(\s*)(?:let|const|var|val)\s+(?:mut\s+)?(\w+)\b")
_OVERLOADED = {"method", "fun"}  # kinds of definition that differ by their parameters alone in some language
_NEAR = 8  # file rows between two places that are near each other
_TELLING = 0.5  # what a row of a body must weigh to count


def repeats_of(placed: Placed, result: Sequence[Row], texts: list[str], marked: bool) -> list[str]:
    """Reasons, a sentence each. `texts` are the rows of `result`; `marked` says whether the edit has markers of its own."""
    doubts = repeated(placed.file, Code(texts))
    doubts += copied(placed.file, placed.snippet, result, marked)
    doubts += _renamed(placed)
    doubts += _declared_twice(placed, result)
    return doubts + _others_of_the_name(placed)


def repeated(file: Code, result: Code) -> list[str]:
    """A definition, or an import, that stands twice in the result in one place, and did not in the file."""
    twice = {name: count for name, count in Counter(_named(result)).items() if count > 1}
    known = Counter(_named(file) if twice else [])
    for name, count in twice.items():
        if count > known[name]:
            return [f"{name[-1]!r} would stand twice"]
    return []


def _named(code: Code) -> list[tuple[str, ...]]:
    """Each definition by kind and name, after those of the definitions around it; each outermost import as it is."""
    around: list[tuple[int, str]] = []
    found = []
    for row, line in enumerate(code.rows):
        if name := code.names[row]:
            around = [pair for pair in around if pair[0] < indent(line)] + [(indent(line), " ".join(name))]
            found.append(tuple(each for _, each in around) if name[0] in KINDS else name)  # a title counts anywhere
        elif line[:1] in _IMPORTS and _IMPORT.match(line):
            found.append((line,))
            if brought := _BROUGHT.match(line):
                found.append(("import", brought[1]))
        elif line[:1].strip(" \t-*") and weight(line) >= 1.0 and key_of(line):
            found.append((line,))
    return found


def copied(file: Code, snippet: Code, result: Sequence[Row], marked: bool) -> list[str]:
    """New rows, not of a new definition, that follow each other so in a place of the file where they stay.

    Two of them are enough in an edit without markers, of which no part says where it is, and near by; else three.
    """
    kept = [row for row in result if isinstance(row, int) and file.rows[row].strip()]
    stand: dict[tuple[str, ...], list[int]] = {}
    for size in (2, 3):
        for start in range(len(kept) - size + 1):
            texts = tuple(file.rows[row].strip() for row in kept[start : start + size])
            stand.setdefault(texts, []).append(kept[start])
    new: set[str] = set()
    for header, name in enumerate(snippet.names):
        if name is not None and name not in file.headers:
            new |= {row.strip() for row in snippet.rows[header : snippet.block_end(header)]}
    full = [row for row in result if isinstance(row, int) or row.strip()]
    reached = 0
    for start, first in enumerate(full):
        reached = first if isinstance(first, int) else reached
        for size in (2, 3):
            rows = tuple(row.strip() for row in full[start : start + size] if isinstance(row, str))
            places = stand.get(rows, []) if len(rows) == size and new.isdisjoint(rows) else []
            if not places or min(map(weight, rows)) < 1.0:
                continue
            if size == 3 or not marked or any(abs(place - reached) <= _NEAR for place in places):
                return [f"{rows[0]!r} and on stand at line {places[0] + 1} of the file too, and stay there"]
    return []


def left_out(file: Code, result: Sequence[Row]) -> list[str]:
    """File rows that go with nothing in their place, where no marker and no word of the instruction says that any do."""
    full = [row for row in result if (file.rows[row] if isinstance(row, int) else row).strip()]
    for first, second in pairwise(full):
        if isinstance(first, int) and isinstance(second, int):
            gone = [row for row in range(first + 1, second) if file.rows[row].strip()]
            if len(gone) >= _SOME_ROWS:
                return [f"lines {gone[0] + 1} to {gone[-1] + 1} of the file go with nothing in their place"]
    return []


def _renamed(placed: Placed) -> list[str]:
    """A new definition with nearly all rows of one that stays, which may be the same under another name."""
    file, snippet = placed.file, placed.snippet
    named = set(snippet.names)
    for header, name in enumerate(snippet.names):
        body = {row.strip() for row in snippet.rows[header + 1 : snippet.block_end(header)]} - {""}
        if name is None or name in file.headers or len(body) < _SOME_ROWS:
            continue
        for other, places in file.headers.items():
            if other not in named and other[0] == name[0]:
                rows = {row.strip() for place in places for row in file.rows[place + 1 : file.block_end(place)]}
                if len(body & rows) > _MOSTLY * len(body):
                    return [
                        f"{snippet.rows[header].strip()!r} is much like line {places[0] + 1} of the file: it may be that"
                    ]
    return []


def _declared_twice(placed: Placed, result: Sequence[Row]) -> list[str]:
    """A new row that declares what a row right before or after the new ones declares too, which stays."""
    rows = [(row, placed.file.rows[row] if isinstance(row, int) else row) for row in result]
    declared = [(place, row, found) for place, (row, line) in enumerate(rows) if (found := _DECLARED.match(line))]
    for (first, before, one), (second, after, other) in pairwise(declared):
        if isinstance(before, int) == isinstance(after, int) or (one[1], one[2]) != (other[1], other[2]):
            continue
        between = [line for _, line in rows[first + 1 : second]]
        if all(not line.strip() or indent(line) > len(one[1]) or is_closer(line) for line in between):
            return [f"{rows[second][1].strip()!r} and {rows[first][1].strip()!r} would stand side by side"]
    return []


def _others_of_the_name(placed: Placed) -> list[str]:
    """A definition with another header than that of the file's, of the same name, and nothing of its body."""
    snippet, file = placed.snippet, placed.file
    for header, name in enumerate(snippet.names):
        match = placed.matches[header]
        if match < 0 or name is None or name[0] not in _OVERLOADED or name != file.names[match] or placed.kept(header):
            continue
        body = [row for row in range(header + 1, snippet.block_end(header)) if weight(snippet.rows[row]) >= _TELLING]
        if (
            any(placed.markers[header : snippet.block_end(header)])
            or not body
            or any(placed.matches[row] >= 0 for row in body)
        ):
            continue
        return [f"{snippet.rows[header].strip()!r} has nothing in common with line {match + 1}, of the same name"]
    return []
