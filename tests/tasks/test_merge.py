"""The merge by rule: which rows stay, which are deleted, which are inserted, and where."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import EditNotFound, EmptyEdit, InputError
from paceline.tasks.checks import check
from paceline.tasks.merge import candidate_merge
from paceline.tasks.snippet import snippet_of

FILE = """\
import os
import sys


def load(path):
    with open(path) as file:
        return file.read()


class Store:
    def __init__(self, root):
        self.root = root

    def get(self, name):
        path = os.path.join(self.root, name)
        return load(path)

    def put(self, name, text):
        path = os.path.join(self.root, name)
        with open(path, "w") as file:
            file.write(text)


def main():
    store = Store(sys.argv[1])
    print(store.get("a"))
"""

JAVASCRIPT = """\
class Counter {
  constructor() {
    this.count = 0;
  }

  add(number) {
    this.count += number;
    return this;
  }

  reset() {
    this.count = 0;
    return this;
  }
}
"""


def merged(update: str, code: str = FILE) -> str:
    return candidate_merge(code, update).text


@pytest.mark.parametrize(
    "marker",
    [
        "# ... existing code ...",
        "// ... rest of code ...",
        "/* ... existing code ... */",
        "<!-- ... existing code ... -->",
        "# ... same ...",
        "...",
        "# rest of the file unchanged",
    ],
)
def test_a_changed_line_between_markers(marker: str) -> None:
    function = "def load(path):\n    with open(path, encoding='utf-8') as file:\n        return file.read()\n"
    update = f"{marker}\n\n\n{function}\n\n{marker}\n"
    assert merged(update) == FILE.replace("open(path) as", "open(path, encoding='utf-8') as")


def test_a_line_missing_between_neighbours_is_deleted() -> None:
    update = "import os\n\n\ndef load(path):\n# ... existing code ...\n"
    assert merged(update) == FILE.replace("import sys\n", "")


def test_lines_are_inserted_after_their_context() -> None:
    update = "# ... existing code ...\n        self.root = root\n        self.cache = {}\n\n# ... existing code ...\n"
    assert merged(update) == FILE.replace("self.root = root\n", "self.root = root\n        self.cache = {}\n")


def test_a_whole_function_replaces_the_one_of_its_name() -> None:
    update = "def load(path):\n    return open(path).read()\n"
    expected = FILE.replace(
        "    with open(path) as file:\n        return file.read()\n", "    return open(path).read()\n", 1
    )
    assert merged(update) == expected


def test_a_method_at_the_left_margin_gets_the_indent_of_the_file() -> None:
    update = "def get(self, name):\n    return load(os.path.join(self.root, name))\n"
    expected = FILE.replace(
        "        path = os.path.join(self.root, name)\n        return load(path)\n",
        "        return load(os.path.join(self.root, name))\n",
    )
    assert merged(update) == expected


def test_a_new_function_follows_the_one_before_it() -> None:
    update = (
        "def load(path):\n    with open(path) as file:\n        return file.read()\n\ndef size(path):\n    return 1\n"
    )
    assert "return file.read()\n\ndef size(path):\n    return 1\n\n\nclass Store" in merged(update)


def test_a_new_method_between_markers_goes_to_the_end_of_the_class() -> None:
    update = (
        "class Counter {\n  // ... existing code ...\n\n  double() {\n    this.count *= 2;\n    return this;\n  }\n}\n"
    )
    assert (
        merged(update, JAVASCRIPT)
        == JAVASCRIPT[:-2] + "\n  double() {\n    this.count *= 2;\n    return this;\n  }\n}\n"
    )


def test_a_method_without_a_keyword_replaces_the_one_of_its_name() -> None:
    update = "  reset() {\n    this.count = 1;\n    return this;\n  }\n"
    head, tail = JAVASCRIPT.split("  reset() {\n    this.count = 0;")
    assert merged(update, JAVASCRIPT) == head + "  reset() {\n    this.count = 1;" + tail


def test_comments_may_come_between_methods() -> None:
    update = JAVASCRIPT.replace("  add(", "  // Adds.\n  add(").replace("  reset(", "  // Starts again.\n  reset(")
    head, tail = update.split("  constructor() {\n    this.count = 0;\n  }\n")
    assert merged(head + "  // ... existing code ...\n" + tail, JAVASCRIPT) == update


def test_an_ellipsis_that_is_a_body_is_code() -> None:
    code = "class A:\n    pass\n\n\nclass B:\n    value = 1\n"
    update = "class A:\n    pass\n\n\nclass Missing(Exception):\n    ...\n\n\nclass B:\n    value = 1\n"
    assert merged(update, code) == update


def test_an_ellipsis_in_place_of_a_body_is_a_marker() -> None:
    function = "def load(path):\n    ...\n"
    update = function + "\n\nclass Store:\n    def __init__(self, root, size):\n        self.root = root\n\n    ...\n"
    assert merged(update) == FILE.replace("self, root)", "self, root, size)")


def test_the_whole_file_as_update() -> None:
    assert merged(FILE.replace("argv[1]", "argv[2]")) == FILE.replace("argv[1]", "argv[2]")


def test_a_fence_around_the_update_is_taken_off() -> None:
    assert merged("```python\ndef load(path):\n    return open(path).read()\n```\n") == merged(
        "def load(path):\n    return open(path).read()\n"
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_line_ends_and_the_end_of_the_file_are_kept(newline: str, end: str) -> None:
    code = FILE.rstrip("\n").replace("\n", newline) + end.replace("\n", newline)
    update = '# ... existing code ...\n    store = Store(sys.argv[2])\n    print(store.get("a"))\n'
    assert merged(update, code) == code.replace("argv[1]", "argv[2]")


def test_a_form_feed_in_the_file_stays() -> None:
    code = FILE.replace("class Store", "\x0c\nclass Store").replace("def main", "# a\x0cb\u2028c\ndef main")
    update = '# ... existing code ...\n    store = Store(sys.argv[2])\n    print(store.get("a"))\n'
    assert merged(update, code) == code.replace("argv[1]", "argv[2]")


def test_search_and_replace_blocks() -> None:
    update = (
        "Text around.\n<<<<<<< SEARCH\nimport sys\n=======\nimport sys\nimport time\n>>>>>>> REPLACE\n"
        '<<<<<<< SEARCH\n    print(store.get("a"))\n=======\n    print(time.time())\n>>>>>>> REPLACE\n'
    )
    expected = FILE.replace("import sys\n", "import sys\nimport time\n").replace('store.get("a")', "time.time()")
    assert merged(update) == expected


def test_a_unified_diff() -> None:
    update = "--- a/x.py\n+++ b/x.py\n@@ -1,4 +1,3 @@\n import os\n-import sys\n \n \n"
    assert merged(update) == FILE.replace("import sys\n", "")


def test_an_empty_edit() -> None:
    with pytest.raises(EmptyEdit):
        candidate_merge(FILE, " \n")


@pytest.mark.parametrize(
    "update",
    [
        "nothing of this = stands\nin_the_file()\n",
        "# ... existing code ...\n",
        "<<<<<<< SEARCH\nnot there\n=======\nnew\n>>>>>>> REPLACE\n",
    ],
)
def test_an_edit_that_matches_nowhere(update: str) -> None:
    with pytest.raises(EditNotFound):
        candidate_merge(FILE, update)


def test_an_empty_file_becomes_the_update() -> None:
    assert merged("import os\n", "") == "import os\n"


def test_an_ambiguous_place_gives_a_warning() -> None:
    code = "".join(f"def f{number}():\n    x = 1\n    y = 2\n    return x\n\n\n" for number in range(4))
    sure = candidate_merge(
        code, "# ... existing code ...\ndef f2():\n    x = 1\n    y = 3\n    return x\n# ... existing code ...\n"
    )
    assert not sure.warnings


def warnings(update: str, code: str = FILE) -> str:
    return "; ".join(candidate_merge(code, update).warnings)


@pytest.mark.parametrize(
    "marker", ["# rest unchanged", "// ...", "# (the rest stays the same)", "# [rest of the file]"]
)
def test_a_comment_of_omission_words_only_is_a_marker(marker: str) -> None:
    update = f"import os\nimport sys\nimport time\n\n\n{marker}\n"
    assert merged(update) == FILE.replace("import sys\n", "import sys\nimport time\n")


def test_decorators_shown_with_a_definition_replace_the_old_ones() -> None:
    code = FILE.replace("def main", "@cached(\n    size=3,\n)\ndef main")
    update = "# ... existing code ...\n@cached(size=4)\ndef main():\n    store = Store(sys.argv[1])\n"
    assert merged(update + "# ... existing code ...\n", code) == FILE.replace("def main", "@cached(size=4)\ndef main")


def test_imports_and_a_method_without_markers_leave_what_is_between() -> None:
    update = "import os\nimport sys\nimport time\n\n    def get(self, name):\n        return load(name)\n"
    expected = FILE.replace("import sys\n", "import sys\nimport time\n").replace(
        "        path = os.path.join(self.root, name)\n        return load(path)\n", "        return load(name)\n"
    )
    assert merged(update) == expected


def test_a_definition_that_breaks_off_keeps_its_rest() -> None:
    update = "    def put(self, name, data):\n        path = os.path.join(self.root, name)\n"
    assert merged(update) == FILE.replace("put(self, name, text)", "put(self, name, data)")
    assert "not shown to its end" in warnings(update)


def test_an_unchanged_definition_gives_no_warning() -> None:
    update = "def load(path):\n    return open(path).read()\n\n\nclass Store:\n"
    assert merged(update).endswith(FILE[FILE.index("class Store") :])
    assert not warnings(update)


def test_blank_lines_around_a_snippet_without_markers_do_not_matter() -> None:
    update = "import os\nimport sys\nimport time\n"
    assert merged(f"\n\n{update}\n\n") == merged(update) == FILE.replace("import sys\n", "import sys\nimport time\n")


def test_the_file_goes_on_where_a_snippet_marks_neither_end() -> None:
    update = "def load(path):\n    with open(path, 'rb') as file:\n# ... existing code ...\n    def get(self, name):\n        "
    update += "path = os.path.join(self.root, 'x', name)\n        return load(path)\n"
    assert merged(update).endswith(FILE[FILE.index("    def put") :])
    assert merged(update).startswith("import os\nimport sys\n")


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ("# ... existing code ...\n        self.root = root\n        self.cache = {}\n# ... existing code ...\n", "breaks off"),
        ("# ... existing code ...\nimport os\nimport sys\n# ... existing code ...\ndef main():\n    pass\n", "changes nothing"),
        ("# ... existing code ...\nclass Store:\n# ... existing code ...\n", "the edit changes nothing"),
        ("class Store:\n    def __init__(self, root, size):\n        self.root = str(root)\n", "without definitions"),
        ("def put(self):\n    return 1\n", "more of"),
        ("def read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef main():\n    1\n", "another name"),
        ("import sys\n\n\nclass Store:\n    def __init__(self, root):\n        self.root = root\n\n    value = 1\n"
         "    def put(self, name, text):\n", "no marker for what it leaves out"),
        ("import sys\nimport os\n# ... existing code ...\n", "would stand twice"),
    ],
)  # fmt: skip
def test_what_the_snippet_does_not_determine_gives_a_warning(update: str, words: str) -> None:
    assert words in warnings(update)


def test_a_method_that_several_classes_have_gives_a_warning() -> None:
    code = "class A:\n    def get(self):\n        return one\n\n\nclass B:\n    def get(self):\n        return two\n"
    assert "several places" in warnings("    def get(self):\n        return three\n", code)
    assert not warnings("    def get(self):\n        return two  # 2\n        return two\n", code)


def test_kept_says_which_lines_of_the_file_are_in_the_result() -> None:
    merge = candidate_merge(FILE, "import os\n\n\ndef load(path):\n# ... existing code ...\n")
    lines = FILE.splitlines()
    assert [line for line, kept in zip(lines, merge.kept, strict=True) if not kept] == ["import sys"]


def test_three_thousand_lines_take_milliseconds() -> None:
    draw = random.Random(0)
    lines = [
        f"{' ' * (4 * draw.randrange(3))}value_{draw.randrange(400)} = call({draw.randrange(9)})" for _ in range(3000)
    ]
    changed = lines[:]
    changed[1500:1503] = ["changed = 1"]
    code, after = "\n".join(lines) + "\n", "\n".join(changed) + "\n"
    update = snippet_of(code, after)
    began = time.perf_counter()
    text = candidate_merge(code, update).text
    assert time.perf_counter() - began < 1.0
    assert text == after


EQUAL = "x = 1\n" * 10_000
FLAT = [f"value_{number} = {number}\n" for number in range(5000)]
MARKER = "# ... existing code ...\n"


@pytest.mark.parametrize(
    ("code", "update"),
    [
        (EQUAL, MARKER + "x = 1\ny = 2\nx = 1\n" + MARKER),
        (EQUAL, (MARKER + "x = 1\n") * 200),
        (EQUAL, "<<<<<<< SEARCH\nx = 1\n=======\ny = 1\n>>>>>>> REPLACE\n"),
        ("".join(FLAT), "".join(MARKER + f"{FLAT[row]}new_{row} = 1\n{FLAT[row + 1]}" for row in range(0, 5000, 50))),
        ("".join(FLAT), "".join(f"{line[:-1]}  # new\n" if row % 10 else line for row, line in enumerate(FLAT[:300]))),
        (f"a = [{'1, ' * 300_000}]\nb = 2\nstore = 3\n", f"a = [{'1, ' * 299_999}]\nb = 2\n{MARKER}"),
        (" " * 1_000_000 + "\nb = 2\nstore = 3\n", MARKER + "b = 3\nstore = 3\n" + " " * 100_000),
        ("def f():\n    return 1\n\n" * 1000, "def f():\n    return 2\n\n" * 40),
    ],
    ids=["equal", "markers", "block", "parts", "alike", "line", "spaces", "definitions"],
)
def test_large_and_odd_edits_do_not_take_long(code: str, update: str) -> None:
    began = time.thread_time()
    try:
        text = candidate_merge(code, update).text
    except EditNotFound:
        text = code
    lines = text.split("\n")
    check(code, update, "\n".join(lines[: len(lines) // 2] + lines[len(lines) // 2 + 1 :]), "x.txt")
    assert time.thread_time() - began < 6.0, "each of these takes under a second, on a machine at rest"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=12, max_size=60, unique=True), st.data())
def test_a_snippet_of_any_change_to_distinct_lines_merges_back(numbers: list[int], data: st.DataObject) -> None:
    lines = [f"value_{number} = {number}" for number in numbers]
    first = data.draw(st.integers(0, len(lines) - 1))
    last = data.draw(st.integers(first, min(len(lines), first + (4 if first else 3))))
    new = [f"other_{number} = call({number})" for number in range(data.draw(st.integers(0, 4)))]
    after = lines[:first] + new + lines[last:]
    if after == lines or not after:
        return
    before_text, after_text = "\n".join(lines) + "\n", "\n".join(after) + "\n"
    assert candidate_merge(before_text, snippet_of(before_text, after_text)).text == after_text


@pytest.mark.parametrize(
    ("path", "head", "rest", "update"),
    [
        ("a.sh", "#!/bin/sh\n", "set -e\n\necho one\necho two\n", "set -e\n\necho 1\necho two\n"),
        (
            "a.py",
            "#!/usr/bin/env python3\n# -*- coding: utf-8 -*-\n",
            FILE,
            "import os\nimport re\nimport sys\n\n\ndef load(path):\n",
        ),
        ("a.tsx", '"use client";\n\n', JAVASCRIPT, JAVASCRIPT.replace("count = 0;", "count = 1;", 1)),
        ("Dockerfile", "# syntax=docker/dockerfile:1\n", "FROM python\n\nRUN make\n", "FROM python\n\nRUN make all\n"),
        ("a.yaml", "---\n", "name: a\nversion: 1\n\nsize: 3\n", "name: a\nversion: 2\n\n# ... existing code ...\n"),
        ("a.py", "\ufeff", FILE, "import os\n\n\ndef load(path):\n# ... existing code ...\n"),
        (
            "a.go",
            "//go:build linux\n\n",
            "package main\n\nvar a = 1\n\nvar b = 2\n",
            "package main\n\nvar a = 2\n\nvar b = 2\n",
        ),
        ("a.php", "<?php\n", "namespace A;\n\n$one = 1;\n$two = 2;\n", "namespace A;\n\n$one = 11;\n$two = 2;\n"),
    ],
    ids=["shebang", "coding", "use client", "syntax", "yaml", "bom", "build", "php"],
)
def test_what_a_file_begins_with_stays_where_the_edit_begins_below(
    path: str, head: str, rest: str, update: str
) -> None:
    merge = candidate_merge(head + rest, update, path)
    assert merge.text.startswith(head) and merge.text != head + rest
    assert merge.text == head + candidate_merge(rest, update, path).text


FUNCTIONS = "import os\n\n\n" + "\n\n".join(f"def {name}():\n    return {name!r}\n" for name in ("one", "two", "three"))


@pytest.mark.parametrize(
    "update",
    [
        MARKER + "def one():\n    return 1\n",
        "import os\nimport sys\n\n" + MARKER + "\ndef one():\n    return 1\n",
        MARKER + "\n\ndef one():\n    return 'one'\n\n\ndef two():\n    return 2\n",
    ],
)
def test_the_files_end_stays_where_the_edit_ends_without_a_marker(update: str) -> None:
    assert candidate_merge(FUNCTIONS, update).text.endswith("def three():\n    return 'three'\n")


@pytest.mark.parametrize("number", [1, 3, 14, 40])
def test_the_files_end_is_deleted_only_with_a_warning(number: int) -> None:
    """An edit without other changes may mean that the rows after its last one are deleted."""
    code = FUNCTIONS + "".join(f"\n\ndef f{each}():\n    return {each}\n" for each in range(number))
    merge = candidate_merge(code, MARKER + "def two():\n    return 'two'\n")
    assert merge.text != code and merge.warnings


def test_the_last_row_of_the_file_is_replaced_without_a_warning() -> None:
    merge = candidate_merge(FUNCTIONS, MARKER + "def three():\n    return 3\n")
    assert merge.text == FUNCTIONS.replace("'three'", "3") and not merge.warnings


TWO = "class A:\n    def close(self):\n        self.done = 1\n\n    def a(self):\n        return 1\n\n\n"
TWO += TWO.replace("A", "B").replace("a(", "b(")
TABLES = "CREATE TABLE a (\n  id INT,\n  name TEXT,\n  size INT\n);\n"
TABLES += "\n" + TABLES.replace("a (", "b (")


@pytest.mark.parametrize(
    ("code", "update", "lines"),
    [
        (TWO, MARKER + "    def close(self):\n        self.done = 2\n" + MARKER, (2, 10)),
        (TWO, "    def close(self):\n        self.done = 2\n", (2, 10)),
        (TABLES, "-- ...\n  name TEXT NOT NULL,\n  size INT\n-- ...\n", (3, 9)),
        (TABLES, "<<<<<<< SEARCH\n  name TEXT,\n=======\n  name TEXT NOT NULL,\n>>>>>>> REPLACE\n", (3, 9)),
        (TABLES, "@@ @@\n id INT,\n-  name TEXT,\n+  name TEXT NOT NULL,\n", (2, 8)),
    ],
    ids=["marked", "bare", "table", "block", "diff"],
)
def test_of_two_equal_places_both_are_named(code: str, update: str, lines: tuple[int, int]) -> None:
    said = warnings(update, code)
    assert all(re.search(rf"\b{line}\b", said) for line in lines), said


YAML = """\
jobs:
  test:
    steps:
      - uses: checkout
        with:
          depth: 1
      - run: build
        with:
          depth: 1
      - run: test
