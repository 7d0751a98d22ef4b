"""Warnings about a merge by rule: code that would appear twice, or beside another version of itself.

The thresholds were tuned on the train split of `python -m benchmarks.merge`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from paceline.tasks.alignment import Placement, line_weight
from paceline.tasks.definitions import Code, indent, is_closer
from paceline.tasks.lines import ResultRow
from paceline.tasks.names import DEFINITION_KINDS, assigned_key

_IMPORT = re.compile(r"(import|from|use|using|include|require)\b|#include\b")
# the name that an import of Java, Rust, C# or PHP binds
_IMPORTED_NAME = re.compile(r"(?:import|use|using)\s+(?:static\s+)?[\w.:\\]*[.:\\](\w+)\s*;$")
_IMPORT_FIRST_SIGNS = {"i", "f", "u", "r", "#"}  # the first characters of what `_IMPORT` matches
_MIN_ROWS = 3  # fewer rows of a body, or fewer deleted rows, give no warning
_SAME_BODY_SHARE = 0.8  # share of a body's rows that another body has, above which both may be one definition
_DECLARED = re.compile(r"(\s*)(?:let|const|var|val)\s+(?:mut\s+)?(\w+)\b")
_OVERLOADED = {"method", "fun"}  # kinds of definition that some languages overload by parameters
_NEARBY_ROWS = 8  # places at most this many file rows apart are near each other
_MIN_BODY_WEIGHT = 0.5  # the least weight of a body row that is compared


def duplicate_warnings(placement: Placement, result: Sequence[ResultRow], texts: list[str], marked: bool) -> list[str]:
    """The warnings, a sentence each. `texts` are the texts of `result`; `marked`: the edit has markers of its own."""
    warnings = defined_twice(placement.file, Code(texts))
    warnings += copied_rows(placement.file, placement.snippet, result, marked)
    warnings += _renamed(placement)
    warnings += _declared_twice(placement, result)
    return warnings + _same_name_different_body(placement)


def defined_twice(file: Code, result: Code) -> list[str]:
    """A definition or an import that the result has more often in one scope than the file."""
    twice = {name: count for name, count in Counter(_named_rows(result)).items() if count > 1}
    known = Counter(_named_rows(file) if twice else [])
    for name, count in twice.items():
        if count > known[name]:
            return [f"{name[-1]!r} would stand twice"]
    return []


def _named_rows(code: Code) -> list[tuple[str, ...]]:
    """Each definition as the path of (kind, name) of its enclosing definitions and itself; each top-level import as text."""
    enclosing: list[tuple[int, str]] = []
    found = []
    for row, line in enumerate(code.rows):
        if name := code.names[row]:
            enclosing = [pair for pair in enclosing if pair[0] < indent(line)] + [(indent(line), " ".join(name))]
            # a test's title must be unique everywhere
            found.append(tuple(each for _, each in enclosing) if name[0] in DEFINITION_KINDS else name)
        elif line[:1] in _IMPORT_FIRST_SIGNS and _IMPORT.match(line):
            found.append((line,))
            if imported := _IMPORTED_NAME.match(line):
                found.append(("import", imported[1]))
        elif line[:1].strip(" \t-*") and line_weight(line) >= 1.0 and assigned_key(line):
            found.append((line,))
    return found


def copied_rows(file: Code, snippet: Code, result: Sequence[ResultRow], marked: bool) -> list[str]:
    """Consecutive inserted rows, not of a new definition, that the file already has in the same order and keeps.

    Two such rows are enough in an edit without markers, or near the insertion; elsewhere three.
    """
    kept = [row for row in result if isinstance(row, int) and file.rows[row].strip()]
    rows_at: dict[tuple[str, ...], list[int]] = {}
    for size in (2, 3):
        for start in range(len(kept) - size + 1):
            texts = tuple(file.rows[row].strip() for row in kept[start : start + size])
            rows_at.setdefault(texts, []).append(kept[start])
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
            places = rows_at.get(rows, []) if len(rows) == size and new.isdisjoint(rows) else []
            if not places or min(map(line_weight, rows)) < 1.0:
                continue
            if size == 3 or not marked or any(abs(place - reached) <= _NEARBY_ROWS for place in places):
                return [f"{rows[0]!r} and on stand at line {places[0] + 1} of the file too, and stay there"]
    return []


def unreplaced_deletions(file: Code, result: Sequence[ResultRow]) -> list[str]:
    """File rows deleted without a replacement, in an edit without markers whose instruction names no removal."""
    full = [row for row in result if (file.rows[row] if isinstance(row, int) else row).strip()]
    for first, second in pairwise(full):
        if isinstance(first, int) and isinstance(second, int):
            gone = [row for row in range(first + 1, second) if file.rows[row].strip()]
            if len(gone) >= _MIN_ROWS:
                return [f"lines {gone[0] + 1} to {gone[-1] + 1} of the file go with nothing in their place"]
    return []


def _renamed(placement: Placement) -> list[str]:
    """A new definition with nearly all rows of one that stays: it may be that one, renamed."""
    file, snippet = placement.file, placement.snippet
    named = set(snippet.names)
    for header, name in enumerate(snippet.names):
        body = {row.strip() for row in snippet.rows[header + 1 : snippet.block_end(header)]} - {""}
        if name is None or name in file.headers or len(body) < _MIN_ROWS:
            continue
        for other, places in file.headers.items():
            if other not in named and other[0] == name[0]:
                rows = {row.strip() for place in places for row in file.rows[place + 1 : file.block_end(place)]}
                if len(body & rows) > _SAME_BODY_SHARE * len(body):
                    return [
                        f"{snippet.rows[header].strip()!r} is much like line {places[0] + 1} of the file: it may be that"
                    ]
    return []


def _declared_twice(placement: Placement, result: Sequence[ResultRow]) -> list[str]:
    """A new row that declares the variable which a kept row beside it declares too."""
    rows = [(row, placement.file.rows[row] if isinstance(row, int) else row) for row in result]
    declarations = [(place, row, found) for place, (row, line) in enumerate(rows) if (found := _DECLARED.match(line))]
    for (first, before, first_match), (second, after, second_match) in pairwise(declarations):
        if isinstance(before, int) == isinstance(after, int) or first_match.group(1, 2) != second_match.group(1, 2):
            continue
        between = [line for _, line in rows[first + 1 : second]]
        if all(not line.strip() or indent(line) > len(first_match[1]) or is_closer(line) for line in between):
            return [f"{rows[second][1].strip()!r} and {rows[first][1].strip()!r} would stand side by side"]
    return []


def _same_name_different_body(placement: Placement) -> list[str]:
    """A definition that replaces one of the same name and shares neither header nor body with it: it may be an overload."""
    snippet, file = placement.snippet, placement.file
    for header, name in enumerate(snippet.names):
        match = placement.matches[header]
        if (
            match < 0
            or name is None
            or name[0] not in _OVERLOADED
            or name != file.names[match]
            or placement.is_unchanged(header)
        ):
            continue
        body = [
            row
            for row in range(header + 1, snippet.block_end(header))
            if line_weight(snippet.rows[row]) >= _MIN_BODY_WEIGHT
        ]
        if (
            any(placement.markers[header : snippet.block_end(header)])
            or not body
            or any(placement.matches[row] >= 0 for row in body)
        ):
            continue
        return [f"{snippet.rows[header].strip()!r} has nothing in common with line {match + 1}, of the same name"]
    return []
