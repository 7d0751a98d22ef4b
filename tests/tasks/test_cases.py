"""Merges by rule of small inputs on which edit tools fail: none is silently wrong, and untouched rows keep their bytes.

A case (cases.jsonl) is right if the merge equals `expected` byte for byte, and silently wrong if it differs and is not flagged.
`python tests/tasks/test_cases.py` prints what RIGHT should hold.
"""

from __future__ import annotations

import json
import random
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import InputError
from paceline.tasks.checks import check
from paceline.tasks.compact import compact
from paceline.tasks.lines import BOM, Lines
from paceline.tasks.merge import Merge, candidate_merge
from paceline.tasks.scoring import FILES, ConversationMessage, LineScorer

RECORDS: list[dict[str, Any]] = [json.loads(line) for line in (Path(__file__).parent / "cases.jsonl").open()]
EDITS = {record["id"]: record for record in RECORDS if record["edit"]}
COMPACTED = [record for record in RECORDS if not record["edit"]]
TO_FLAG = "(must be flagged or refused)\n"  # the `expected` of a case in which any text without a flag is wrong

# the cases that are right without a flag: none may be missing
RIGHT = """\
abbrev-hunk append-go-method append-method append-py append-rust append-terraform blocks-out-of-order bom-block-first
bom-block-one-first-line bom-diff-first bom-in-edit bom-in-edit-block bom-lazy-body bom-lazy-top bom-lost-lazy
bom-lost-lazy2 bom-ps1 bom-whole-file cline-markers-css cmt2-exist cmt2-keep cmt2-omit cmt2-rest cmt2-same cmt2-todo
cmt3-dots cmt3-keep cmt3-omit cmt3-rest cmt3-same cmt3-todo cmt3-unch cmt4-dots cmt4-exist cmt4-omit cmt4-rest
cmt4-todo cmt4-unch codex-bare-hunk-yaml codex-patch-py codex-patch-yaml comment-same-as-before-js
conflict-markers-search crlf-nofinal css-slash-star-dots css-slash-star-existing css-slash-star-rest css2-existing
css2-rest dec-derive dec-fixture dec-fixture-bare dec-property-last decorator-changed decorator-kept-bare
delete-func-context delete-func-marked diff-add-final-newline diff-append-and-newline diff-append-no-final-newline
diff-blank-ctx-stripped diff-fenced diff-fenced-with-words diff-format-patch diff-formfeed diff-formfeed-inline
diff-haskell-comment diff-keep-no-final-newline diff-lf-vs-crlf-file diff-mode-change diff-new-file
diff-offset-duplicate diff-overlapping-context diff-plusplus-add diff-remove-blank diff-rename
diff-sql-comment-delete-first diff-sql-comment-delete-mid diff-wrong-numbers django-meta-add doc-comment-bare
edit-doc-adds-diff emoji-block emoji-lazy end-drop-yaml-1 end-ini erb erb-both exact-second-trailing-ws exact-vs-loose
express-route-ctx file-has-marker file-has-marker-bare file-has-marker-other file-has-search-block
first-line-indent-lost go-search-spaces go-table-append2 gptme-original-updated hb html-dots html-dots-both
html-entities html-existing html-existing-both html-keep html-rest html-rest-both imports-then-marker2
imports-then-marker3 jest-add-it-ctx3 jest-second-it-diff jest-second-it2 jest-second-it3 jest-second-it4 jinja
jinja-both js-setter-ctx jsonc-ok jsx-dots jsx-existing jsx-other-props jsx2-existing lua-M-ctx makefile-diff-spaces
makefile-search-spaces marker-m1 marker-m11 marker-m12 marker-m13 marker-m17 marker-m19 marker-m20 marker-m22
marker-m23 marker-m24 marker-m4 marker-m9 md-change-fence-lang md-fence-outer3-inner3 md-fence-outer4
md-hardbreak-diff md-heading-existing-methods md-heading-unchanged mixed-crlf-block mixed-lf-block mixed-lf-diff
mixed-lf-lazy move-func-marked noop-defs-delete nopath-yaml one-line-no-newline php-second-foreach prepend-changelog2
py-getter-edit-bare py-new-class-before py-setter-edit-bare py-setter-edit-marked py-setter-prop-bare
py-two-classes-named pytest-append-3ctx pytest-append-none react-second-effect-ctx replace-no-extra-blank req-lazy
req-lazy-ctx roo-start-line rst-heading-replace rst-heading-search ruby-self-ctx search-overindented-yaml
setext-7-search short-lines-css short-lines-ini swift-tableview-ctx tab-file-unindented-search
tab-file-unindented-search-go test-append-3ctx test-append-4ctx test-append-none test-append-whole-prev
test-insert-mid toml-lazy toml-lazy-top top-dockerfile top-dockerfile2 top-go-package top-shebang-import
top-shebang-import2 top-sql top-yaml-doc trailing-blank-lines trailing-blank-lines-lazy ts-two-classes-named
vue-allsame-dots vue-allsame-existing vue-allsame-rest vue-dots vue-existing whole-file-delete yaml2-existing
yaml2-same yaml3-existing yaml3-same
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Outcome:
    """The outcome of an edit. `merge` is None if it is refused; `reasons` say why it is flagged or refused."""

    merge: Merge | None
    reasons: tuple[str, ...]

    def right(self, expected: str) -> bool:
        """Whether the text is right and not flagged, or flagged or refused if the case requires that."""
        return bool(self.reasons) if expected == TO_FLAG else not self.reasons and self.is_text(expected)

    def silently_wrong(self, expected: str) -> bool:
        return not self.reasons and not self.is_text(expected)

    def is_text(self, text: str) -> bool:
        return self.merge is not None and self.merge.text == text


def by_rule(record: dict[str, Any], code: str) -> Outcome:
    """Merges the record's edit into `code`. Anything but an InputError passes through: it is a crash."""
    path = None if record["path"] == "None" else record["path"]
    try:
        merge = candidate_merge(code, record["edit"], path, record["instruction"])
        return Outcome(merge, check(code, record["edit"], merge.text, path, merge))
    except InputError as error:
        return Outcome(None, (str(error),))


