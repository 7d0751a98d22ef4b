"""A file's text as rows and their line ends, so that rows an edit does not touch stay byte for byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.tasks.runs import runs

BOM = "\ufeff"
Row = int | str  # of a result: the number of a file row that stays as it is, or the text of a new row without its end


@dataclass(frozen=True)
class Lines:
    """A text cut at line feeds. `rows[i] + ends[i]` over all rows, after `bom`, is the text.

    A row ends with "\\n" or "\\r\\n"; the last may end with "". Form feeds, U+2028 and lone carriage returns end no row.
    """

    bom: str
    rows: list[str]
    ends: list[str]

    @classmethod
    def of(cls, text: str) -> Lines:
        bom = BOM if text.startswith(BOM) else ""
        pieces = text[len(bom) :].split("\n")
        rows = [piece.removesuffix("\r") for piece in pieces[:-1]] + pieces[-1:]
        ends = ["\r\n" if piece.endswith("\r") else "\n" for piece in pieces[:-1]] + [""]
        if not rows[-1]:
            rows, ends = rows[:-1], ends[:-1]
        return cls(bom, rows, ends)

    @property
    def newline(self) -> str:
        """The commonest line end; "\\n" where there is none."""
        ends = Counter(end for end in self.ends if end)
        return ends.most_common(1)[0][0] if ends else "\n"

    def text(self, edited: Edited) -> str:
        """The text of an edit's result, with the byte order mark and the line ends that the edit tells."""
        text = self.join(edited.rows, edited.final, edited.ends)
        return text if edited.bom is None else ("" if not edited.bom else BOM) + text.removeprefix(self.bom)

    def join(self, rows: Sequence[Row], final: bool | None = None, ends: Mapping[int, str] | None = None) -> str:
        """The text of a result, whose file rows come in order.

        File rows keep their ends. Of new rows the first ones take the ends of the file rows in whose place they stand,
        the others that of the row before. A new last row has an end if the file's last row has one; `final` says of
        the last row, whichever it is, whether it has an end. `ends` has those of new rows that are known, by place.
        """
        ends = ends or {}
        parts = [self.bom]
        newline = next((end for end in self.ends if end), "\n")
        reached = 0  # the file row whose end the next new row takes
        following = self._following(rows)
        for place, (row, stop) in enumerate(zip(rows, following, strict=True)):
            if isinstance(row, int):
                newline, reached = self.ends[row] or newline, row + 1
                parts += (self.rows[row], newline)
            else:
                if reached < stop:
                    newline, reached = self.ends[reached] or newline, reached + 1
                newline = ends.get(place, newline)
                parts += (row, newline)
        if not rows:
            return self.bom
        last = rows[-1]
        if final is None:
            final = bool(self.ends[last]) if isinstance(last, int) else not self.ends or bool(self.ends[-1])
        if not final:
            parts.pop()
        return "".join(parts)

    def _following(self, rows: Sequence[Row]) -> list[int]:
        """For each row of a result the next file row in it from there on, or how many the file has."""
        following = [len(self.rows)] * len(rows)
        for place in range(len(rows) - 1, -1, -1):
            row = rows[place]
            following[place] = (
                row if isinstance(row, int) else following[place + 1] if place + 1 < len(rows) else following[place]
            )
        return following

    def matched(self, texts: Sequence[str]) -> list[Row]:
        """Texts as rows of a result: those that the text has, white space at their ends aside, are its own.

        They are what both begin and end with, and between that what difflib finds.
        """
        own, others = [row.rstrip() for row in self.rows], [text.rstrip() for text in texts]
        most = min(len(own), len(others))
        head = next((row for row in range(most) if own[row] != others[row]), most)
        tail = next((row for row in range(most - head) if own[-1 - row] != others[-1 - row]), most - head)
        result: list[Row] = list(texts)
        result[:head] = range(head)
        result[len(texts) - tail :] = range(len(own) - tail, len(own))
        for start, other, size in runs(own[head : len(own) - tail], others[head : len(others) - tail]):
            result[head + other : head + other + size] = range(head + start, head + start + size)
        return result


@dataclass(frozen=True)
class Edited:
    """The result of an edit: its rows over the file's, and what is doubtful, a sentence each.

    `final` says whether the last row has a line end, `bom` whether a byte order mark begins the text; None where the
    edit does not say. `ends` are the line ends of new rows that the edit tells, by their place in `rows`. `other` is
    another reading of the edit, where there is one.
    """

    rows: list[Row]
    doubts: tuple[str, ...] = ()
    final: bool | None = None
    bom: bool | None = None
    ends: Mapping[int, str] = field(default_factory=dict)
    other: list[Row] | None = None
