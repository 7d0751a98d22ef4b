"""What speaks against a merge by rule: where the snippet does not say what becomes of a part of the file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from paceline.tasks.align import File, Placed, weight
from paceline.tasks.definitions import LEADS, defined, indent, shown_whole

_MUCH = 60  # file lines in one place that an edit removes without showing them, from which that is doubtful
_FEW = 3  # file lines that may go without being shown
_IMPORT = re.compile(r"(import|from|use|using|include|require)\b|#include\b")
_IMPORTS = {"i", "f", "u", "r", "#"}  # what a match of `_IMPORT` begins with
_CONTEXT = 0.5  # what the lines beside a marker must weigh that say where it is


def doubts_of(
    file: File,
    placed: Placed,
    kept: Sequence[bool],
    result: list[str],
    other: list[str],
    marked: bool,
) -> tuple[str, ...]:
    """Reasons, a sentence each. `kept` says of each file line whether it is in the `result`.

    `other` is the result of an alignment at other costs; `marked` says whether the edit has markers of its own.
    """
    lines = file.lines
    doubts = _difference(result, other)
    doubts += _open_edges(lines, placed)
    doubts += repeated(file, result)
    doubts += _removed(kept)
    doubts += _ends(lines, placed, kept)
    doubts += _replaced(lines, placed, kept, marked)
    doubts += _unchanged_parts(lines, placed)
    if not marked:
        doubts += _skipped(lines, placed)
    if result == lines:
        doubts.append("the edit changes nothing")
    return tuple(doubts)


def _difference(result: list[str], other: list[str]) -> list[str]:
    if result == other:
        return []
    pairs = enumerate(zip(result, other, strict=False), 1)
    number = next((number for number, (left, right) in pairs if left != right), 1)
    return [f"line {number}: the edit can be placed in more than one way"]


def _open_edges(lines: list[str], placed: Placed) -> list[str]:
    """A changed line beside a marker, or at an end that is not the file's: what it replaces is not shown."""
    snippet, markers, matches = placed.snippet, placed.markers, placed.matches
    same = [match >= 0 and line == lines[match] for line, match in zip(snippet, matches, strict=True)]
    found = [(row, match) for row, match in enumerate(matches) if match >= 0]
    edges = [row for row, marker in enumerate(markers) if marker]
    if found and found[0][1] > found[0][0] + _FEW:
        edges.append(-1)
    if found and len(lines) - found[-1][1] > len(snippet) - found[-1][0] + _FEW:
        edges.append(len(snippet))
    for edge in edges:
        for step, determined in ((-1, _ends_definition), (1, _begins_definition)):
            row, told = edge + step, 0.0
            while 0 <= row < len(snippet) and not markers[row] and (same[row] or not snippet[row].strip()):
                told += weight(snippet[row]) if snippet[row].strip() else 0.0
                row += step
            if not 0 <= row < len(snippet) or markers[row] or determined(lines, placed, row):
                continue
            if told == 0.0 or (told < _CONTEXT and _passed_over(placed, row)):
                return [f"{snippet[row].strip()!r} is new where the edit breaks off: what it replaces is not shown"]
    return []


def _passed_over(placed: Placed, row: int) -> bool:
    """Whether file lines go where the new line `row` comes."""
    rows = range(len(placed.snippet))
    above = next((each for each in rows[row::-1] if placed.matches[each] >= 0 or placed.markers[each]), 0)
    below = next((each for each in rows[row + 1 :] if placed.matches[each] >= 0 or placed.markers[each]), 0)
    return 0 <= placed.matches[above] < placed.matches[below] - 1


def _ends_definition(lines: list[str], placed: Placed, row: int) -> bool:
    """Whether `row` is the last line of a definition that is shown whole, and nothing of the file's stays after it."""
    header = shown_whole(placed.snippet, placed.markers, row)
    if header is None:
        return False
    last = max((match for match in placed.matches[header : row + 1] if match >= 0), default=None)
    if last is None:
        return True
    after = next((line for line in lines[last + 1 :] if line.strip()), "")
    return indent(after) <= indent(placed.snippet[header])


def _begins_definition(lines: list[str], placed: Placed, row: int) -> bool:
    """Whether decorators or comments from `row` on, or none, lead to a definition."""
    for each in range(row, len(placed.snippet)):
        if defined(placed.snippet[each]):
            return True
        if placed.markers[each] or not placed.snippet[each].strip().startswith(LEADS):
            return False
    return False


