"""A file's text as rows and line ends, so that every row that an edit does not touch keeps its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from paceline.tasks.matching_blocks import matching_blocks

BOM = "\ufeff"
# of a result: the number of a file row that stays unchanged, or the text of a new row without its line end
ResultRow = int | str


@dataclass(frozen=True)
class Lines:
    """A text split at line feeds: `bom`, then `rows[i] + ends[i]` for each row.

    A line end is "\\n" or "\\r\\n"; the last may be "". Form feeds, U+2028 and lone carriage returns do not end a row.
    """

    bom: str
    rows: list[str]
    ends: list[str]

    @classmethod
    def of(cls, text: str) -> Lines:
        """Splits a text."""
        bom = BOM if text.startswith(BOM) else ""
        pieces = text[len(bom) :].split("\n")
        rows = [piece.removesuffix("\r") for piece in pieces[:-1]] + pieces[-1:]
        ends = ["\r\n" if piece.endswith("\r") else "\n" for piece in pieces[:-1]] + [""]
        if not rows[-1]:
            rows, ends = rows[:-1], ends[:-1]
        return cls(bom, rows, ends)

    @property
    def newline(self) -> str:
        """The commonest line end; "\\n" in a text without one."""
        ends = Counter(end for end in self.ends if end)
        return ends.most_common(1)[0][0] if ends else "\n"

    def text(self, edited: EditResult) -> str:
        """The text of an edit's result, with the byte order mark and the line ends that the edit determines."""
        text = self.join(edited.rows, edited.final_newline, edited.ends)
        return text if edited.bom is None else ("" if not edited.bom else BOM) + text.removeprefix(self.bom)

    def join(
        self, rows: Sequence[ResultRow], final_newline: bool | None = None, ends: Mapping[int, str] | None = None
    ) -> str:
        """The text of a result whose file rows are in ascending order.

        File rows keep their line ends. New rows take those of the file rows that they replace, in order; any further new row
        takes that of the row before it. `ends` overrides the line ends of new rows, by index in `rows`. `final_newline` says
        whether the last row has a line end; by default a new last row has one if the file's last row has.
        """
        ends = ends or {}
        parts = [self.bom]
        newline = next((end for end in self.ends if end), "\n")
        reached = 0  # the file row whose line end the next new row takes
        for place, (row, next_row) in enumerate(zip(rows, self._next_file_rows(rows), strict=True)):
            if isinstance(row, int):
                newline, reached = self.ends[row] or newline, row + 1
                parts += (self.rows[row], newline)
            else:
                if reached < next_row:
                    newline, reached = self.ends[reached] or newline, reached + 1
                newline = ends.get(place, newline)
                parts += (row, newline)
        if not rows:
            return self.bom
        last = rows[-1]
        if final_newline is None:
            final_newline = bool(self.ends[last]) if isinstance(last, int) else not self.ends or bool(self.ends[-1])
        if not final_newline:
            parts.pop()
        return "".join(parts)

    def _next_file_rows(self, rows: Sequence[ResultRow]) -> list[int]:
        """For each row of a result, the first file row at or after it in the result; the number of file rows if none."""
        next_row = len(self.rows)
        found = [next_row] * len(rows)
        for place in range(len(rows) - 1, -1, -1):
            row = rows[place]
            next_row = found[place] = row if isinstance(row, int) else next_row
        return found

    def matched_rows(self, texts: Sequence[str]) -> list[ResultRow]:
        """Texts as result rows: those that the file has too, trailing white space aside, become its own rows.

        Those are the common beginning, the common end, and what difflib matches between them.
        """
        own_texts, other_texts = [row.rstrip() for row in self.rows], [text.rstrip() for text in texts]
        most = min(len(own_texts), len(other_texts))
        head = next((row for row in range(most) if own_texts[row] != other_texts[row]), most)
        tail = next((row for row in range(most - head) if own_texts[-1 - row] != other_texts[-1 - row]), most - head)
        result: list[ResultRow] = list(texts)
        result[:head] = range(head)
        result[len(texts) - tail :] = range(len(own_texts) - tail, len(own_texts))
        for start, other, size in matching_blocks(
            own_texts[head : len(own_texts) - tail], other_texts[head : len(other_texts) - tail]
        ):
            result[head + other : head + other + size] = range(head + start, head + start + size)
        return result


@dataclass(frozen=True)
class EditResult:
    """The result of an edit: its rows, and warnings, a sentence each.

    `final_newline` says whether the last row has a line end, `bom` whether the text begins with a byte order mark; None if
    the edit does not determine it. `ends` are the line ends of new rows that the edit determines, by index in `rows`.
    `alternative` are the rows by another interpretation of the edit, if there is one.
    """

    rows: list[ResultRow]
    warnings: tuple[str, ...] = ()
    final_newline: bool | None = None
    bom: bool | None = None
    ends: Mapping[int, str] = field(default_factory=dict)
    alternative: list[ResultRow] | None = None