@cache
def outcome(name: str) -> Outcome:
    return by_rule(EDITS[name], EDITS[name]["file"])


def right_without_flag() -> list[str]:
    return sorted(
        name for name, each in EDITS.items() if not outcome(name).reasons and outcome(name).is_text(each["expected"])
    )


@pytest.mark.parametrize("name", EDITS)
def test_no_case_is_silently_wrong(name: str) -> None:
    assert not outcome(name).silently_wrong(EDITS[name]["expected"])


def test_most_cases_are_right_without_a_flag() -> None:
    assert len(right_without_flag()) >= 0.66 * len(RECORDS)


def test_unambiguous_cases_are_right() -> None:
    easy = [name for name, record in EDITS.items() if record["easy"]]
    lost = [name for name in easy if not outcome(name).right(EDITS[name]["expected"])]
    assert len(easy) == 57
    assert len(lost) <= 5, f"easy, and not right: {', '.join(lost)}"


def test_no_case_that_was_right_is_wrong_now() -> None:
    assert sorted(RIGHT) == RIGHT and len(set(RIGHT)) == len(RIGHT)
    assert sorted(set(RIGHT) - set(right_without_flag())) == []


@pytest.mark.parametrize("record", COMPACTED, ids=lambda record: record["id"])
def test_rows_that_must_stay_survive_compact(record: dict[str, Any]) -> None:
    message = ConversationMessage("user", record["file"], record["path"])
    assert record["instruction"] == "paceline compact file.log --ratio 0.5 (no query)"
    kept = compact([message], "", ratio=0.5, preserve_recent=0, scorer=LineScorer(FILES)).text.splitlines()
    due = [row for row in record["file"].splitlines() if " ERROR " in row]
    assert len(due) == 1 and due[0] in kept


# rows that the edit does not touch keep their bytes


@dataclass
class OddBytesCase:
    """A file and its right result. The same rows of both can be given odd bytes."""

    file: Lines
    wanted: Lines
    pairs: list[tuple[int, int]]  # (file row, result row) of rows away from every change

    def put(self, kind: str, chosen: list[tuple[int, int]], draw: random.Random) -> None:
        for row, place in chosen:
            odd, end = with_odd_bytes(kind, self.file.rows[row], self.file.ends[row], draw)
            self.file.rows[row] = self.wanted.rows[place] = odd
            self.file.ends[row] = self.wanted.ends[place] = end

    def texts(self, bom: bool) -> tuple[str, str]:
        """The file and the result, with or without a byte order mark."""
        own, wanted = (
            "".join(f"{row}{end}" for row, end in zip(each.rows, each.ends, strict=True)) for each in self.both
        )
        return (BOM if bom else self.file.bom) + own, (BOM if bom else self.wanted.bom) + wanted

    @property
    def both(self) -> tuple[Lines, Lines]:
        return self.file, self.wanted


