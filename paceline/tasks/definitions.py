"""Definitions in source text, found by their names and indents alone: where they begin and end.

This works for every language whose blocks are customarily indented, and needs no parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from paceline.tasks.names import DEFINITION_PREFIXES, Name, names_of

_CLOSERS = re.compile(r"[)\]}]|</|(?:end|fi|done|esac)\b|end\w*$", re.IGNORECASE)


class Code:
    """Rows of code. `names` has the name that each row begins to define, `headers` the rows that begin each name."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.rows = list(rows)

    @cached_property
    def names(self) -> list[Name | None]:
        return names_of(self.rows)

    @cached_property
    def headers(self) -> dict[Name, list[int]]:
        places: dict[Name, list[int]] = {}
        for row, name in enumerate(self.names):
            if name is not None:
                places.setdefault(name, []).append(row)
        return places

    def block_end(self, header: int) -> int:
        """The end (exclusive) of the block that begins at `header`: deeper rows, and closing rows at the header's indent."""
        depth = indent(self.rows[header])
        stop = header + 1
        opened = False  # an opening brace is alone in the row below the header
        for row in range(header + 1, len(self.rows)):
            text = self.rows[row].lstrip()
            if not text:
                continue
            deeper = len(self.rows[row]) - len(text) - depth
            if deeper == 0 and text.rstrip() == "{" and row == stop and not opened:
                opened = True
            elif deeper < 0 or (deeper == 0 and not is_closer(text)):
                break
            stop = row + 1
        return stop

    def block_start(self, header: int) -> int:
        """The first row of the decorators and comments directly above a definition."""
        start = header
        while (
            start > 0
            and self.rows[start - 1].strip().startswith(DEFINITION_PREFIXES)
            and indent(self.rows[start - 1]) >= indent(self.rows[header])
        ):
            start -= 1
        return start

    def enclosing_definitions(self, row: int) -> list[int]:
        """The headers of the definitions that contain `row`, the innermost first."""
        depth = indent(self.rows[row])
        if depth == 0:
            return []
        found = []
        for header in range(row - 1, -1, -1):
            if self.rows[header].strip() and indent(self.rows[header]) < depth:
                if is_closer(self.rows[header]):
                    continue
                depth = indent(self.rows[header])
                if self.names[header] is not None:
                    found.append(header)
                if depth == 0:
                    break
        return found


def whole_definitions(code: Code) -> list[tuple[int, int, int]] | None:
    """(start, header, end) of each definition of a snippet that consists of whole definitions only; else None."""
    depth = min(indent(row) for row in code.rows if row.strip())
    blocks: list[tuple[int, int, int]] = []
    reached = 0
    for row, line in enumerate(code.rows):
        if row < reached or not line.strip() or line.strip().startswith(DEFINITION_PREFIXES):
            continue
        if indent(line) != depth or code.names[row] is None:
            return None
        start = max(reached, code.block_start(row))
        if any(each.strip() for each in code.rows[reached:start]):
            return None
        reached = code.block_end(row)
        blocks.append((start, row, reached))
    return blocks if blocks and not any(line.strip() for line in code.rows[reached:]) else None


def with_implied_markers(file: Code, snippet: Code) -> tuple[list[str], list[bool]]:
    """Adds implied markers to a snippet that has none: at both ends, and around outermost definitions that the file has.

    Returns the rows and which of them are markers. A snippet whose first and last lines are the file's is taken for the whole
    file and gets none.
    """
    rows = snippet.rows
    ends = [[line.strip() for line in each if line.strip()] for each in (file.rows, rows)]
    if ends[0][:1] == ends[1][:1] and ends[0][-1:] == ends[1][-1:]:
        return rows, [False] * len(rows)
    full = [row for row, line in enumerate(rows) if line.strip()]
    cuts = {full[0], full[-1] + 1}
    reached = 0
    for row, name in enumerate(snippet.names):
        if row >= reached and name in file.headers:
            reached = snippet.block_end(row)
            cuts |= {snippet.block_start(row), reached}
    result: list[str] = []
    markers: list[bool] = []
    only_blanks = True  # no text has come since the last marker
    for row in range(full[0], full[-1] + 2):
        if row in cuts and (not markers or not only_blanks):
            following = next((line for line in rows[row : full[-1] + 1] if line.strip()), "")
            result.append(" " * indent(following) + "...")
            markers.append(True)
            only_blanks = True
        if row <= full[-1]:
            result.append(rows[row])
            markers.append(False)
            only_blanks = only_blanks and not rows[row].strip()
    return result, markers


