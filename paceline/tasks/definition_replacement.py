"""Merges a snippet that consists of whole definitions: each replaces the file's definition of the same name."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from functools import cache

from paceline.tasks.definitions import Code, indent, whole_definitions
from paceline.tasks.matching_blocks import matching_blocks
from paceline.tasks.names import Name


def replace_definitions(
    file: Code, snippet: Code, removed: Collection[str] = ()
) -> tuple[list[int | str], tuple[str, ...]] | None:
    """(result rows, warnings), with each definition of the snippet in place of the file's of the same name.

    A new definition goes after the one before it in the snippet, or else before the one after it. If the snippet shows only
    the beginning of a definition, the rest of the file's stays. A file definition between two that are neighbours in the
    snippet is deleted if its name is in `removed`. None if the snippet holds more than definitions, or if the file has none of
    their names.
    """
    blocks = whole_definitions(snippet)
    if blocks is None:
        return None

    @cache
    def body_at(header: int) -> set[str]:
        return {line.strip() for line in file.rows[header : file.block_end(header)]}

    edits: list[tuple[int, int, list[str]]] = []
    warnings: list[str] = []
    pending: list[str] = []
    named = set(snippet.names)
    reached = replaced_end = 0
    for start, header, stop in blocks:
        blanks, text = snippet.rows[reached:start], snippet.rows[start:stop]
        reached = stop
        places = file.headers.get(snippet.names[header] or ("", ""), [])
        place, new_warnings = _definition_to_replace(
            file, places[bisect_left(places, replaced_end) :], snippet.rows[header], text, body_at
        )
        warnings += new_warnings
        if place is None:
            # a file definition that the snippet does not name may be this one under its old name
            others = (row for name, rows in file.headers.items() if name not in named for row in rows)
            body = {line.strip() for line in snippet.rows[header + 1 : stop]} - {""}
            if any(len(body & body_at(row)) * 2 > len(body) for row in others):
                warnings.append(f"{_title(snippet, header)} is much like a definition of the file with another name")
            pending += [*blanks, *text] if edits or pending else text
            continue
        if not edits and pending:
            text = [*pending, *blanks, *text]
        elif pending:
            edits[-1][2].extend(_reindented(pending, snippet.rows[header], file.rows[place]))
        elif edits:
            edits += _removed_between(file, replaced_end, place, named, removed)
        pending = []
        first = max(replaced_end, file.block_start(place)) if start < header else place
        replaced_end = file.block_end(place)
        num_replaced = _num_replaced_rows(file.rows[place:replaced_end], snippet.rows[header:stop])
        warnings += _replacement_warnings(file, place, replaced_end, snippet, header, stop, num_replaced)
        edits.append((first, place + num_replaced, _reindented(text, snippet.rows[header], file.rows[place])))
    if not edits:
        return None
    edits[-1][2].extend(_reindented(pending, snippet.rows[blocks[0][1]], file.rows[edits[-1][0]]))
    result: list[int | str] = []
    reached = 0
    for first, last, text in edits:
        result += [*range(reached, first), *_with_file_rows(file.rows[first:last], first, text)]
        reached = last
    return result + list(range(reached, len(file.rows))), tuple(warnings)


def _with_file_rows(rows: list[str], first: int, text: list[str]) -> list[int | str]:
    """`text` as result rows in place of file rows from `first` on. Rows that both have stay the file's own."""
    result: list[int | str] = list(text)
    for start, other, size in matching_blocks([row.rstrip() for row in rows], [row.rstrip() for row in text]):
        result[other : other + size] = range(first + start, first + start + size)
    return result


def _removed_between(
    file: Code, start: int, stop: int, named: set[Name | None], removed: Collection[str]
) -> list[tuple[int, int, list[str]]]:
    """Edits that delete the rows between two definitions if those rows are definitions that are all to be removed."""
    stop = file.block_start(stop)
    inside = [row for row in range(start, stop) if file.rows[row].strip()]
    if not inside or not removed:
        return []
    blocks = whole_definitions(Code(file.rows[inside[0] : stop]))
    headers = [inside[0] + header for _, header, _ in blocks or ()]
    if not headers or any(
        file.names[row] in named or (file.names[row] or ("", ""))[1] not in removed for row in headers
    ):
        return []
    return [(inside[0], stop, [])]