"""
TABLE = """\
var cases = []row{
\t{
\t\tname: "one",
\t\twant: 1,
\t},
\t{
\t\tname: "two",
\t\twant: 2,
\t},
}
"""
LIST = """\
<ul>
  <li>
    <a href="/one">One</a>
  </li>
  <li>
    <a href="/two">Two</a>
  </li>
</ul>
"""
JEST = """\
describe("Store", () => {
  it("loads", () => {
    expect(load()).toBe(1);
  });

  it("saves", () => {
    expect(save()).toBe(2);
  });
});
"""


@pytest.mark.parametrize(
    ("code", "update", "after", "new"),
    [
        (
            YAML,
            "# ...\n      - run: build\n        with:\n          depth: 1\n      - run: lint\n        with:\n"
            "          depth: 1\n# ...\n",
            "      - run: build\n        with:\n          depth: 1\n",
            "      - run: lint\n        with:\n          depth: 1\n",
        ),
        (
            TABLE,
            'var cases = []row{\n\t// ...\n\t{\n\t\tname: "two",\n\t\twant: 2,\n\t},\n'
            '\t{\n\t\tname: "three",\n\t\twant: 3,\n\t},\n}\n',
            "\t\twant: 2,\n\t},\n",
            '\t{\n\t\tname: "three",\n\t\twant: 3,\n\t},\n',
        ),
        (
            LIST,
            '<!-- ... -->\n    <a href="/two">Two</a>\n  </li>\n  <li>\n    <a href="/new">New</a>\n  </li>\n</ul>\n',
            '    <a href="/two">Two</a>\n  </li>\n',
            '  <li>\n    <a href="/new">New</a>\n  </li>\n',
        ),
        (
            JEST,
            'describe("Store", () => {\n  // ...\n\n  it("drops", () => {\n    expect(drop()).toBe(3);\n  });\n});\n',
            "    expect(save()).toBe(2);\n  });\n",
            '\n  it("drops", () => {\n    expect(drop()).toBe(3);\n  });\n',
        ),
    ],
    ids=["yaml", "go", "html", "jest"],
)
def test_a_block_that_ends_like_its_neighbour_is_inserted_and_replaces_none(
    code: str, update: str, after: str, new: str
) -> None:
    assert code.count(after) == 1
    merge = candidate_merge(code, update)
    assert merge.text == code.replace(after, after + new) and not merge.warnings


@pytest.mark.parametrize(
    ("code", "update"),
    [
        (
            TABLE,
            '// ...\n\t{\n\t\tname: "one",\n\t\twant: 1,\n\t},\n\t{\n\t\tname: "new",\n\t\twant: 3,\n\t},\n// ...\n',
        ),
        (
            LIST,
            '<!-- ... -->\n  <li>\n    <a href="/one">One</a>\n  </li>\n'
            '  <li>\n    <a href="/new">New</a>\n  </li>\n<!-- ... -->\n',
        ),
        (
            JEST,
            "// ...\n    expect(load()).toBe(1);\n  });\n\n"
            '  it("drops", () => {\n    expect(drop()).toBe(3);\n  });\n\n// ...\n',
        ),
    ],
    ids=["go", "html", "jest"],
)
def test_between_two_markers_a_neighbour_is_deleted_only_with_a_warning(code: str, update: str) -> None:
    merge = candidate_merge(code, update)
    assert all(merge.kept) or merge.warnings


MOVED = "import os\n\n\n" + "\n\n".join(f"def {name}():\n    return {name!r}\n" for name in ("two", "one", "three"))


@pytest.mark.parametrize("update", [MOVED, MARKER + MOVED.removeprefix("import os\n")], ids=["whole", "marked"])
def test_a_moved_definition_appears_once(update: str) -> None:
    merge = candidate_merge(FUNCTIONS, update)
    assert merge.text == MOVED and not merge.warnings


@pytest.mark.parametrize("marked", ["", MARKER])
@pytest.mark.parametrize("instruction", ["remove two", "Delete the function `two`.", ""])
def test_a_definition_is_deleted_if_the_instruction_names_it(marked: str, instruction: str) -> None:
    update = marked + "def one():\n    return 'one'\n\n\ndef three():\n    return 'three'\n"
    merge = candidate_merge(FUNCTIONS, update, "a.py", instruction)
    without = FUNCTIONS.replace("def two():\n    return 'two'\n\n\n", "")
    if instruction:
        assert merge.text == without and not merge.warnings
    else:
        assert merge.text == without or merge.warnings


@pytest.mark.parametrize(
    "update",
    [
        FUNCTIONS,
        MARKER + "def two():\n    return 'two'\n" + MARKER,
        "def two():\n    return 'two'\n",
        "@@ -1 +1 @@\n-import os\n+import os\n",
    ],
    ids=["whole", "marked", "definition", "diff"],
)
def test_an_edit_that_changes_nothing_says_so(update: str) -> None:
    merge = candidate_merge(FUNCTIONS, update)
    assert merge.text == FUNCTIONS and "the edit changes nothing" in merge.warnings


TABBED = "package a\n\nfunc one() {\n\tif x {\n\t\ty()\n\t}\n}\n\nfunc two() {\n\tz()\n}\n"


@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_snippet_in_spaces_takes_the_tabs_of_the_file(width: int) -> None:
    update = "// ...\n\tif x {\n\t\ty()\n\t\tw()\n\t}\n// ...\n".replace("\t", " " * width)
    merge = candidate_merge(TABBED, update, "a.go")
    assert merge.text == TABBED.replace("\t\ty()\n", "\t\ty()\n\t\tw()\n") and not merge.warnings


def test_a_snippet_in_tabs_takes_the_spaces_of_the_file() -> None:
    update = "// ...\n\tif x {\n\t\ty()\n\t\tw()\n\t}\n// ...\n"
    code = TABBED.replace("\t", "    ")
    merge = candidate_merge(code, update, "a.go")
    assert merge.text == code.replace("        y()\n", "        y()\n        w()\n") and not merge.warnings


@pytest.mark.parametrize("marked", ["", MARKER])
def test_a_new_body_in_spaces_takes_the_tabs_of_the_file(marked: str) -> None:
    code = FUNCTIONS.replace("    ", "\t")
    merge = candidate_merge(code, f"{marked}def two():\n    value = 2\n    return value\n{marked}", "a.py")
    assert merge.warnings or merge.text == code.replace("\treturn 'two'\n", "\tvalue = 2\n\treturn value\n")


def test_the_alternative_of_an_edit_that_ends_without_a_marker_ends_the_file_there() -> None:
    code = "# settings\nversion: 1\nport: 80\nname: one\nkey: two\n"
    merge = candidate_merge(code, "# ... existing code ...\nversion: 1\nport: 8080\nname: one\n", "a.yaml")
    assert merge.text == code.replace("80", "8080") and merge.warnings
    assert merge.alternative is not None and merge.alternative.text == merge.text.removesuffix("key: two\n")
    assert merge.alternative.kept == (True, True, False, True, False) and merge.alternative.warnings == merge.warnings


def test_the_alternative_of_two_equal_places_is_the_second() -> None:
    merge = candidate_merge(TABLES, "-- ...\n  name TEXT NOT NULL,\n  size INT\n-- ...\n", "a.sql")
    head, middle, tail = TABLES.split("  name TEXT,")
    new = "  name TEXT NOT NULL,"
    assert merge.text == f"{head}{new}{middle}  name TEXT,{tail}"
    assert merge.alternative is not None and merge.alternative.text == f"{head}  name TEXT,{middle}{new}{tail}"


def test_without_a_warning_there_is_no_alternative() -> None:
    merge = candidate_merge(FUNCTIONS, MARKER + "def two():\n    return 2\n\n\n" + MARKER)
    assert merge.alternative is None and not merge.warnings


@pytest.mark.parametrize(
    ("code", "update"),
    [
        ("b { x: 1 }\nc { y: 2 }\n", "b { x: 1 }\na{\n}\nc { y: 2 }\n"),
        ("a\n", "@@ -1 +1 @@\n-a\n+b\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-q\n+r\n"),
        ("a\n", f"@@ -{'1' * 5000} +1 @@\n-a\n+b\n"),
        ("a\n", f"<<<<<<< SEARCH\n:start_line:{'1' * 5000}\n-------\na\n=======\nb\n>>>>>>> REPLACE\n"),
        ("\n\n\n", "x\n"),
        ("\n\n", "# ...\n"),
        ("a = 1\n", "# ...\n# ...\n"),
        ("a = 1\nb = 2\n", "\ud800\n"),
    ],
)
def test_odd_edits_are_merged_or_refused(code: str, update: str) -> None:
    try:
        merge = candidate_merge(code, update)
    except InputError:
        return
    check(code, update, merge.text, None, merge)


def test_an_instruction_that_only_sounds_like_a_removal_removes_nothing() -> None:
    code = "def checkout():\n    a = 1\n    b = 2\n    c = 3\n    d = 4\n    return a\n"
    update = "def checkout():\n    stripe = 1\n    return a\n"
    assert candidate_merge(code, update, "a.py", "Add Stripe payments to checkout").warnings
