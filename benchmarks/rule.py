"""The merge by rule with its checks, as the product runs it before any model: one answer, timed, for cases and commits."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass

from paceline.errors import InputError
from paceline.tasks.checks import check
from paceline.tasks.merge import candidate_merge


@dataclass(frozen=True)
class Answer:
    """What came of an edit. `text` is None where it was refused or crashed, and `reasons` say why it is flagged."""

    text: str | None
    reasons: tuple[str, ...]
    seconds: float
    crashed: bool = False

    @property
    def refused(self) -> bool:
        return self.text is None and not self.crashed

    @property
    def silent(self) -> bool:
        """Whether there is a text with nothing against it."""
        return self.text is not None and not self.reasons


def by_rule(code: str, update: str, path: str | None = None, instruction: str = "") -> Answer:
    """The candidate merge and what the checks say of it. An InputError refuses; any other exception is a crash."""
    began = time.perf_counter()
    try:
        merge = candidate_merge(code, update, path, instruction)
        reasons = check(code, update, merge.text, path, merge)
    except InputError as error:
        return Answer(None, (str(error),), time.perf_counter() - began)
    except Exception as error:
        return Answer(None, (f"{type(error).__name__}: {error}",), time.perf_counter() - began, crashed=True)
    return Answer(merge.text, tuple(reasons), time.perf_counter() - began)


def milliseconds(seconds: list[float], share: float) -> float:
    """The least time, in milliseconds, that this share of the times does not exceed."""
    ordered = sorted(seconds) or [0.0]
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def difference(expected: str, got: str | None) -> str:
    """What the result has in place of what it should have, a row each, white space and line ends visible."""
    wanted, found = (_visible(text) for text in (expected, got or ""))
    return "\n".join(difflib.unified_diff(wanted, found, "expected", "got", n=2, lineterm=""))


def _visible(text: str) -> list[str]:
    """The text's rows as a diff may print them: odd white space escaped."""
    return [repr(row)[1:-1] if row != row.rstrip("\r\n \t") or "\f" in row else row for row in _rows(text)]


def _rows(text: str) -> list[str]:
    rows = text.split("\n")
    return rows[:-1] if rows[-1] == "" else [*rows[:-1], f"{rows[-1]} (no line end)"]
