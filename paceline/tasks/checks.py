"""Checks of a merge result that need no model. A result that fails one is flagged."""

from __future__ import annotations

import difflib
from collections import Counter

from paceline.errors import InputError
from paceline.tasks.languages import num_errors, suffix_of, tree_of
from paceline.tasks.lines import Lines
from paceline.tasks.matching_blocks import matching_blocks
from paceline.tasks.merge import Merge, candidate_merge
from paceline.tasks.snippet import Marker, marker

_MAX_REASONS = 6  # bounds the output: reasons of one kind
# difflib ratio from which a line counts as a variant of an expected one; difflib's default, not tuned
_SIMILARITY = 0.6


def check(
    code: str, update: str, merged: str, path: str | None = None, candidate: Merge | None = None
) -> tuple[str, ...]:
    """The reasons why `merged` may be wrong, a sentence each; empty if every check passes.

    The result must not be empty, cut off or fenced, nor have a marker. It must parse if the file parsed. It must have every
    file line that the edit does not touch and every line of the edit, in order, and no other line, nor one too often. The
    candidate merge, made here if not given, says which lines those are; its warnings are reasons too.
    """
    if not merged.strip():
        return ("the result is empty",) if code.strip() else ()
    lines = [line.rstrip() for line in _rows(merged)]
    reasons = _syntax(code, merged, path)
    try:
        candidate = candidate or candidate_merge(code, update, path)
    except InputError as error:
        return (*_stray_markers(lines, code, path), *reasons, f"the edit could not be placed by rule: {error}")
    wanted = [line.rstrip() for line in _rows(candidate.text)]
    reasons += [*_stray_markers(lines, f"{code}\n{candidate.text}", path), *candidate.warnings]
    if lines == wanted:
        return tuple(reasons)
    known = len(reasons)
    file = [line.rstrip() for line in _rows(code)]
    kept = [(number, line) for number, (line, stays) in enumerate(zip(file, candidate.kept, strict=True), 1) if stays]
    reasons += _missing(kept, lines, "line {} of the file, which the edit does not touch, is missing: {!r}")
    edit = [(number, line.rstrip()) for number, line in enumerate(_rows(update), 1)]
    present = set(wanted)
    edit = [(number, line) for number, line in edit if line in present]
    reasons += _missing(edit, lines, "line {} of the edit is missing: {!r}")
    reasons += _unexpected_lines(lines, wanted, file)
    if [line for line in lines if line][-1:] != [line for line in wanted if line][-1:]:
        reasons.append("the result does not end as it should; it may be cut off")
    if len(reasons) == known and not same_syntax_tree(merged, candidate.text, path):
        reasons.append(_first_difference(lines, wanted))
    return tuple(reasons)


def _rows(text: str) -> list[str]:
    return Lines.of(text).rows


def same_syntax_tree(left: str, right: str, path: str | None = None) -> bool:
    """Whether two texts have the same syntax tree, comments included. White space counts only inside tokens.

    If no grammar is known for the file's name, the rows must be equal but for white space at their ends and at the text's.
    """
    if left == right:
        return True
    suffix = suffix_of(path, right)
    trees = [tree_of(text, suffix) for text in (left, right)]
    if trees[0] is not None and trees[1] is not None:
        return trees[0] == trees[1]
    return [row.rstrip() for row in left.strip().split("\n")] == [row.rstrip() for row in right.strip().split("\n")]


def _stray_markers(lines: list[str], known: str, path: str | None) -> list[str]:
    """Markers and fences that `known` does not have."""
    file = {line.rstrip() for line in _rows(known)}
    reasons = []
    for number, line in enumerate(lines, 1):
        if line in file:
            continue
        if marker(line, path) is Marker.CERTAIN:
            reasons.append(f"line {number} is a marker for left-out code: {line.strip()!r}")
        elif line.strip().startswith("```"):
            reasons.append(f"line {number} is a fence")
    return reasons[:_MAX_REASONS]


def _syntax(code: str, merged: str, path: str | None) -> list[str]:
    """A syntax error in a file that had none, or more errors than the file had."""
    suffix = suffix_of(path, code)
    errors = num_errors(merged, suffix)
    if not errors:
        return []
    before = num_errors(code, suffix) or 0
    if before == 0:
        return ["the result has a syntax error, and the file has none"]
    return [f"the result has {errors} syntax errors, and the file {before}"] if errors > before else []


def _missing(wanted: list[tuple[int, str]], lines: list[str], message: str) -> list[str]:
    """Numbered lines that `lines` does not hold in the same order. Blank lines do not count."""
    wanted = [(number, line) for number, line in wanted if line.strip()]
    common = matching_blocks([line for _, line in wanted], lines)
    found = {index for start, _, size in common for index in range(start, start + size)}
    gone = [pair for index, pair in enumerate(wanted) if index not in found]
    return [message.format(number, line.strip()) for number, line in gone[:_MAX_REASONS]]


def _first_difference(lines: list[str], wanted: list[str]) -> str:
    """The first line that differs from the candidate merge's at the same place."""
    for number, (line, other) in enumerate(zip(lines, wanted, strict=False), 1):
        if line != other:
            return f"line {number} is out of order: {line.strip()!r}"
    return f"the result has {len(lines)} lines in place of {len(wanted)}"


def _unexpected_lines(lines: list[str], wanted: list[str], file: list[str]) -> list[str]:
    """Lines that the result has more often than the candidate merge: not removed, repeated, altered, or of unknown origin."""
    allowance = Counter(line for line in wanted if line.strip())
    known, present = set(file), set(wanted)
    reasons: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(reasons) == _MAX_REASONS:
            continue
        allowance[line] -= 1
        if allowance[line] >= 0:
            continue
        if line in known and line not in present:
            reasons.append(f"line {number} is one that the edit removes: {line.strip()!r}")
        elif line in known or line in present:
            reasons.append(f"line {number} occurs more often than it should: {line.strip()!r}")
        elif difflib.get_close_matches(line, wanted, n=1, cutoff=_SIMILARITY):
            reasons.append(f"line {number} differs from the line it should be: {line.strip()!r}")
        else:
            reasons.append(f"line {number} is in neither the file nor the edit: {line.strip()!r}")
    return reasons