DEFINITION_KINDS = ("line end", "spaces", "tabs", "form feed", "separator", "carriage return")
AWAY = 1  # rows between a row with odd bytes and the next one that changes or is in the edit


def with_odd_bytes(kind: str, row: str, end: str, draw: random.Random) -> tuple[str, str]:
    """A row and its end with bytes in it that are easily lost."""
    if kind == "line end":
        return row, {"\n": "\r\n", "\r\n": "\n"}.get(end, end)
    if kind in ("spaces", "tabs"):
        return row + (" " * draw.randint(1, 3) if kind == "spaces" else "\t"), end
    first = len(row) - len(row.lstrip())
    place = draw.randint(first + 1, max(first + 1, len(row) - 1))
    sign = {"form feed": "\f", "separator": "\u2028", "carriage return": "\r"}[kind]
    return row[:place] + sign + row[place:] + ("" if row[place:] else "_"), end


def odd_bytes_case(name: str) -> OddBytesCase:
    """A right case, and its rows that may get odd bytes: unique, not in the edit, and away from every change."""
    record, merge = EDITS[name], outcome(name).merge
    assert merge is not None
    file, wanted = Lines.of(record["file"]), Lines.of(record["expected"])
    own, others = Counter(map(str.strip, file.rows)), Counter(map(str.strip, wanted.rows))
    shown = {row.lstrip("+- \t").strip() for row in record["edit"].splitlines()}
    places = {row.strip(): place for place, row in enumerate(wanted.rows)}

    def same(row: int) -> int | None:
        """The row of the result that is a given row of the file; None if that is not certain."""
        text = file.rows[row].strip()
        alone = bool(text) and merge.kept[row] and own[text] == others[text] == 1 and text not in record["edit"]
        return places[text] if alone and wanted.rows[places[text]] == file.rows[row] else None

    def far(row: int, place: int) -> bool:
        """Whether the rows around both are the same and not in the edit."""
        for step in range(-AWAY, AWAY + 1):
            inside = 0 <= row + step < len(file.rows), 0 <= place + step < len(wanted.rows)
            if inside[0] != inside[1]:
                return False
            if inside[0] and (not merge.kept[row + step] or file.rows[row + step] != wanted.rows[place + step]):
                return False
            if inside[0] and file.rows[row + step].strip() and file.rows[row + step].lstrip("+- \t").strip() in shown:
                return False
        return True

    pairs = [(row, place) for row in range(len(file.rows)) if (place := same(row)) is not None and far(row, place)]
    return OddBytesCase(file, wanted, pairs)


SURE = [name for name, record in EDITS.items() if record["expected"] != TO_FLAG]


@pytest.mark.parametrize("kind", [*DEFINITION_KINDS, "all"])
def test_odd_bytes_in_rows_that_an_edit_does_not_touch_survive(kind: str) -> None:
    draw = random.Random(kind)
    wrong, tried = [], 0
    for name in SURE:
        if not outcome(name).is_text(EDITS[name]["expected"]):
            continue
        for _ in range(2):
            each = odd_bytes_case(name)
            if not each.pairs:
                break
            chosen = sorted(draw.sample(each.pairs, draw.randint(1, len(each.pairs))))
            for pair in chosen:
                each.put(draw.choice(DEFINITION_KINDS) if kind == "all" else kind, [pair], draw)
            code, wanted = each.texts(bom=kind == "all")
            tried += code != EDITS[name]["file"]
            if by_rule(EDITS[name], code).silently_wrong(wanted):
                wrong.append(f"{name}: {[each.file.rows[row] for row, _ in chosen]}")
    assert tried > 250
    assert wrong == []


def test_a_byte_order_mark_survives_every_edit() -> None:
    tried, wrong = 0, []
    for name in SURE:
        record = EDITS[name]
        if outcome(name).is_text(record["expected"]) and not record["file"].startswith(BOM) and record["file"]:
            tried += 1
            if by_rule(record, BOM + record["file"]).silently_wrong(BOM + record["expected"].removeprefix(BOM)):
                wrong.append(name)
    assert tried > 150
    assert wrong == []


if __name__ == "__main__":
    print(textwrap.fill(" ".join(right_without_flag()), 118, break_on_hyphens=False))
