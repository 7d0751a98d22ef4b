"""The rows of a merge result, built from a snippet's placement: file rows kept, file rows deleted, snippet rows inserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.tasks.alignment import IndexedFile, Placement
from paceline.tasks.definitions import Code, decorators_start, indent, is_closer, rewritten_end
from paceline.tasks.lines import ResultRow
from paceline.tasks.merge_warnings import is_preamble

_MAX_EXTRA_ROWS = 3  # bounds how many more file rows a snippet's first rows may replace than they are; not tuned


@dataclass(frozen=True)
class _Gap:
    """The snippet rows between two consecutive matches, and the file rows `first:last` between the matched ones.

    `parts` are the inserted snippet rows, split at markers: a gap without a marker has one part. `indents` are the
    markers' indents.
    """

    first: int
    last: int
    parts: tuple[tuple[str, ...], ...]
    indents: tuple[int, ...]


def result_rows(placement: Placement) -> list[ResultRow]:
    """The rows of the result. A definition that the snippet shows in another place is removed from its old one."""
    return _without_moved_definitions(placement, _rows_before_moves(placement))


def _rows_before_moves(placement: Placement) -> list[ResultRow]:
    """The result's rows, with moved definitions still in both places."""
    file, snippet = placement.file, placement.snippet
    result: list[ResultRow] = []
    unchanged = any(placement.markers) and all(
        placement.is_unchanged(row) or placement.markers[row] or not line.strip()
        for row, line in enumerate(snippet.rows)
    )
    for gap, anchor in _gaps(placement):
        first, last = _kept_range(file, gap, anchor)
        if len(gap.parts) == 1 and unchanged and (gap.first == 0 or anchor < 0):
            first = last  # an edit without other changes shows that the file begins, or ends, with it
        if len(gap.parts) > 1 and anchor >= 0 and snippet.names[anchor] and any(map(_is_decorator, gap.parts[-1])):
            last = max(first, decorators_start(file.rows, gap.last))
        result += _gap_rows(file, gap, range(first, last), anchor < 0)
        if anchor >= 0:
            result.append(placement.matches[anchor] if placement.is_unchanged(anchor) else snippet.rows[anchor])
    return result


def _gaps(placement: Placement) -> list[tuple[_Gap, int]]:
    """The gaps in order, each with the number of the matched snippet row that ends it, -1 for the last."""
    gaps: list[tuple[_Gap, int]] = []
    parts: list[list[str]] = [[]]
    indents: list[int] = []
    reached = 0
    full = [row for row, line in enumerate(placement.snippet.rows) if line.strip() or placement.matches[row] >= 0]
    for index in range(full[0], full[-1] + 1):
        line = placement.snippet.rows[index]
        if placement.markers[index]:
            parts.append([])
            indents.append(indent(line))
        elif placement.matches[index] < 0:
            parts[-1].append(line)
        else:
            gap = _Gap(reached, placement.matches[index], tuple(tuple(part) for part in parts), tuple(indents))
            gaps.append((gap, index))
            reached, parts, indents = placement.matches[index] + 1, [[]], []
    gaps.append((_Gap(reached, len(placement.file.rows), tuple(tuple(part) for part in parts), tuple(indents)), -1))
    return gaps


def _kept_range(file: IndexedFile, gap: _Gap, anchor: int) -> tuple[int, int]:
    """The range of the gap's file rows that stay, empty where all are replaced.

    Between two matches without a marker none stay. Beyond the snippet's ends and at a marker all stay, except those of a
    definition that the snippet rewrites to its end.
    """
    inserted = [line for line in gap.parts[0] if line.strip()]
    if len(gap.parts) == 1 and anchor >= 0:
        if gap.first > 0:
            return gap.last, gap.last
        if not inserted and not any(line.strip() for line in file.rows[: gap.last]):
            return gap.last, gap.last  # blank rows at the file's beginning, which the snippet lacks
        last = gap.last
        while inserted and last > max(0, gap.last - len(inserted) - _MAX_EXTRA_ROWS) and file.rows[last - 1].strip():
            if is_preamble(file.rows[last - 1]):
                break
            last -= 1  # the snippet's first rows replace those directly above its first match
        return gap.first, last
    first = rewritten_end(file, gap.first, gap.last, inserted, gap.indents[0] if gap.indents else None)
    if len(gap.parts) == 1 and inserted:
        while first < gap.last and file.rows[first].strip() and indent(file.rows[first]) >= indent(inserted[-1]):
            first += 1  # the snippet's last rows replace those directly below its last match
    return first, gap.last


