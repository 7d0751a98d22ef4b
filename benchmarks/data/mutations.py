"""Ways in which a merge goes wrong, applied to right results: the faults that the checks of Fast Apply must find."""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.data.edits import Case
from benchmarks.data.snippets import opcodes
from paceline.tasks.snippet import is_marker

Mutation = Callable[[Case, random.Random], str | None]


def _drop_line(case: Case, source: random.Random) -> str | None:
    lines = case.after.splitlines(keepends=True)
    del lines[source.choice(_full(lines))]
    return "".join(lines)


def _drop_untouched_block(case: Case, source: random.Random) -> str | None:
    lines = case.after.splitlines(keepends=True)
    start = source.randrange(len(lines))
    return "".join(lines[:start] + lines[start + 8 :])


def _repeat_block(case: Case, source: random.Random) -> str | None:
    lines = case.after.splitlines(keepends=True)
    start = source.randrange(max(1, len(lines) - 6))
    return "".join(lines[: start + 6] + lines[start:])


def _cut_tail(case: Case, source: random.Random) -> str | None:
    lines = case.after.splitlines(keepends=True)
    return "".join(lines[: source.randrange(len(lines) // 2, max(len(lines) // 2 + 1, len(lines) - 1))])


def _leave_marker(case: Case, source: random.Random) -> str | None:
    markers = [line for line in case.update.splitlines(keepends=True) if is_marker(line)]
    lines = case.after.splitlines(keepends=True)
    lines.insert(source.randrange(len(lines) + 1), markers[0] if markers else "# ... existing code ...\n")
    return "".join(lines)


def _swap_lines(case: Case, source: random.Random) -> str | None:
    lines = case.after.splitlines(keepends=True)
    place = source.choice(_full(lines)[:-1] or [0])
    if place + 1 >= len(lines):
        return None
    lines[place], lines[place + 1] = lines[place + 1], lines[place]
    return "".join(lines)


def _change_line(case: Case, source: random.Random) -> str | None:
    """One word of one line of the file, anywhere, is another."""
    lines = case.after.splitlines(keepends=True)
    place = source.choice(
        [index for index in _full(lines) if any(word.isidentifier() for word in lines[index].split())] or [0]
    )
    words = [word for word in lines[place].split() if word.isidentifier()]
    if not words:
        return None
    lines[place] = lines[place].replace(source.choice(words), "value", 1)
    return "".join(lines)


def _keep_deleted(case: Case, source: random.Random) -> str | None:
    """The first group of removed lines stays, after what replaces it."""
    group = _first_change(case, removed=True)
    if group is None:
        return None
    before, lines = case.before.splitlines(keepends=True), case.after.splitlines(keepends=True)
    return "".join(lines[: group[3]] + before[group[0] : group[1]] + lines[group[3] :])


def _forget_insert(case: Case, source: random.Random) -> str | None:
    """The first group of new lines is left out."""
    group = _first_change(case, removed=False)
    if group is None:
        return None
    lines = case.after.splitlines(keepends=True)
    return "".join(lines[: group[2]] + lines[group[3] :])


def _file_as_it_was(case: Case, source: random.Random) -> str | None:
    return case.before


def _first_change(case: Case, removed: bool) -> tuple[int, int, int, int] | None:
    """Lines of the file and of the result, as ranges, of the first change that removes, or adds, more than blanks."""
    before, after = case.before.splitlines(keepends=True), case.after.splitlines(keepends=True)
    for _, *group in opcodes(before, after):
        lines = before[group[0] : group[1]] if removed else after[group[2] : group[3]]
        if any(line.strip() for line in lines):
            return group[0], group[1], group[2], group[3]
    return None


def _full(lines: list[str]) -> list[int]:
    return [index for index, line in enumerate(lines) if line.strip()] or [0]


MUTATIONS: dict[str, Mutation] = {
    "a line dropped": _drop_line,
    "eight lines dropped": _drop_untouched_block,
    "six lines repeated": _repeat_block,
    "tail cut off": _cut_tail,
    "marker left": _leave_marker,
    "two lines swapped": _swap_lines,
    "a word changed": _change_line,
    "removed lines kept": _keep_deleted,
    "new lines forgotten": _forget_insert,
    "file unchanged": _file_as_it_was,
}