def repeated(file: File, result: list[str]) -> list[str]:
    """A definition, or an import, that stands twice in the result in one place, and did not in the file."""
    twice = {name: count for name, count in Counter(_named(file, result)).items() if count > 1}
    known = Counter(_named(file, file.lines) if twice else [])
    for name, count in twice.items():
        if count > known[name]:
            return [f"{name[-1]!r} would stand twice"]
    return []


def _named(file: File, lines: list[str]) -> list[tuple[str, ...]]:
    """Each definition by kind and name, after those of the definitions around it; each outermost import as it is."""
    around: list[tuple[int, str]] = []
    found = []
    for line in lines:
        if name := file.names[line] if line in file.names else defined(line):
            around = [pair for pair in around if pair[0] < indent(line)] + [(indent(line), " ".join(name))]
            found.append(tuple(name for _, name in around))
        elif line[:1] in _IMPORTS and _IMPORT.match(line):
            found.append((line,))
    return found


def _unchanged_parts(lines: list[str], placed: Placed) -> list[str]:
    """A part between markers that changes nothing, and is not the header of what follows it: why is it shown?"""
    edges = [row for row, marker in enumerate(placed.markers) if marker]
    for start, stop in pairwise(edges):
        rows = [row for row in range(start + 1, stop) if placed.snippet[row].strip()]
        found = [placed.matches[row] for row in rows]
        if not rows or defined(placed.snippet[rows[-1]]) or -1 in found:
            continue
        if lines[found[0] : found[-1] + 1] == placed.snippet[rows[0] : rows[-1] + 1]:
            return [f"{placed.snippet[rows[0]].strip()!r} and on changes nothing where it was found"]
    return []


def _replaced(lines: list[str], placed: Placed, kept: Sequence[bool], marked: bool) -> list[str]:
    """A definition that the edit does not name and that goes, without markers or for a new one under one known line."""
    snippet, markers = placed.snippet, placed.markers
    named = {defined(line) for line in snippet}
    found = [(-1, -1), *((row, match) for row, match in enumerate(placed.matches) if match >= 0)]
    for (above, first), (below, last) in pairwise([*found, (len(snippet), len(lines))]):
        gone = [line for row, line in enumerate(lines[first + 1 : last], first + 1) if not kept[row] and defined(line)]
        comes = any(defined(line) for line in snippet[above + 1 : below])
        alone = above < 1 or markers[above - 1] or not snippet[above - 1].strip()
        if (not marked or (comes and alone)) and (unnamed := [line for line in gone if defined(line) not in named]):
            return [f"{unnamed[0].strip()!r} would go, which the edit does not name"]
    return []


def _ends(lines: list[str], placed: Placed, kept: Sequence[bool]) -> list[str]:
    """Lines at an end of the file that go as the edit does not have them, and no marker shows what its ends mean."""
    found = [row for row, match in enumerate(placed.matches) if match >= 0]
    if placed.markers[0] or placed.markers[-1] or not found:
        return []
    first, last = placed.matches[found[0]], placed.matches[found[-1]] + 1
    for start, stop, put in ((0, first, found[0]), (last, len(lines), len(placed.matches) - 1 - found[-1])):
        if sum(bool(lines[row].strip()) and not kept[row] for row in range(start, stop)) > put:
            return [f"line {start + 1} of the file and on would go, which is beyond what the edit shows"]
    return []


def _skipped(lines: list[str], placed: Placed) -> list[str]:
    """More file lines than come that go between two found ones, in an edit without markers: it may leave them out."""
    found = [(row, match) for row, match in enumerate(placed.matches) if match >= 0]
    for (above, first), (below, last) in pairwise(found):
        if sum(bool(line.strip()) for line in lines[first + 1 : last]) > below - above - 1:
            return [f"line {first + 2} of the file and on would go, and the edit has no marker for what it leaves out"]
    return []


def _removed(kept: Sequence[bool]) -> list[str]:
    """Many lines in one place that go."""
    gone = 0
    for number, stays in enumerate([*kept, True]):
        if stays and gone > _MUCH:
            return [f"line {number - gone + 1} of the file: {gone} lines would go that the edit does not show"]
        gone = 0 if stays else gone + 1
    return []
