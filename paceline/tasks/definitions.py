"""Definitions in source text, by name and indent alone: where they begin and end, in languages that indent blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from paceline.tasks.names import LEADS, Name, names_of

_CLOSERS = re.compile(r"[)\]}]|</|(?:end|fi|done|esac)\b|end\w*$", re.IGNORECASE)


class Code:
    """Rows of code; `names` says of each what it begins to define, `headers` where each definition begins."""

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
        """The row past the last of the block that begins at `header`: deeper rows, and what closes brackets beside it."""
        depth = indent(self.rows[header])
        stop = header + 1
        opened = False  # whether an opening bracket stands alone in the row under the header
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
        """The first row of the decorators and comments right above a definition."""
        start = header
        while (
            start > 0
            and self.rows[start - 1].strip().startswith(LEADS)
            and indent(self.rows[start - 1]) >= indent(self.rows[header])
        ):
            start -= 1
        return start

    def around(self, row: int) -> list[int]:
        """The rows of the definitions that `row` is in, the innermost first."""
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


def definitions_of(code: Code) -> list[tuple[int, int, int]] | None:
    """Start, header and end of each definition where a snippet is nothing but whole definitions, else None."""
    depth = min(indent(row) for row in code.rows if row.strip())
    blocks: list[tuple[int, int, int]] = []
    reached = 0
    for row, line in enumerate(code.rows):
        if row < reached or not line.strip() or line.strip().startswith(LEADS):
            continue
        if indent(line) != depth or code.names[row] is None:
            return None
        start = max(reached, code.block_start(row))
        if any(each.strip() for each in code.rows[reached:start]):
            return None
        reached = code.block_end(row)
        blocks.append((start, row, reached))
    return blocks if blocks and not any(line.strip() for line in code.rows[reached:]) else None


def with_markers_understood(file: Code, snippet: Code) -> tuple[list[str], list[bool]]:
    """A snippet without markers, and one at each end and between known outermost definitions and what is around them.

    Not where the snippet is the whole file, from its first line to its last.
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
    bare = True  # whether nothing but blank lines has come since the last marker
    for row in range(full[0], full[-1] + 2):
        if row in cuts and (not markers or not bare):
            following = next((line for line in rows[row : full[-1] + 1] if line.strip()), "")
            result.append(" " * indent(following) + "...")
            markers.append(True)
            bare = True
        if row <= full[-1]:
            result.append(rows[row])
            markers.append(False)
            bare = bare and not rows[row].strip()
    return result, markers


def shown_whole(snippet: Code, markers: list[bool], row: int) -> int | None:
    """The header of a definition that begins below the marker before `row` and ends with `row`, as the one after says."""
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
    """The first line of the decorators right above a definition, those over several lines too."""
    start = row = header
    while row > 0 and lines[row - 1].strip() and indent(lines[row - 1]) >= indent(lines[header]):
        row -= 1
        if indent(lines[row]) == indent(lines[header]):
            if lines[row].startswith("@", indent(lines[row])):
                start = row
            elif lines[row].strip()[0] not in ")]}":
                break
    return start


def new_definitions(file: Code, snippet: Code, markers: list[bool], matches: list[int], same: list[bool]) -> list[bool]:
    """Markers, and the rows of definitions that are new: what these have in common with the file is a coincidence.

    A definition is new where the file has none of its name, and little of its body was found, or found scattered, or no
    row was found beside it: the edit then does not show that another one becomes it. `same` says of a matched row that
    its text is the file's.
    """
    barred = markers[:]
    for row, name in enumerate(snippet.names):
        if name is None or name in file.headers or barred[row]:
            continue
        stop = snippet.block_end(row)
        full = [each for each in range(row, stop) if len(snippet.rows[each].strip()) > 2]
        found = [matches[each] for each in full if same[each]]
        if any(markers[row:stop]):
            continue
        start = snippet.block_start(row)
        body = [matches[each] for each in range(row + 1, stop) if snippet.rows[each].strip()]
        entire = bool(body) and all(each >= 0 for each in body) and len(found) >= len(full) - 1
        beside = _found_beside(snippet, markers, same, range(start - 1, -1, -1)) and (
            entire or _found_beside(snippet, markers, same, range(stop, len(markers)))
        )
        if not beside or not found or len(found) * 2 < len(full) or found[-1] - found[0] > 2 * (stop - row) + 2:
            while stop < len(barred) and not snippet.rows[stop].strip():
                stop += 1
            while start > 0 and not snippet.rows[start - 1].strip():
                start -= 1
            barred[start:stop] = [True] * (stop - start)
    return barred


def _found_beside(snippet: Code, markers: list[bool], same: list[bool], rows: range) -> bool:
    """Whether the first row of `rows` that is not blank was found in the file."""
    row = next((each for each in rows if markers[each] or snippet.rows[each].strip()), None)
    return row is not None and not markers[row] and same[row]


def rewritten_to(file: Code, first: int, last: int, inserted: list[str], marker_indent: int | None) -> int:
    """Where in `first:last` a definition that the snippet rewrites to its end ends in the file; `first` where not.

    It does when lines are inserted inside its block, right after line `first - 1`, and no marker stands inside it.
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
            return max(first, min(last, _deeper(file.rows, first, depth)))
    return first


def _deeper(lines: list[str], first: int, depth: int) -> int:
    """The line past the last that is deeper than `depth`, from `first` on."""
    end = first
    for row in range(first, len(lines)):
        if lines[row].strip():
            if indent(lines[row]) <= depth:
                break
            end = row + 1
    return end


def is_closer(line: str) -> bool:
    """Whether a line begins with what closes a block: a bracket, a tag or a word for it."""
    return bool(_CLOSERS.match(line.lstrip()))


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())
