"""Edit snippets of a known change in the styles in which models write them."""

from __future__ import annotations

import ast
import difflib
import random
import re
import textwrap
from collections.abc import Callable

from benchmarks.data.edits import Case
from paceline.tasks.snippet import is_marker, snippet_of

_PARAPHRASES = (
    "# ...", "# rest unchanged", "// ...", "# (rest of the code stays the same)", "# ... unchanged ...", "# existing code",
    "# [rest of the file]", "# same as before", "# ... (other methods)", "# keep the rest as is", "...",
)  # fmt: skip
_MARKER = re.compile(r"^# \.\.\. existing code \.\.\.\n", re.MULTILINE)


def opcodes(before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's groups of changed lines, without the equal ones."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [group for group in matcher.get_opcodes() if group[0] != "equal"]


def functions_snippet(case: Case) -> str:
    """Changed functions whole, other changes with two lines around, markers at the left margin."""
    new = case.after.splitlines()
    spans = _functions(case.after)
    shown: set[int] = set()
    for _, _, _, first, last in opcodes(case.before.splitlines(), new):
        around = [span for span in spans if span[0] <= first - (first == last) and last + (first == last) <= span[1]]
        start, stop = min(around, key=lambda span: span[1] - span[0], default=(first - 2, last + 2))
        shown |= set(range(max(0, start), min(len(new), stop)))
    pieces: list[str] = []
    reached = 0
    for row in [*sorted(shown), len(new)]:
        if row > reached:
            pieces.append("# ... existing code ...")
        pieces += new[row : row + 1]
        reached = row + 1
    return "\n".join(pieces) + "\n"


def lone_function(case: Case) -> str | None:
    """The one function that holds the whole change, without a marker; None where no one function holds it."""
    parts = [
        part
        for part in re.split(r"^# \.\.\. existing code \.\.\.\n", functions_snippet(case), flags=re.MULTILINE)
        if part
    ]
    named = len(parts) == 1 and re.match(r"\s*(@|async def|def)", parts[0])
    return parts[0] if named else None


def dedented_snippet(case: Case) -> str:
    """The case's snippet with each segment moved to the left margin, as chat models write methods."""
    segments: list[list[str]] = [[]]
    for line in case.update.splitlines():
        if is_marker(line):
            segments += [[line.strip()], []]
        else:
            segments[-1].append(line)
    return "\n".join(textwrap.dedent("\n".join(segment)) for segment in segments if segment) + "\n"


def _functions(text: str) -> list[tuple[int, int]]:
    """[first line, line past the last) of every function with its decorators; none where the text does not parse."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        (min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1, node.end_lineno or node.lineno)
        for node in found
    ]


def paraphrased(case: Case) -> str:
    """The case's snippet with markers in other words."""
    words = random.Random(case.update).choice(_PARAPHRASES)
    lines = case.update.splitlines(keepends=True)
    return "".join(re.sub(r"\S.*", words, line, count=1) if is_marker(line) else line for line in lines)


def unmarked(case: Case) -> str:
    """The parts of the case's snippet, one after the other."""
    return "".join(line for line in case.update.splitlines(keepends=True) if not is_marker(line))


def marked_inside(case: Case) -> str:
    """The case's snippet with markers between its parts only."""
    return "# ... existing code ...\n".join(_parts(case.update))


def functions_unmarked(case: Case) -> str | None:
    """Changed functions whole, other changes with two lines around; None where a part begins inside a function."""
    parts = [part.strip("\n") for part in _MARKER.split(functions_snippet(case)) if part.strip()]
    whole = all(not part[0].isspace() or re.match(r"\s*(@|async def|def|class)\b", part) for part in parts)
    return "\n\n".join(parts) + "\n" if whole else None


def led_up_to(case: Case) -> str:
    """Each change with three lines before it and none after."""
    new = case.after.splitlines()
    rows: set[int] = set()
    for _, _, _, first, last in opcodes(case.before.splitlines(), new):
        rows |= set(range(max(0, first - 3), last))
    pieces: list[str] = []
    reached = 0
    for row in [*sorted(rows), len(new)]:
        if row > reached:
            pieces.append("# ... existing code ...")
        pieces += new[row : row + 1]
        reached = row + 1
    return "\n".join(pieces) + "\n"


def _parts(update: str) -> list[str]:
    parts = [""]
    for line in update.splitlines(keepends=True):
        parts = [*parts, ""] if is_marker(line) else [*parts[:-1], parts[-1] + line]
    return [part for part in parts if part.strip()]


STYLES: dict[str, Callable[[Case], str | None]] = {
    "3 lines around": lambda case: case.update,
    "2 lines around": lambda case: snippet_of(case.before, case.after, case.path, 2),
    "1 line around": lambda case: snippet_of(case.before, case.after, case.path, 1),
    "whole functions": functions_snippet,
    "whole functions, no marker": functions_unmarked,
    "one function, no marker": lone_function,
    "at the left margin": dedented_snippet,
    "markers in other words": paraphrased,
    "markers inside only": marked_inside,
    "no marker": unmarked,
    "lines before only": led_up_to,
}
