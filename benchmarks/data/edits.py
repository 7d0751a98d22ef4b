"""Edits with a known result, from three sources: the merge by rule and its checks are measured on them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data.files import data_path, load_edits, read_records
from paceline.tasks.snippet import comment_leader, snippet_of


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
        for edit in load_edits(path, split, limit, max_tokens or sys.maxsize)
    ]


def block_cases() -> list[Case]:
    """Replies of models whose SEARCH/REPLACE blocks gave a commit, without the text around the blocks."""
    records = read_records(data_path("edits/aider_llm_edits.jsonl.gz"))
    return [
        Case(record["path"], record["before"], _blocks(record["blocks"]), record["after"], record["user"])
        for record in records
    ]


def lazy_cases() -> list[Case]:
    """Files of continue_lazy_apply: original, lazy snippet and marked result, without white space at their ends."""
    cases = []
    for file in sorted(data_path("edits/continue_lazy_apply").glob("*.diff")):
        parts = [part.strip("\n") for part in re.split(r"^---$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)]
        if len(parts) != 3:
            sys.exit(f"{file.name} does not have three parts")
        cases.append(Case(file.name.removesuffix(".diff"), parts[0] + "\n", parts[1] + "\n", _result(parts[2])))
    return cases


def replies(markers: bool) -> list[Case]:
    """The REPLACE parts of models' replies (aider), without their SEARCH parts, with or without markers between them."""
    cases = []
    for record in read_records(data_path("edits/aider_llm_edits.jsonl.gz")):
        opening, closing = comment_leader(record["path"])
        marker = f"{opening}... existing code ...{closing}\n" if markers else "\n"
        parts = "".join(block["replace"].rstrip("\n") + "\n" + marker for block in record["blocks"])
        cases.append(Case(record["path"], record["before"], (marker if markers else "") + parts, record["after"]))
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
