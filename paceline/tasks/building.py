"""The rows of a result: what a snippet that is placed in a file keeps of it, takes away and puts in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.tasks.align import File, Placed
from paceline.tasks.definitions import Code, decorators_start, indent, is_closer, rewritten_to
from paceline.tasks.doubts import is_preamble
from paceline.tasks.lines import Row

_FEW = 3  # file rows beyond the new ones that a snippet's first rows may replace


@dataclass(frozen=True)
class _Gap:
    """What the snippet has between two rows found in the file, and the file rows `first:last` between those.

    `parts` are the inserted rows, cut at markers: one part, no marker. `indents` are the markers' indents.
    """

    first: int
    last: int
    parts: tuple[tuple[str, ...], ...]
    indents: tuple[int, ...]


def build(placed: Placed) -> list[Row]:
    """The rows of the result. A definition that the snippet shows in another place leaves its old one."""
    return _without_moved(placed, _rows_of(placed))


def _rows_of(placed: Placed) -> list[Row]:
    file, snippet = placed.file, placed.snippet
    result: list[Row] = []
    whole = any(placed.markers) and all(
        placed.kept(row) or placed.markers[row] or not line.strip() for row, line in enumerate(snippet.rows)
    )
    for gap, anchor in _gaps(placed):
        first, last = _kept_part(file, gap, anchor)
        if len(gap.parts) == 1 and whole and (gap.first == 0 or anchor < 0):
            first = last  # an edit that else changes nothing shows that the file begins, or ends, with it
        if len(gap.parts) > 1 and anchor >= 0 and snippet.names[anchor] and any(map(_is_decorator, gap.parts[-1])):
            last = max(first, decorators_start(file.rows, gap.last))
        result += _filled(file, gap, range(first, last), anchor < 0)
        if anchor >= 0:
            result.append(placed.matches[anchor] if placed.kept(anchor) else snippet.rows[anchor])
    return result


def _gaps(placed: Placed) -> list[tuple[_Gap, int]]:
    """The gaps in order, each with the index of the snippet row that ends it, -1 for the last."""
    gaps: list[tuple[_Gap, int]] = []
    parts: list[list[str]] = [[]]
    indents: list[int] = []
    reached = 0
    full = [row for row, line in enumerate(placed.snippet.rows) if line.strip() or placed.matches[row] >= 0]
    for index in range(full[0], full[-1] + 1):
        line = placed.snippet.rows[index]
        if placed.markers[index]:
            parts.append([])
            indents.append(indent(line))
        elif placed.matches[index] < 0:
            parts[-1].append(line)
        else:
            gap = _Gap(reached, placed.matches[index], tuple(tuple(part) for part in parts), tuple(indents))
            gaps.append((gap, index))
            reached, parts, indents = placed.matches[index] + 1, [[]], []
    gaps.append((_Gap(reached, len(placed.file.rows), tuple(tuple(part) for part in parts), tuple(indents)), -1))
    return gaps


def _kept_part(file: File, gap: _Gap, anchor: int) -> tuple[int, int]:
    """Which of the gap's file rows stay: a range, empty where all are replaced.

    Between two found rows without a marker none do. Beyond the snippet's ends, and at a marker, all do but those of a
    definition that the snippet rewrites to its end.
    """
    put = [line for line in gap.parts[0] if line.strip()]
    if len(gap.parts) == 1 and anchor >= 0:
        if gap.first > 0:
            return gap.last, gap.last
        if not put and not any(line.strip() for line in file.rows[: gap.last]):
            return gap.last, gap.last  # blank rows at the file's beginning, where the snippet has none
        last = gap.last
        while put and last > max(0, gap.last - len(put) - _FEW) and file.rows[last - 1].strip():
            if is_preamble(file.rows[last - 1]):
                break
            last -= 1  # rows right above, at the snippet's beginning, are what its first rows replace
        return gap.first, last
    first = rewritten_to(file, gap.first, gap.last, put, gap.indents[0] if gap.indents else None)
    if len(gap.parts) == 1 and put:
        while first < gap.last and file.rows[first].strip() and indent(file.rows[first]) >= indent(put[-1]):
            first += 1  # rows right below, at the snippet's end, are what its last rows replace
    return first, gap.last


def _filled(file: File, gap: _Gap, kept: range, ends: bool) -> list[Row]:
    """The gap's rows: what is inserted before its first marker, what is kept, what is inserted after.

    Blank rows that both have where they meet stand once. A definition put between markers comes inside the last block
    of what is kept that it is deep enough for, as far from the one before it as those are from each other.
    """
    if not kept and len(gap.parts) == 1:
        return list(gap.parts[0])
    before, *after = gap.parts
    if len(gap.parts) == 1 and gap.first == 0:
        before, after = (), [before]
    overlap = min(_blanks(before[::-1]), _blanks([file.rows[row] for row in kept]))
    result: list[Row] = [*before[: len(before) - overlap], *kept]
    tail: list[Row] = []
    for part in after:
        if not result and gap.first == 0:
            part = part[_blanks(part) :]
        full = [line for line in part if line.strip()]
        if ends and full and Code(full).names[0] is not None and result:
            tail = _closing(file, result, indent(full[0]))
            result = result[: len(result) - len(tail)]
            apart = max(_blanks(part), _apart(file, kept, full[0]))
            result += [""] * (apart - _blanks(texts_of(file, result)[::-1]))
            result += part[_blanks(part) : len(part) - _blanks(part[::-1])]
            continue
        result += part[min(_blanks(texts_of(file, result)[::-1]), _blanks(part)) :]
    return result + tail


def _closing(file: File, result: list[Row], depth: int) -> list[Row]:
    """The last rows that close blocks which a row at `depth` is inside of."""
    start = len(result)
    for place in range(len(result) - 1, -1, -1):
        text = file.rows[row] if isinstance(row := result[place], int) else row
        if text.strip() and (indent(text) >= depth or not is_closer(text)):
            break
        start = place if text.strip() else start
    return result[start:]


def _apart(file: File, kept: range, header: str) -> int:
    """How many blank rows stand before the definitions of the file that are as deep as `header`."""
    counts = Counter(
        _blanks(file.rows[: file.block_start(row)][::-1])
        for row in kept
        if file.names[row] and indent(file.rows[row]) == indent(header) and not _opens(file, file.block_start(row))
    )
    if counts:
        return counts.most_common(1)[0][0]
    return 2 if indent(header) == 0 and header.endswith(":") else 1


def _opens(file: File, row: int) -> bool:
    """Whether a row is the first of its block."""
    above = next((line for line in file.rows[:row][::-1] if line.strip()), "")
    return not above or indent(above) < indent(file.rows[row])


def _is_decorator(line: str) -> bool:
    return line.strip().startswith("@")


def _blanks(lines: Sequence[str]) -> int:
    """How many blank lines come first."""
    return next((number for number, line in enumerate(lines) if line.strip()), len(lines))


def _without_moved(placed: Placed, result: list[Row]) -> list[Row]:
    """The result without a definition's old place where the snippet shows all of it in another one."""
    file, snippet = placed.file, placed.snippet
    stay = {row for row in result if isinstance(row, int)}
    for header, name in enumerate(snippet.names):
        places = file.headers.get(name or ("", ""), [])
        stop = snippet.block_end(header) if len(places) == 1 else header
        if stop - header < 2 or any(placed.matches[row] >= 0 for row in range(header, stop)):
            continue
        if any(placed.markers[header:stop]) or sum(each == name for each in snippet.names) > 1:
            continue
        if indent(snippet.rows[header]) or indent(file.rows[places[0]]):
            continue  # only outermost ones: what is deeper may be of another block, or a part of a text
        last = file.block_end(places[0])
        while last < len(file.rows) and not file.rows[last].strip():
            last += 1
        gone = range(file.block_start(places[0]), last)
        if stay.issuperset(gone):
            stay -= set(gone)
    return [row for row in result if not isinstance(row, int) or row in stay]


def texts_of(file: Code, rows: Sequence[Row]) -> list[str]:
    return [file.rows[row] if isinstance(row, int) else row for row in rows]