def _title(code: Code, header: int) -> str:
    return repr(code.rows[header].strip())


def _replacement_warnings(
    file: Code, place: int, replaced_end: int, snippet: Code, header: int, stop: int, num_replaced: int
) -> list[str]:
    """Warnings about replacing the first `num_replaced` file rows of `place:replaced_end` by snippet rows `header:stop`."""
    block, text = file.rows[place:replaced_end], snippet.rows[header:stop]
    title = _title(snippet, header)
    body = {line.strip() for line in text if len(line.strip()) > 2}
    deleted = {line.strip() for line in block[:num_replaced] if len(line.strip()) > 2}
    warnings = []
    if num_replaced < len(block) and not _starts_with(block, text):
        warnings.append(f"{title} is not shown to its end: what follows may stay or go")
    if len(deleted - body) > len(body):
        warnings.append(f"more of {title} would go than the edit shows")
    named = set(snippet.names[header:stop])
    own = set(file.names[place:replaced_end])
    if any(name in file.headers and name not in own for name in snippet.names[header + 1 : stop] if name):
        warnings.append(f"{title} has definitions in it that the file has elsewhere")
    if any(name not in named for name in file.names[place : place + num_replaced] if name):
        warnings.append(f"{title} is shown without definitions that are in it: they may stay or go")
    return warnings


def _num_replaced_rows(block: list[str], text: list[str]) -> int:
    """The number of rows of the file's definition (`block`) that the snippet's (`text`) replaces."""
    full = [row for row, line in enumerate(block) if line.strip()]
    number = sum(bool(line.strip()) for line in text)
    if _starts_with(block, text):
        return full[number - 1] + 1
    last = [line.strip() for line in text if line.strip()][-1]
    if not any(character.isalnum() for character in last) or last == block[-1].strip():
        return len(block)
    return next((row + 1 for row in range(len(block) - 1, -1, -1) if block[row].strip() == last), len(block))


def _starts_with(block: list[str], text: list[str]) -> bool:
    """Whether the non-blank rows of `block` begin with those of `text`."""
    full = [line.strip() for line in text if line.strip()]
    return [line.strip() for line in block if line.strip()][: len(full)] == full


def _definition_to_replace(
    file: Code, places: list[int], header: str, text: list[str], body_at: Callable[[int], set[str]]
) -> tuple[int | None, list[str]]:
    """(the header, of those of one name, whose block shares most rows with `text`; warnings)."""
    if not places:
        return None, []
    body = {line.strip() for line in text if len(line.strip()) > 2}

    def num_shared(place: int) -> int:
        return len((body - {header.strip()}) & body_at(place))

    def rank(place: int) -> tuple[int, bool, bool]:
        return num_shared(place), file.rows[place].strip() == header.strip(), indent(file.rows[place]) == indent(header)

    best = max(places, key=rank)
    equal = [place for place in places if rank(place) == rank(best)]
    title = header.strip()
    if len(equal) > 1 or (len(places) > 1 and (num_shared(best) + 1) * 2 <= len(body)):
        numbers = " and ".join(str(place + 1) for place in (equal if len(equal) > 1 else places))
        return best, [f"{title!r} is defined in several places, at lines {numbers}: which one is meant is not shown"]
    if num_shared(best) == 0 and len(body) > 1 and not _has_same_header(file, best, header, text):
        return best, [f"{title!r} has nothing in common with line {best + 1}, of the same name: it may be another one"]
    return best, []


def _has_same_header(file: Code, place: int, header: str, text: list[str]) -> bool:
    """Whether `text` has the same header as the definition at `place`, and the same decorators or none."""
    start = file.block_start(place)
    decorators = [row.strip() for row in file.rows[start:place] if row.strip().startswith("@")]
    own = [row.strip() for row in text[: [*map(str.strip, text)].index(header.strip())] if row.strip().startswith("@")]
    return file.rows[place].strip() == header.strip() and (not own or own == decorators)


def _reindented(text: list[str], header: str, place: str) -> list[str]:
    """Lines shifted by the difference between the indents of the file's header (`place`) and the snippet's."""
    amount = indent(place) - indent(header)
    if amount <= 0:
        return [line[min(-amount, indent(line)) :] for line in text]
    return [place[:1] * amount + line if line.strip() else line for line in text]
