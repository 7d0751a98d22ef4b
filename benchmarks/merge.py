"""The merge by rule and the checks, without a model: how often the candidate merge is right, and what the checks see.

    python benchmarks/merge.py [--edits FILE] [--limit N]

The snippets of git_edits are made by rule from each commit's difference, in the styles of `STYLES`; rules were tuned
on train, dev only reports. "exact" is equal to the commit's text, "tree" is exact or equal in syntax tree, "flagged" is
doubtful or refused, "wrong" neither equal in tree nor flagged. For the checks, each true result is changed in one way
(`MUTATIONS`); "seen" is the share of changed results that are flagged, "false_flags" the share of true results that are.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import edits
from common import finish, quantiles
from edits import Case

from paceline.errors import InputError
from paceline.tasks.checks import check, same_syntax_tree
from paceline.tasks.merge import candidate_merge
from paceline.tasks.snippet import comment_leader, is_marker, snippet_of

_PARAPHRASES = (
    "# ...", "# rest unchanged", "// ...", "# (rest of the code stays the same)", "# ... unchanged ...", "# existing code",
    "# [rest of the file]", "# same as before", "# ... (other methods)", "# keep the rest as is", "...",
)  # fmt: skip
_MARKER = re.compile(r"^# \.\.\. existing code \.\.\.\n", re.MULTILINE)


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
    parts = [part.strip("\n") for part in _MARKER.split(edits.functions_snippet(case)) if part.strip()]
    whole = all(not part[0].isspace() or re.match(r"\s*(@|async def|def|class)\b", part) for part in parts)
    return "\n\n".join(parts) + "\n" if whole else None


def led_up_to(case: Case) -> str:
    """Each change with three lines before it and none after it."""
    new = case.after.splitlines()
    rows: set[int] = set()
    for _, _, _, first, last in edits.opcodes(case.before.splitlines(), new):
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


def replies(markers: bool) -> list[Case]:
    """What models wrote to replace code (aider's REPLACE parts), without what they wanted replaced."""
    cases = []
    for record in common.read_records(common.data_path("edits/aider_llm_edits.jsonl.gz")):
        opening, closing = comment_leader(record["path"])
        marker = f"{opening}... existing code ...{closing}\n" if markers else "\n"
        parts = "".join(block["replace"].rstrip("\n") + "\n" + marker for block in record["blocks"])
        cases.append(Case(record["path"], record["before"], (marker if markers else "") + parts, record["after"]))
    return cases


STYLES: dict[str, Callable[[Case], str | None]] = {
    "3 lines around": lambda case: case.update,
    "2 lines around": lambda case: snippet_of(case.before, case.after, case.path, 2),
    "1 line around": lambda case: snippet_of(case.before, case.after, case.path, 1),
    "whole functions": edits.functions_snippet,
    "whole functions, no marker": functions_unmarked,
    "one function, no marker": edits.lone_function,
    "at the left margin": edits.dedented_snippet,
    "markers in other words": paraphrased,
    "markers inside only": marked_inside,
    "no marker": unmarked,
    "lines before only": led_up_to,
}
Mutation = Callable[[Case, random.Random], str | None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=Path, help="a file in the form of git_edits.jsonl.gz")
    parser.add_argument("--limit", type=int, help="at most so many edits of each split")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--show", action="store_true", help="name the merges that are not exact")
    arguments = parser.parse_args()

    train = edits.git_cases(arguments.edits, "train", arguments.limit)
    dev = edits.git_cases(arguments.edits, "dev", arguments.limit)
    sets = {
        f"{split}, {style}": [replace(case, update=update) for case in cases if (update := make(case))]
        for split, cases in (("train", train), ("dev", dev))
        for style, make in STYLES.items()
    }
    sets["aider blocks"] = edits.block_cases()
    sets["aider replies"], sets["aider replies, no marker"] = replies(True), replies(False)
    sets["continue lazy (white space aside)"] = edits.lazy_cases()
    merges = {name: measure(name, cases, arguments.show) for name, cases in sets.items()}
    long_file = one_long_file(train)
    print(f"a file of {long_file['lines']} lines: {long_file['milliseconds']} ms")
    result = {"benchmark": "merge", "merges": merges, "long_file": long_file}
    if not arguments.skip_checks:
        result["checks"] = {name: judge(name, sets[name]) for name in sets if "3 lines" in name or "whole" in name}
    finish(result)


def measure(name: str, cases: list[Case], show: bool) -> dict[str, Any]:
    """How many candidate merges are the true result, how many are flagged, and how many wrong: neither."""
    exact = tree = refused = flagged = wrong = 0
    seconds = []
    for case in cases:
        began = time.perf_counter()
        try:
            text = candidate_merge(case.before, case.update).text
        except InputError:
            text, refused = "", refused + 1
        seconds.append(time.perf_counter() - began)
        right = text == case.after if "lazy" not in name else text.split() == case.after.split()
        exact += right
        equal = right or same_syntax_tree(text, case.after, case.path)
        tree += equal
        doubtful = bool(check(case.before, case.update, text, case.path))
        flagged += doubtful
        wrong += not equal and not doubtful
        if show and not right:
            print(f"  not exact: {case.path}")
    counts = {"cases": len(cases), "exact": exact, "tree": tree, "refused": refused, "flagged": flagged, "wrong": wrong}
    rate = exact / max(1, len(cases))
    times = {part: round(1000 * value, 2) for part, value in quantiles(seconds).items()}
    print(
        f"{name:36} exact {exact:4} of {len(cases):4} ({rate:.1%}), tree {tree:4}, flagged {flagged:4}, wrong {wrong:3}"
    )
    return {**counts, "exact_rate": round(rate, 4), "milliseconds": times}


def one_long_file(cases: list[Case]) -> dict[str, Any]:
    """The time of one merge into 3,000 lines of many files joined, and whether it is right."""
    before: list[str] = []
    after: list[str] = []
    for case in cases:
        if len(before) < 3000:
            before += case.before.splitlines()
            after += case.after.splitlines() if len(before) in range(1400, 1800) else case.before.splitlines()
    old, new = "\n".join(before) + "\n", "\n".join(after) + "\n"
    update = snippet_of(old, new, "file.py")
    began = time.perf_counter()
    text = candidate_merge(old, update).text if old != new else new
    milliseconds = round(1000 * (time.perf_counter() - began), 1)
    return {"lines": len(before), "milliseconds": milliseconds, "exact": text == new}


def judge(name: str, cases: list[Case]) -> dict[str, Any]:
    """What the checks say of true results, of candidate merges that are wrong, and of results changed in one way."""
    flagged = [case for case in cases if check(case.before, case.update, case.after, case.path)]
    wrong = unseen = 0
    for case in cases:
        try:
            text = candidate_merge(case.before, case.update).text
        except InputError:
            continue
        if not same_syntax_tree(text, case.after, case.path):
            wrong += 1
            unseen += not check(case.before, case.update, text, case.path)
    outcome: dict[str, Any] = {
        "cases": len(cases),
        "false_flags": round(len(flagged) / max(1, len(cases)), 4),
        "wrong_candidates": wrong,
        "wrong_candidates_unseen": unseen,
        "seen": {mutation: seen(mutate, cases) for mutation, mutate in MUTATIONS.items()},
    }
    print(f"{name}: {outcome}")
    return outcome


def seen(mutate: Mutation, cases: list[Case]) -> float:
    """The share of changed results that the checks flag; results that the change leaves equal in tree do not count."""
    source = random.Random(0)
    flagged = count = 0
    for case in cases:
        text = mutate(case, source)
        if text is None or same_syntax_tree(text, case.after, case.path):
            continue
        count += 1
        flagged += bool(check(case.before, case.update, text, case.path))
    return round(flagged / max(1, count), 4)


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
    for _, *group in edits.opcodes(before, after):
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

if __name__ == "__main__":
    main()
