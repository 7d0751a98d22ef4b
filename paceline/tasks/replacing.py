"""A snippet that is nothing but whole definitions, in place of the file's own of the same names."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from functools import cache

from paceline.tasks.definitions import Code, definitions_of, indent
from paceline.tasks.names import Name
from paceline.tasks.runs import runs


def replace_definitions(
    file: Code, snippet: Code, removed: Collection[str] = ()
) -> tuple[list[int | str], tuple[str, ...]] | None:
    """The file with each definition of the snippet in place of its own of the same name, and what is doubtful in it.

    Rows that stay are given by their numbers. A new definition follows the one before it in the snippet, or else precedes
    the one after it. Of one that breaks off before the file's ends, the rest stays. A definition of the file that stands
    between two that follow each other in the snippet goes where its name is in `removed`. None where the snippet holds
    more than definitions, or the file has none of their names.
    """
    blocks = definitions_of(snippet)
    if blocks is None:
        return None

    @cache
    def body_at(header: int) -> set[str]:
        return {line.strip() for line in file.rows[header : file.block_end(header)]}

    edits: list[tuple[int, int, list[str]]] = []
    doubts: list[str] = []
    waiting: list[str] = []
    named = set(snippet.names)
    reached = taken = 0
    for start, header, stop in blocks:
        blanks, text = snippet.rows[reached:start], snippet.rows[start:stop]
        reached = stop
        places = file.headers.get(snippet.names[header] or ("", ""), [])
        place, doubt = _twin(file, places[bisect_left(places, taken) :], snippet.rows[header], text, body_at)
        doubts += doubt
        if place is None:
            # a definition of the file that the snippet does not name may be this one, renamed
            others = (row for name, rows in file.headers.items() if name not in named for row in rows)
            body = {line.strip() for line in snippet.rows[header + 1 : stop]} - {""}
            if any(len(body & body_at(row)) * 2 > len(body) for row in others):
                doubts.append(f"{_title(snippet, header)} is much like a definition of the file with another name")
            waiting += [*blanks, *text] if edits or waiting else text
            continue
        if not edits and waiting:
            text = [*waiting, *blanks, *text]
        elif waiting:
            edits[-1][2].extend(_moved(waiting, snippet.rows[header], file.rows[place]))
        elif edits:
            edits += _gone(file, taken, place, named, removed)
        waiting = []
        first = max(taken, file.block_start(place)) if start < header else place
        taken = file.block_end(place)
        shown = _shown_to(file.rows[place:taken], snippet.rows[header:stop])
        doubts += _doubts(file, place, taken, snippet, header, stop, shown)
        edits.append((first, place + shown, _moved(text, snippet.rows[header], file.rows[place])))
    if not edits:
        return None
    edits[-1][2].extend(_moved(waiting, snippet.rows[blocks[0][1]], file.rows[edits[-1][0]]))
    result: list[int | str] = []
    reached = 0
    for first, last, text in edits:
        result += [*range(reached, first), *_kept_inside(file.rows[first:last], first, text)]
        reached = last
    return result + list(range(reached, len(file.rows))), tuple(doubts)


def _kept_inside(rows: list[str], first: int, text: list[str]) -> list[int | str]:
    """Text in place of rows, the first of which is row `first` of the file; what both have is the file's own."""
    result: list[int | str] = list(text)
    for start, other, size in runs([row.rstrip() for row in rows], [row.rstrip() for row in text]):
        result[other : other + size] = range(first + start, first + start + size)
    return result


def _gone(
    file: Code, start: int, stop: int, named: set[Name | None], removed: Collection[str]
) -> list[tuple[int, int, list[str]]]:
    """Edits that take away what stands between two definitions, where that is definitions and all are to be removed."""
    stop = file.block_start(stop)
    inside = [row for row in range(start, stop) if file.rows[row].strip()]
    if not inside or not removed:
        return []
    blocks = definitions_of(Code(file.rows[inside[0] : stop]))
    headers = [inside[0] + header for _, header, _ in blocks or ()]
    if not headers or any(
        file.names[row] in named or (file.names[row] or ("", ""))[1] not in removed for row in headers
    ):
        return []
    return [(inside[0], stop, [])]


def _title(code: Code, header: int) -> str:
    return repr(code.rows[header].strip())


def _doubts(file: Code, place: int, taken: int, snippet: Code, header: int, stop: int, shown: int) -> list[str]:
    """What speaks against replacing the first `shown` rows of `place:taken` in the file by `header:stop` of a snippet."""
    block, text = file.rows[place:taken], snippet.rows[header:stop]
    title = _title(snippet, header)
    body = {line.strip() for line in text if len(line.strip()) > 2}
    gone = {line.strip() for line in block[:shown] if len(line.strip()) > 2}
    doubts = []
    if shown < len(block) and not _begins(block, text):
        doubts.append(f"{title} is not shown to its end: what follows may stay or go")
    if len(gone - body) > len(body):
        doubts.append(f"more of {title} would go than the edit shows")
    named = set(snippet.names[header:stop])
    own = set(file.names[place:taken])
    if any(name in file.headers and name not in own for name in snippet.names[header + 1 : stop] if name):
        doubts.append(f"{title} has definitions in it that the file has elsewhere")
    if any(name not in named for name in file.names[place : place + shown] if name):
        doubts.append(f"{title} is shown without definitions that are in it: they may stay or go")
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


def _twin(
    file: Code, places: list[int], header: str, text: list[str], body_at: Callable[[int], set[str]]
) -> tuple[int | None, list[str]]:
    """Of the file's headers of one name the one whose block shares most with `text`, and what speaks against it."""
    if not places:
        return None, []
    body = {line.strip() for line in text if len(line.strip()) > 2}

    def shared(place: int) -> int:
        return len((body - {header.strip()}) & body_at(place))

    def fits(place: int) -> tuple[int, bool, bool]:
        return shared(place), file.rows[place].strip() == header.strip(), indent(file.rows[place]) == indent(header)

    best = max(places, key=fits)
    equal = [place for place in places if fits(place) == fits(best)]
    title = header.strip()
    if len(equal) > 1 or (len(places) > 1 and (shared(best) + 1) * 2 <= len(body)):
        numbers = " and ".join(str(place + 1) for place in (equal if len(equal) > 1 else places))
        return best, [f"{title!r} is defined in several places, at lines {numbers}: which one is meant is not shown"]
    if shared(best) == 0 and len(body) > 1 and not _same_head(file, best, header, text):
        return best, [f"{title!r} has nothing in common with line {best + 1}, of the same name: it may be another one"]
    return best, []


def _same_head(file: Code, place: int, header: str, text: list[str]) -> bool:
    """Whether a definition has the decorators and the header of that at `place`."""
    start = file.block_start(place)
    decorators = [row.strip() for row in file.rows[start:place] if row.strip().startswith("@")]
    own = [row.strip() for row in text[: [*map(str.strip, text)].index(header.strip())] if row.strip().startswith("@")]
    return file.rows[place].strip() == header.strip() and (not own or own == decorators)


def _moved(text: list[str], header: str, place: str) -> list[str]:
    """Lines shifted by what one header is off another."""
    amount = indent(place) - indent(header)
    if amount <= 0:
        return [line[min(-amount, indent(line)) :] for line in text]
    return [place[:1] * amount + line if line.strip() else line for line in text]