def _gap_rows(file: IndexedFile, gap: _Gap, kept: range, at_end: bool) -> list[ResultRow]:
    """The gap's result rows: those inserted before its first marker, the kept ones, those inserted after it.

    Blank rows at a seam that both sides have appear once. At the snippet's end a new definition after a marker goes into the
    last kept block that its indent fits, separated by as many blank rows as the definitions there.
    """
    if not kept and len(gap.parts) == 1:
        return list(gap.parts[0])
    before, *after = gap.parts
    if len(gap.parts) == 1 and gap.first == 0:
        before, after = (), [before]
    overlap = min(_num_leading_blanks(before[::-1]), _num_leading_blanks([file.rows[row] for row in kept]))
    result: list[ResultRow] = [*before[: len(before) - overlap], *kept]
    tail: list[ResultRow] = []
    for part in after:
        if not result and gap.first == 0:
            part = part[_num_leading_blanks(part) :]
        full = [line for line in part if line.strip()]
        if at_end and full and Code(full).names[0] is not None and result:
            tail = _closing_rows(file, result, indent(full[0]))
            result = result[: len(result) - len(tail)]
            apart = max(_num_leading_blanks(part), _usual_blank_rows(file, kept, full[0]))
            result += [""] * (apart - _num_leading_blanks(row_texts(file, result)[::-1]))
            result += part[_num_leading_blanks(part) : len(part) - _num_leading_blanks(part[::-1])]
            continue
        result += part[min(_num_leading_blanks(row_texts(file, result)[::-1]), _num_leading_blanks(part)) :]
    return result + tail


def _closing_rows(file: IndexedFile, result: list[ResultRow], depth: int) -> list[ResultRow]:
    """The trailing rows that close the blocks around a row at indent `depth`."""
    start = len(result)
    for place in range(len(result) - 1, -1, -1):
        text = file.rows[row] if isinstance(row := result[place], int) else row
        if text.strip() and (indent(text) >= depth or not is_closer(text)):
            break
        start = place if text.strip() else start
    return result[start:]


def _usual_blank_rows(file: IndexedFile, kept: range, header: str) -> int:
    """The commonest number of blank rows before the kept definitions at the indent of `header`."""
    counts = Counter(
        _num_leading_blanks(file.rows[: file.block_start(row)][::-1])
        for row in kept
        if file.names[row]
        and indent(file.rows[row]) == indent(header)
        and not _is_first_of_block(file, file.block_start(row))
    )
    if counts:
        return counts.most_common(1)[0][0]
    return 2 if indent(header) == 0 and header.endswith(":") else 1


def _is_first_of_block(file: IndexedFile, row: int) -> bool:
    """Whether a row is the first of its block."""
    above = next((line for line in file.rows[:row][::-1] if line.strip()), "")
    return not above or indent(above) < indent(file.rows[row])


def _is_decorator(line: str) -> bool:
    return line.strip().startswith("@")


def _num_leading_blanks(lines: Sequence[str]) -> int:
    """The number of blank lines at the beginning."""
    return next((number for number, line in enumerate(lines) if line.strip()), len(lines))


def _without_moved_definitions(placement: Placement, result: list[ResultRow]) -> list[ResultRow]:
    """The result without the old copy of each definition that the snippet shows whole in another place."""
    file, snippet = placement.file, placement.snippet
    stay = {row for row in result if isinstance(row, int)}
    for header, name in enumerate(snippet.names):
        places = file.headers.get(name or ("", ""), [])
        stop = snippet.block_end(header) if len(places) == 1 else header
        if stop - header < 2 or any(placement.matches[row] >= 0 for row in range(header, stop)):
            continue
        if any(placement.markers[header:stop]) or sum(each == name for each in snippet.names) > 1:
            continue
        if indent(snippet.rows[header]) or indent(file.rows[places[0]]):
            continue  # only outermost definitions: a deeper one may belong to another block or to a string
        last = file.block_end(places[0])
        while last < len(file.rows) and not file.rows[last].strip():
            last += 1
        gone = range(file.block_start(places[0]), last)
        if stay.issuperset(gone):
            stay -= set(gone)
    return [row for row in result if not isinstance(row, int) or row in stay]


def row_texts(file: Code, rows: Sequence[ResultRow]) -> list[str]:
    """The texts of a result's rows, without their ends."""
    return [file.rows[row] if isinstance(row, int) else row for row in rows]
