"""One edit merged by rule and checked, as Fast Apply does before it asks a model; timed."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass

from paceline.errors import InputError
from paceline.tasks.checks import check
from paceline.tasks.merge import candidate_merge


@dataclass(frozen=True)
class Answer:
    """The result of an edit. `text` is None where the edit was refused or crashed; `reasons` say why the merge is flagged."""

    text: str | None
    reasons: tuple[str, ...]
    seconds: float
    crashed: bool = False

    @property
    def refused(self) -> bool:
        return self.text is None and not self.crashed

    @property
    def silent(self) -> bool:
        """Whether there is a result and no check flagged it."""
        return self.text is not None and not self.reasons


def by_rule(code: str, update: str, path: str | None = None, instruction: str = "") -> Answer:
    """Makes the candidate merge and checks it. An InputError counts as refused, any other exception as crashed."""
    began = time.perf_counter()
    try:
        merge = candidate_merge(code, update, path, instruction)
        reasons = check(code, update, merge.text, path, merge)
    except InputError as error:
        return Answer(None, (str(error),), time.perf_counter() - began)
    except Exception as error:
        return Answer(None, (f"{type(error).__name__}: {error}",), time.perf_counter() - began, crashed=True)
    return Answer(merge.text, tuple(reasons), time.perf_counter() - began)


def difference(expected: str, got: str | None) -> str:
    """A unified diff from the expected text to the result, with white space and line ends visible."""
    wanted, found = (_visible(text) for text in (expected, got or ""))
    return "\n".join(difflib.unified_diff(wanted, found, "expected", "got", n=2, lineterm=""))


def _visible(text: str) -> list[str]:
    """The text's rows for a printed diff: trailing white space and form feeds escaped."""
    return [repr(row)[1:-1] if row != row.rstrip("\r\n \t") or "\f" in row else row for row in _rows(text)]


def _rows(text: str) -> list[str]:
    rows = text.split("\n")
    return rows[:-1] if rows[-1] == "" else [*rows[:-1], f"{rows[-1]} (no line end)"]
