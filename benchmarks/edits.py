"""Edits with a known result, from three sources: what the merge by rule and its checks are measured on."""

from __future__ import annotations

import ast
import difflib
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import common

from paceline.tasks.snippet import is_marker, snippet_of


@dataclass(frozen=True)
class Case:
    """A file, an edit of it, and the file that the edit should give. `path` names the language."""

    path: str
    before: str
    update: str
    after: str
    instruction: str = ""


def git_cases(
    path: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    context: int = 3,
) -> list[Case]:
    """Commits of git_edits.jsonl.gz, or a file of its form; each snippet made by rule from the commit's difference."""
    return [
        Case(
            edit.get("path", "file.py"),
            edit["before"],
            snippet_of(edit["before"], edit["after"], edit.get("path"), context),
            edit["after"],
            edit.get("subject", ""),
        )
        for edit in common.load_edits(path, split, limit, max_tokens or sys.maxsize)
    ]


def block_cases() -> list[Case]:
    """Replies of models whose SEARCH/REPLACE blocks gave a commit, without the text around the blocks."""
    records = common.read_records(common.data_path("edits/aider_llm_edits.jsonl.gz"))
    return [
        Case(record["path"], record["before"], _blocks(record["blocks"]), record["after"], record["user"])
        for record in records
    ]


def lazy_cases() -> list[Case]:
    """Files of continue_lazy_apply: original, lazy snippet and marked result. White space at the ends is not theirs."""
    cases = []
    for file in sorted(common.data_path("edits/continue_lazy_apply").glob("*.diff")):
        parts = [part.strip("\n") for part in re.split(r"^---$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)]
        if len(parts) != 3:
            sys.exit(f"{file.name} does not have three parts")
        cases.append(Case(file.name.removesuffix(".diff"), parts[0] + "\n", parts[1] + "\n", _result(parts[2])))
    return cases


def _blocks(blocks: list[dict[str, str]]) -> str:
    return "".join(
        f"<<<<<<< SEARCH\n{_closed(block['search'])}=======\n{_closed(block['replace'])}>>>>>>> REPLACE\n"
        for block in blocks
    )


def _closed(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _result(marked: str) -> str:
    """The text after a marked difference: "- " lines go, "+ " lines come."""
    lines = [line for line in marked.split("\n") if not re.match(r"-( |$)", line)]
    return "\n".join(line[2:] if re.match(r"\+( |$)", line) else line.rstrip() for line in lines) + "\n"


def opcodes(before: list[str], after: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's groups of changed lines, without the equal ones."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return [group for group in matcher.get_opcodes() if group[0] != "equal"]


def functions_snippet(case: Case) -> str:
    """A snippet in a model's manner: changed functions whole, other changes with two lines around, flush markers."""
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
    """The one function that holds the whole change, without any marker; None where the change is not in one."""
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
    """First line, and line past the last, of every function with its decorators; none where the text does not parse."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [
        (min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1, node.end_lineno or node.lineno)
        for node in found
    ]