def whole_definition_ending_at(snippet: Code, markers: list[bool], row: int) -> int | None:
    """The header of a definition that the snippet shows whole and whose last row is `row`; None where there is none.

    No marker is inside the definition, and the next marker after `row` is indented no deeper than the header.
    """
    depth = indent(snippet.rows[row]) + 1
    for header in range(row, -1, -1):
        if markers[header]:
            return None
        if is_closer(snippet.rows[header]):
            continue
        if snippet.rows[header].strip() and indent(snippet.rows[header]) < depth:
            depth = indent(snippet.rows[header])
            if snippet.names[header]:
                after = next((each for each in range(row + 1, len(markers)) if markers[each]), None)
                return header if after is None or indent(snippet.rows[after]) <= depth else None
    return None


def decorators_start(lines: list[str], header: int) -> int:
    """The first line of the decorators directly above a definition. A decorator may span several lines."""
    start = row = header
    while row > 0 and lines[row - 1].strip() and indent(lines[row - 1]) >= indent(lines[header]):
        row -= 1
        if indent(lines[row]) == indent(lines[header]):
            if lines[row].startswith("@", indent(lines[row])):
                start = row
            elif lines[row].strip()[0] not in ")]}":
                break
    return start


def new_definitions(
    file: Code, snippet: Code, markers: list[bool], matches: list[int], exact: list[bool]
) -> list[bool]:
    """Which snippet rows must not match the file: markers, and the rows of new definitions, whose matches are coincidences.

    A definition is new if the file has none of its name and one of these holds: less than half of its body matches, the
    matches are scattered, or no row beside it matches. The edit then does not show that it replaces another definition.
    `exact` says which matched rows have the file's text, white space aside.
    """
    unmatchable = markers[:]
    for row, name in enumerate(snippet.names):
        if name is None or name in file.headers or unmatchable[row]:
            continue
        stop = snippet.block_end(row)
        full = [each for each in range(row, stop) if len(snippet.rows[each].strip()) > 2]
        found = [matches[each] for each in full if exact[each]]
        if any(markers[row:stop]):
            continue
        start = snippet.block_start(row)
        body = [matches[each] for each in range(row + 1, stop) if snippet.rows[each].strip()]
        entire = bool(body) and all(each >= 0 for each in body) and len(found) >= len(full) - 1
        beside = _found_beside(snippet, markers, exact, range(start - 1, -1, -1)) and (
            entire or _found_beside(snippet, markers, exact, range(stop, len(markers)))
        )
        if not beside or not found or len(found) * 2 < len(full) or found[-1] - found[0] > 2 * (stop - row) + 2:
            while stop < len(unmatchable) and not snippet.rows[stop].strip():
                stop += 1
            while start > 0 and not snippet.rows[start - 1].strip():
                start -= 1
            unmatchable[start:stop] = [True] * (stop - start)
    return unmatchable


def _found_beside(snippet: Code, markers: list[bool], exact: list[bool], rows: range) -> bool:
    """Whether the first row of `rows` that is not blank matches the file exactly."""
    row = next((each for each in rows if markers[each] or snippet.rows[each].strip()), None)
    return row is not None and not markers[row] and exact[row]


def rewritten_end(file: Code, first: int, last: int, inserted: list[str], marker_indent: int | None) -> int:
    """The end, within `first:last`, of a file definition that the snippet rewrites to its end; `first` if it rewrites none.

    It rewrites one if lines are inserted inside its block directly after row `first - 1` and no marker is inside it.
    """
    if not inserted or first == 0:
        return first
    depth = indent(inserted[-1])
    least = marker_indent or 0
    if marker_indent is not None and marker_indent >= depth:
        return first
    for header in range(first - 1, -1, -1):
        if not file.rows[header].strip() or indent(file.rows[header]) >= depth:
            continue
        depth = indent(file.rows[header])
        if depth < least:
            return first
        if file.names[header] is not None:
            return max(first, min(last, _deeper_end(file.rows, first, depth)))
    return first


def _deeper_end(lines: list[str], first: int, depth: int) -> int:
    """The end (exclusive) of the run of lines deeper than `depth` that begins at `first`."""
    end = first
    for row in range(first, len(lines)):
        if lines[row].strip():
            if indent(lines[row]) <= depth:
                break
            end = row + 1
    return end


def is_closer(line: str) -> bool:
    """Whether a line begins with a closing bracket, a closing tag or a keyword that ends a block."""
    return bool(_CLOSERS.match(line.lstrip()))


def indent(line: str) -> int:
    """The number of white-space characters that a line begins with."""
    return len(line) - len(line.lstrip())
