"""SEARCH/REPLACE blocks: clear ones are applied, ambiguous ones give a warning or are refused, other bytes stay."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import EditNotFound, EmptyEdit, InputError
from paceline.tasks.lines import Lines
from paceline.tasks.search_replace import apply_blocks, has_blocks

PY = "def a():\n    return 0\n\n\ndef b():\n    return 1\n"


def block(
    old: str, new: str, first: str = "<<<<<<< SEARCH", middle: str = "=======", last: str = ">>>>>>> REPLACE"
) -> str:
    return f"{first}\n{old}{middle}\n{new}{last}\n"


ONE = block("    return 1\n", "    return 2\n")
TWO = PY.replace("1", "2")

RIGHT = [  # name, file, edit, result; no warning
    ("five signs", PY, block("    return 1\n", "    return 2\n", "<<<<< SEARCH", "=====", ">>>>> REPLACE"), TWO),
    (
        "uneven signs",
        PY,
        block("    return 1\n", "    return 2\n", "<" * 7 + " SEARCH", "=" * 6, ">" * 8 + " REPLACE"),
        TWO,
    ),
    ("Cline", PY, block("    return 1\n", "    return 2\n", "------- SEARCH", last="+++++++ REPLACE"), TWO),
    ("ORIGINAL", PY, block("    return 1\n", "    return 2\n", "<<<<<<< ORIGINAL", last=">>>>>>> UPDATED"), TWO),
    ("conflict", PY, block("    return 1\n", "    return 2\n", "<<<<<<< HEAD", last=">>>>>>> topic"), TWO),
    (
        "names behind",
        PY,
        block("    return 1\n", "    return 2\n", "<<<<<<< SEARCH a.py", last=">>>>>>> REPLACE a.py"),
        TWO,
    ),
    ("mark before", PY, "\ufeff" + ONE, TWO),
    ("no last end", PY, ONE.rstrip("\n"), TWO),
    ("prose, name, fence", PY, f"Here it is:\n\na.py\n```python\n{ONE}```\n\nDone.\n", TWO),
    (
        "fences between",
        PY,
        "```\n" + ONE + "```\nand\n```\n" + block("    return 0\n", "    return 7\n") + "```\n",
        TWO.replace("0", "7"),
    ),
    ("indented markers", PY, "  <<<<<<< SEARCH\n    return 1\n  =======\n    return 2\n  >>>>>>> REPLACE\n", TWO),
    ("Windows edit", PY, ONE.replace("\n", "\r\n"), TWO),
    ("Windows file", PY.replace("\n", "\r\n"), ONE, TWO.replace("\n", "\r\n")),
    ("line number", "x\ny\nx\n", block(":start_line:3\n-------\nx\n", "z\n"), "x\ny\nz\n"),
    ("line numbers", "x\ny\nx\n", block(":start_line:3\n:end_line:3\n-------\nx\n", "z\n"), "x\ny\nz\n"),
    ("escaped marker", "a\n=======\nb\n", block("a\n\\=======\nb\n", "a\n\\=======\nc\n"), "a\n=======\nc\n"),
    ("empty file", "", block("", "a\nb\n"), "a\nb\n"),
    ("deletion", PY, block("def a():\n    return 0\n\n\n", ""), "def b():\n    return 1\n"),
    ("out of order", "a\nb\n", block("b\n", "B\n") + block("a\n", "A\n"), "A\nB\n"),
    ("as many as places", "x\ny\nx\n", block("x\n", "z\n") * 2, "z\ny\nz\n"),
    ("shared context", "a\nb\nc\n", block("a\nb\n", "A\nb\n") + block("b\nc\n", "b\nC\n"), "A\nb\nC\n"),
    ("row ends", "a  \nb\nc\t\n", block("a\nb\nc\n", "a\nB\nc\n"), "a  \nB\nc\t\n"),
    ("exact first", "k: 1  \nn\n-\nk: 1\nn\n", block("k: 1\nn\n", "k: 2\nn\n"), "k: 1  \nn\n-\nk: 2\nn\n"),
    ("no final end", "a\r\nb", block("b\n", "c\nd\n"), "a\r\nc\r\nd"),
    (
        "spaces for tabs",
        "f {\n\tif a {\n\t\tb\n\t}\n}\n",
        block("    if a {\n        b\n", "    if c {\n        d\n"),
        "f {\n\tif c {\n\t\td\n\t}\n}\n",
    ),
    (
        "two spaces for tabs",
        "f {\n\tif a {\n\t\tb\n\t}\n}\n",
        block("f {\n  if a {\n    b\n", "f {\n  if c {\n    d\n"),
        "f {\n\tif c {\n\t\td\n\t}\n}\n",
    ),
    (
        "tabs for spaces",
        PY,
        block("def b():\n\treturn 1\n", "def b():\n\tif x:\n\t\treturn 3\n\treturn 1\n"),
        PY.replace("    return 1", "    if x:\n        return 3\n    return 1"),
    ),
    (
        "unindented under tabs",
        "class A:\n\tdef f():\n\t\treturn 1\n",
        block("return 1\n", "if a:\n    b()\nreturn 1\n"),
        "class A:\n\tdef f():\n\t\tif a:\n\t\t\tb()\n\t\treturn 1\n",
    ),
    (
        "dedented",
        "def f():\n    return 1\n",
        block("        return 1\n", "        x()\n        return 2\n"),
        "def f():\n    x()\n    return 2\n",
    ),
    (
        "first row bare",
        "class A:\n    def f():\n        x = 1\n",
        block("def f():\n        x = 1\n", "def f():\n        x = 2\n"),
        "class A:\n    def f():\n        x = 2\n",
    ),
    ("stub", PY, block("    return 1\n", "    return 1\n\ndef c():\n    ...\n"), PY + "\ndef c():\n    ...\n"),
    (
        "left out in both",
        "f:\n  a\n  b\n  c\n",
        block("f:\n  # ... existing code ...\n  c\n", "g:\n  # ... existing code ...\n  d\n"),
        "g:\n  a\n  b\n  d\n",
    ),
    ("RST heading", "A\n=====\n\nold\n", block("A\n=====\n\nold\n", "A\n=====\n\nnew\n"), "A\n=====\n\nnew\n"),
    (
        "heading as the divider",
        "L\n=======\n\nMIT\n",
        block("L\n=======\n\nMIT\n", "L\n=======\n\nBSD\n"),
        "L\n=======\n\nBSD\n",
    ),
    (
        "heading but for ends",
        "L  \n=======\n\nMIT\n",
        block("L\n=======\n\nMIT\n", "L\n=======\n\nBSD\n"),
        "L  \n=======\n\nBSD\n",
    ),
    ("heading put in", "old\n", block("old\n", "old\n\nNew\n=======\n\nmore\n"), "old\n\nNew\n=======\n\nmore\n"),
    ("title only", "L\n=======\n\nMIT\n", block("L\n", "M\n"), "M\n=======\n\nMIT\n"),
    (
        "conflict solved",
        "q\n<<<<<<< HEAD\na\n=======\nb\n>>>>>>> x\n",
        block("<<<<<<< HEAD\na\n=======\nb\n>>>>>>> x\n", "b\n"),
        "q\nb\n",
    ),
]


@pytest.mark.parametrize(("file", "edit", "expected"), [case[1:] for case in RIGHT], ids=[case[0] for case in RIGHT])
def test_a_clear_block_is_applied_without_a_warning(file: str, edit: str, expected: str) -> None:
    lines = Lines.of(file)
    assert has_blocks(edit, lines)
    edited = apply_blocks(lines, edit)
    assert lines.text(edited) == expected
    assert edited.warnings == ()


AMBIGUOUS = [  # name, file, edit, words of the warning
    ("two places", "x\ny\nx\n", block("x\n", "z\n"), "found at lines 1 and 3: which"),
    ("two places at other indents", "a:\n  x\nb:\n    x\n", block("x\n", "z\n"), "lines 2 and 4"),
    ("line number off", "x\ny\nx\n", block(":start_line:2\n-------\nx\n", "z\n"), "not at line 2"),
    ("chained", "a\n", block("a\n", "b\n") + block("b\n", "c\n"), "only in what an earlier block"),
    ("found again", "a\nb\n", block("a\n", "b\n") + block("b\n", "c\n"), "in what an earlier block puts in, too"),
    (
        "shows a changed row",
        "a\nb\nc\n",
        block("a\nb\n", "a\nB\n") + block("b\nc\n", "b\nC\n"),
        "earlier block changes",
    ),
    (
        "other indents",
        "if a:\n    if b:\n        c\n",
        block("if a:\n  if b:\n    c\n", "if a:\n  if b:\n    d\n"),
        "indents off",
    ),
    ("quotes", "s = “x”\n", block('s = "x"\n', 's = "y"\n'), "signs alike"),
    ("composed", "cafe\u0301\n", block("café\n", "tea\n"), "signs alike"),
    ("no-break space", "3\xa0€\n", block("3 €\n", "4 €\n"), "signs alike"),
    ("added already", "a\nb\n", block("a\n", "a\nb\n"), "has already"),
    ("one changes nothing", "a\nb\n", block("a\n", "a\n") + block("b\n", "c\n"), "changes nothing"),
    ("two dividers", "a\nb\n", "<<<<<<< SEARCH\na\n=======\nc\n=======\n>>>>>>> REPLACE\n", "divided"),
    ("unnamed end", "a\n", "<<<<<<< SEARCH\na\n=======\nc\n>>>>>>>\n", "not marked REPLACE"),
    ("three parts", "a\n", "<<<<<<< HEAD\na\n||||||| base\nz\n=======\nb\n>>>>>>> x\n", "three parts"),
    ("two files", "a\nb\n", "x.py\n" + block("a\n", "c\n") + "y.py\n" + block("b\n", "d\n"), "several files"),
    ("blank rows too many", "a\nb\n", block("\nb\n\n", "\nc\n\n"), "blank rows"),
    ("first row of many bare", "f:\n        a\n", block("a\n", "if b:\n            c\n        a\n"), "indent"),
]


@pytest.mark.parametrize(
    ("file", "edit", "words"), [case[1:] for case in AMBIGUOUS], ids=[case[0] for case in AMBIGUOUS]
)
def test_an_ambiguous_block_gives_a_warning(file: str, edit: str, words: str) -> None:
    lines = Lines.of(file)
    assert has_blocks(edit, lines)
    assert words in " ".join(apply_blocks(lines, edit).warnings)


REFUSED = [  # name, file, edit, words of the reason
    ("not there", "a\nb\n", block("a\n", "c\n") + block("nope\n", "c\n"), "SEARCH block 2 is not in the file"),
    ("empty", "a\n", block("", "b\n"), "shows no row"),
    ("blank", "a\n\nb\n", block("\n", "b\n"), "shows no row"),
    ("nothing new", "a\nb\n", block("a\n", "a\n"), "changes nothing"),
    ("open", "a\n", "<<<<<<< SEARCH\na\n=======\nb\n", "not closed"),
    ("open before another", PY, "<<<<<<< SEARCH\n    return 0\n=======\n    return 4\n" + ONE, "not closed"),
    ("no divider", "a\n", "<<<<<<< SEARCH\na\n>>>>>>> REPLACE\n", "not closed"),
    ("part of a row", "version: 1.0\n", block("version: 1\n", "version: 2\n"), "only a part of line 1"),
    ("lone carriage returns", "one\rtwo\r", block("two\n", "x\n"), "only a part of line 1"),
    ("line numbers", PY, block("5 | def b():\n6 |     return 1\n", "def b():\n"), "line numbers"),
    ("applied", "a\nB\nc\n", block("a\nb\nc\n", "a\nB\nc\n"), "applied already"),
    (
        "left out in one",
        PY,
        block("def b():\n    return 1\n", "def b():\n    # ... existing code ...\n"),
        "leaves out rows",
    ),
    ("left out where shown", PY, block("def a():\n    # ...\n    return 1\n", "x\n"), "leaves out rows"),
    ("overlap", "a\nb\nc\n", block("a\nb\n", "A\nB\n") + block("b\nc\n", "X\nC\n"), "earlier block changes too"),
]


@pytest.mark.parametrize(("file", "edit", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_block_that_cannot_be_applied_is_refused_with_the_reason(file: str, edit: str, words: str) -> None:
    lines = Lines.of(file)
    assert has_blocks(edit, lines)
    with pytest.raises((EditNotFound, EmptyEdit), match=words):
        apply_blocks(lines, edit)


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("# T\n\nText here now.\n\nMore.\n", f"# T\n\nText here now.\n\n```\n{ONE}```\n\nMore.\n"),
        (PY, f"# ... existing code ...\nEX = '''\n{ONE}'''\n\ndef b():\n    return 1\n"),
        ("<<<<<<< HEAD\na1\n=======\nb1\n>>>>>>> x\nccc\n", "<<<<<<< HEAD\na1\n=======\nb2\n>>>>>>> x\nccc\n"),
        ("A\n-------\nb\n", "A\n-------\nc\n"),
        (PY, PY),
    ],
)
def test_a_block_in_a_text_is_text(file: str, edit: str) -> None:
    assert not has_blocks(edit, Lines.of(file))


@pytest.mark.parametrize(
    ("file", "old"),
    [
        ("x = 1\n" * 10_000, "x = 1\n"),
        ("x = 1\n" * 10_000, "x = 1\n" * 200),
        (
            "".join(f"row {number % 700} {number}\n" for number in range(5_000)),
            "".join(f"  row {number % 700} {number}\n" for number in range(3_000, 3_200)),
        ),
    ],
)
def test_a_long_file_takes_little_time(file: str, old: str) -> None:
    begun = time.perf_counter()
    apply_blocks(Lines.of(file), block(old, "new\n"))
    assert time.perf_counter() - begun < 2


ROWS = st.sampled_from(["a", "b ", "\tc", "    d", "", "x\x0cy", "u\u2028v", "m\rn", "é", "======="])
FILES = st.tuples(
    st.sampled_from(["", "\ufeff"]),
    st.lists(st.tuples(ROWS, st.sampled_from(["\n", "\r\n"])), max_size=12),
    st.booleans(),
)


@given(FILES, st.data())
def test_what_a_block_does_not_touch_keeps_its_bytes(
    parts: tuple[str, list[tuple[str, str]], bool], data: st.DataObject
) -> None:
    mark, rows, closed = parts
    place = data.draw(st.integers(0, len(rows)))
    pieces = [row + end for row, end in rows]
    before, after = mark + "".join(pieces[:place]), "".join(pieces[place:])
    after = after if closed else after.removesuffix("\n").removesuffix("\r")
    lines = Lines.of(f"{before}UNIQUE  \r\n\tkept \n{after}")
    edited = apply_blocks(lines, block("UNIQUE\n    kept\n", "OTHER\n    kept\n    more\n"))
    assert edited.warnings == ()
    assert lines.text(edited) == f"{before}OTHER\r\n\tkept \n\tmore\n{after}"


@given(st.text(alphabet="ab <=>-+\n|", max_size=60), st.text(alphabet="ab \n", max_size=30))
def test_any_text_is_applied_or_refused(middle: str, file: str) -> None:
    edit = f"<<<<<<< SEARCH\n{middle}\n>>>>>>> REPLACE\n"
    lines = Lines.of(file)
    has_blocks(edit, lines)
    try:
        edited = apply_blocks(lines, edit)
    except InputError:
        return
    kept = [row for row in edited.rows if isinstance(row, int)]
    assert kept == sorted(set(kept))
