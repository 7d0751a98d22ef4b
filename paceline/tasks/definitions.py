"""Definitions in source text, by name and indent alone: where they begin and end, in languages that indent blocks."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Container
from functools import cache

_MODIFIERS = ("export", "default", "public", "private", "protected", "static", "async", "pub", "abstract", "override")
_KINDS = (
    "def", "class", "function", "fn", "func", "interface", "struct", "enum", "impl", "trait", "type", "module", "namespace",
)  # fmt: skip
_FIRST = {*_MODIFIERS, *_KINDS}
_KEYWORD = re.compile(rf"^\s*(?:(?:{'|'.join(_MODIFIERS)})\s+)*({'|'.join(_KINDS)})\s+\*?([A-Za-z_$][\w$]*)")
_METHOD = re.compile(r"^\s+(?:async\s+|static\s+|get\s+|set\s+|\*)*([A-Za-z_$][\w$]*)\s*\([^;]*\)[^;()]*\{$")
_STATEMENTS = {"if", "for", "while", "switch", "catch", "with", "return", "else"}
Name = tuple[str, str]  # of a definition: its kind, and what it is called
LEADS = ("@", "#", "//", "/*", "*", "*/")  # decorators and comments, which belong to the definition under them


def may_define(words: list[str]) -> bool:
    """Whether a line of these words can begin a definition: what is quickly seen of it."""
    return bool(words) and (words[0] in _FIRST or words[-1].endswith("{"))


def defined(line: str) -> Name | None:
    """The kind and the name of what this line begins to define."""
    if not may_define(line.split(None, 1)):
        return None
    if found := _KEYWORD.match(line):
        return found[1], found[2]
    method = _METHOD.match(line)
    return ("method", method[1]) if method and method[1] not in _STATEMENTS else None


def block_end(lines: list[str], header: int) -> int:
    """The line past the last of the block that begins at `header`: deeper lines, and what closes brackets beside it."""
    depth = indent(lines[header])
    stop = header + 1
    for row in range(header + 1, len(lines)):
        text = lines[row].lstrip()
        if not text:
            continue
        deeper = len(lines[row]) - len(text) - depth
        if deeper < 0 or (deeper == 0 and text[0] not in ")]}"):
            break
        stop = row + 1
    return stop


def block_start(lines: list[str], header: int) -> int:
    """The first line of the decorators and comments right above a definition."""
    start = header
    while (
        start > 0 and lines[start - 1].strip().startswith(LEADS) and indent(lines[start - 1]) >= indent(lines[header])
    ):
        start -= 1
    return start


def definitions_of(snippet: list[str]) -> list[tuple[int, int, int]] | None:
    """Start, header and end of each definition where the snippet is nothing but whole definitions, else None."""
    depth = min(indent(line) for line in snippet if line.strip())
    blocks: list[tuple[int, int, int]] = []
    reached = 0
    for row, line in enumerate(snippet):
        if row < reached or not line.strip() or line.strip().startswith(LEADS):
            continue
        if indent(line) != depth or defined(line) is None:
            return None
        start = max(reached, block_start(snippet, row))
        if any(each.strip() for each in snippet[reached:start]):
            return None
        reached = block_end(snippet, row)
        blocks.append((start, row, reached))
    return blocks if blocks and not any(line.strip() for line in snippet[reached:]) else None


def replace_definitions(
    lines: list[str], headers: dict[Name, list[int]], snippet: list[str]
) -> tuple[list[str], tuple[str, ...]] | None:
    """The file with each definition of the snippet in place of the file's of the same name, and what is doubtful in it.

    A new definition follows the one before it in the snippet, or else precedes the one after it. Of one that breaks off
    before the file's ends, the rest stays. None where the snippet holds more than definitions, or the file has none of
    their names.
    """
    blocks = definitions_of(snippet)
    if blocks is None:
        return None

    @cache
    def body_at(header: int) -> set[str]:
        return {line.strip() for line in lines[header : block_end(lines, header)]}

    edits: list[tuple[int, int, list[str]]] = []
    doubts: list[str] = []
    waiting: list[str] = []
    named = {defined(line) for line in snippet}
    reached = taken = 0
    for start, header, stop in blocks:
        blanks, text = snippet[reached:start], snippet[start:stop]
        reached = stop
        places = headers.get(defined(snippet[header]) or ("", ""), [])
        place = _twin(lines, places[bisect_left(places, taken) :], snippet[header], text, body_at)
        if place is None:
            # a definition of the file that the snippet does not name may be this one, renamed
            others = (row for name, rows in headers.items() if name not in named for row in rows)
            body = {line.strip() for line in snippet[header + 1 : stop]} - {""}
            if any(len(body & body_at(row)) * 2 > len(body) for row in others):
                doubts.append(f"{snippet[header].strip()!r} is much like a definition of the file with another name")
            waiting += [*blanks, *text] if edits or waiting else text
            continue
        if not edits and waiting:
            text = [*waiting, *blanks, *text]
        elif waiting:
            edits[-1][2].extend(_moved(waiting, snippet[header], lines[place]))
        waiting = []
        first = block_start(lines, place) if start < header else place
        taken = block_end(lines, place)
        block = lines[place:taken]
        shown = _shown_to(block, snippet[header:stop])
        doubts += _doubts(len(places), block, snippet[header:stop], shown)
        edits.append((first, place + shown, _moved(text, snippet[header], lines[place])))
    if not edits:
        return None
    edits[-1][2].extend(_moved(waiting, snippet[blocks[0][1]], lines[edits[-1][0]]))
    result: list[str] = []
    reached = 0
    for first, last, text in edits:
        result += [*lines[reached:first], *text]
        reached = last
    return result + lines[reached:], tuple(doubts)


def _doubts(places: int, block: list[str], text: list[str], shown: int) -> list[str]:
    """What speaks against replacing the first `shown` lines of a definition in the file by the same one in a snippet.

    The file has definitions of its name in `places`.
    """
    header = text[0].strip()
    body = {line.strip() for line in text if len(line.strip()) > 2}
    gone = {line.strip() for line in block[:shown] if len(line.strip()) > 2}
    named = {defined(line) for line in text}
    doubts = []
    if shown < len(block) and not _begins(block, text):
        doubts.append(f"{header!r} is not shown to its end: what follows may stay or go")
    if places > 1 and len(body & gone) * 2 <= len(body):
        doubts.append(f"the file has {header!r} in several places, and this one is much like none")
    if len(gone - body) > len(body):
        doubts.append(f"more of {header!r} would go than the edit shows")
    if any(defined(line) not in named for line in block[:shown] if defined(line)):
        doubts.append(f"{header!r} is shown without definitions that are in it: they may stay or go")
    return doubts


def _shown_to(block: list[str], text: list[str]) -> int:
    """How many lines of a definition in the file the same one in a snippet takes the place of."""
    full = [row for row, line in enumerate(block) if line.strip()]
    number = sum(bool(line.strip()) for line in text)
    if _begins(block, text):
        return full[number - 1] + 1
    last = [line.strip() for line in text if line.strip()][-1]
    if not any(character.isalnum() for character in last) or last == block[-1].strip():
        return len(block)
    return next((row + 1 for row in range(len(block) - 1, -1, -1) if block[row].strip() == last), len(block))


def _begins(block: list[str], text: list[str]) -> bool:
    """Whether a definition begins with just these lines."""
    full = [line.strip() for line in text if line.strip()]
    return [line.strip() for line in block if line.strip()][: len(full)] == full


def with_markers_understood(
    lines: list[str], names: Container[Name | None], snippet: list[str]
) -> tuple[list[str], list[bool]]:
    """A snippet without markers, and one at each end and between known outermost definitions and what is around them.

    Not where the snippet is the whole file, from its first line to its last.
    """
    ends = [[line.strip() for line in each if line.strip()] for each in (lines, snippet)]
    if ends[0][:1] == ends[1][:1] and ends[0][-1:] == ends[1][-1:]:
        return snippet, [False] * len(snippet)
    full = [row for row, line in enumerate(snippet) if line.strip()]
    snippet = snippet[full[0] : full[-1] + 1]
    cuts = {0, len(snippet)}
    reached = 0
    for row, line in enumerate(snippet):
        if row >= reached and defined(line) in names:
            reached = block_end(snippet, row)
            cuts |= {block_start(snippet, row), reached}
    result: list[str] = []
    markers: list[bool] = []
    bare = True  # whether nothing but blank lines has come since the last marker
    for row in range(len(snippet) + 1):
        if row in cuts and (not markers or not bare):
            following = next((line for line in snippet[row:] if line.strip()), "")
            result.append(" " * indent(following) + "...")
            markers.append(True)
            bare = True
        if row < len(snippet):
            result.append(snippet[row])
            markers.append(False)
            bare = bare and not snippet[row].strip()
    return result, markers


def shown_whole(snippet: list[str], markers: list[bool], row: int) -> int | None:
    """The header of a definition that begins below the marker before `row` and ends with `row`, as the one after says."""
    depth = indent(snippet[row]) + 1
    for header in range(row, -1, -1):
        if markers[header]:
            return None
        if snippet[header].strip() and indent(snippet[header]) < depth:
            depth = indent(snippet[header])
            if defined(snippet[header]):
                after = next((each for each in range(row + 1, len(snippet)) if markers[each]), None)
                return header if after is None or indent(snippet[after]) <= depth else None
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


def new_definitions(
    names: Container[Name], snippet: list[str], markers: list[bool], matches: list[int], same: list[bool]
) -> list[bool]:
    """Markers, and the lines of definitions that are new: what these have in common with the file is a coincidence.

    A definition is new where the file has none of its name and little of its body was found, or found scattered. `same`
    says of a matched line that its text is the file's. `names` are those of the file.
    """
    barred = markers[:]
    for row, line in enumerate(snippet):
        name = defined(line)
        if name is None or name in names or barred[row]:
            continue
        stop = block_end(snippet, row)
        full = [each for each in range(row, stop) if len(snippet[each].strip()) > 2]
        found = [matches[each] for each in full if same[each]]
        if any(markers[row:stop]):
            continue
        if len(found) * 2 < len(full) or found[-1] - found[0] > 2 * (stop - row) + 2:
            while stop < len(snippet) and not snippet[stop].strip():
                stop += 1
            start = row
            while start > 0 and not snippet[start - 1].strip():
                start -= 1
            barred[start:stop] = [True] * (stop - start)
    return barred


def rewritten_to(lines: list[str], first: int, last: int, inserted: list[str], marker_indent: int | None) -> int:
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
        if not lines[header].strip() or indent(lines[header]) >= depth:
            continue
        depth = indent(lines[header])
        if depth < least:
            return first
        if defined(lines[header]) is not None:
            return max(first, min(last, _deeper(lines, first, depth)))
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


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _twin(
    lines: list[str], places: list[int], header: str, text: list[str], body_at: Callable[[int], set[str]]
) -> int | None:
    """Of the file's headers of the same name the one whose block shares most with `text`."""
    body = {line.strip() for line in text if len(line.strip()) > 2}

    def shared(place: int) -> tuple[int, bool]:
        return len(body & body_at(place)), indent(lines[place]) == indent(header)

    return max(places, key=shared, default=None)


def _moved(text: list[str], header: str, place: str) -> list[str]:
    """Lines shifted by what one header is off another."""
    amount = indent(place) - indent(header)
    if amount <= 0:
        return [line[min(-amount, indent(line)) :] for line in text]
    return [place[:1] * amount + line if line.strip() else line for line in text]
