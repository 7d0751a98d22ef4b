"""Context compaction: kept lines are unchanged, in order and within the ratio, and they are the most valuable ones."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paceline
from paceline.errors import InputError
from paceline.tasks.compact import Compacted, CompactedMessage, compact
from paceline.tasks.outline import DefinitionBlock, outline
from paceline.tasks.scoring import ConversationMessage, LineScorer, split_lines

_LINES = st.sampled_from(
    [
        *(
            "",
            "}",
            "x = 1",
            "def load(path):",
            "    return open(path)",
            "\r",
            "\rab\r",
            "    # \u2028, \x0b, \x85 end no line",
        ),
        *(
            "<keepContext>",
            "  </keepContext>\r",
            "a <keepContext> inline",
            "(filtered 3 lines)",
            "é" * 40,
            "word " * 30,
        ),
    ]
)
_TEXTS = st.builds(
    lambda lines, end: "\n".join(lines) + end,
    st.lists(_LINES, max_size=25),
    st.sampled_from(["", "\n", "\r\n", "\n\n"]),
)
_MESSAGES = st.lists(
    st.builds(ConversationMessage, st.sampled_from(["system", "user", "assistant", "tool"]), _TEXTS),
    min_size=0,
    max_size=6,
)
_RATIOS = st.sampled_from([0.05, 0.3, 0.5, 0.77, 1.0])
CODE = Path(paceline.__file__).parent.joinpath("tasks", "merge.py").read_text(encoding="utf-8")


def rebuilt(before: ConversationMessage, after: CompactedMessage, markers: bool) -> str:
    """The message as its ranges require it."""
    lines = split_lines(before.content)
    parts, reached = [], 0
    for each in after.dropped:
        assert reached <= each.start - 1 < each.end <= len(lines), "ranges in order, inside, apart from each other"
        assert reached == 0 or each.start - 1 > reached
        last = lines[each.end - 1]
        ending = "\r\n" if last.endswith("\r\n") else "\n" if last.endswith("\n") else ""
        parts += lines[reached : each.start - 1]
        parts.append((f"(filtered {each.end - each.start + 1} lines)" if markers else "") + ending)
        reached = each.end
    return "".join([*parts, *lines[reached:]])


def kept_by_force(lines: list[str]) -> set[int]:
    kept: set[int] = set()
    inside = False
    for number, line in enumerate(lines, 1):
        inside = inside or line.strip() == "<keepContext>"
        if inside:
            kept.add(number)
        inside = inside and line.strip() != "</keepContext>"
    return kept


@settings(max_examples=300, deadline=None)
@given(_MESSAGES, _RATIOS, st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from([None, "", "load a path"]))
def test_kept_lines_are_unchanged(
    messages: list[ConversationMessage], ratio: float, recent: int, system: bool, markers: bool, query: str | None
) -> None:
    options = {"ratio": ratio, "preserve_recent": recent, "compress_system": system, "markers": markers}
    done = compact(messages, query, **options)  # type: ignore[arg-type]
    assert done == compact(messages, query, **options), "deterministic"  # type: ignore[arg-type]
    assert [(each.role, each.name) for each in done.messages] == [(each.role, each.name) for each in messages]
    least = spent = 0
    for index, (before, after) in enumerate(zip(messages, done.messages, strict=True)):
        lines = split_lines(before.content)
        assert "".join(lines) == before.content and all("\n" not in line[:-1] for line in lines)
        assert after.content == rebuilt(before, after, markers)
        force = kept_by_force(lines)
        dropped = {number for each in after.dropped for number in range(each.start, each.end + 1)}
        assert {number for each in after.kept for number in range(each.start, each.end + 1)} == force
        assert not dropped & force
        if index >= len(messages) - recent or (before.role == "system" and not system):
            assert after.content == before.content and not dropped
        else:
            spent += len(after.content)
            least += least_size(lines, force)
    assert done.output_size == sum(len(each.content) for each in done.messages) and done.spent == spent
    assert done.spent <= max(done.budget, least)
    if ratio == 1:
        assert [each.content for each in done.messages] == [each.content for each in messages]


def least_size(lines: list[str], force: set[int]) -> int:
    """The least size of a message: its forced lines and its markers."""
    size = 0
    for stays, run in itertools.groupby(range(1, len(lines) + 1), key=force.__contains__):
        numbers = list(run)
        size += (
            sum(len(lines[number - 1]) for number in numbers) if stays else len(f"(filtered {len(numbers)} lines)\r\n")
        )
    return size


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_ratio_is_met_to_within_a_line(ratio: float, ending: str) -> None:
    text = CODE.replace("\n", ending) * 4
    done = compact(text, "where markers end", ratio=ratio)
    assert done.budget == int(ratio * len(text)) and done.input_size == len(text)
    longest = max(map(len, text.split("\n"))) + 1
    assert done.budget - longest < done.spent == done.output_size == len(done.text) <= done.budget


def test_tokens_are_counted_where_a_counter_is_given() -> None:
    def words(texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    done = compact(CODE, ratio=0.4, count=words)
    assert done.input_size == len(CODE.split()) and len(done.text.split()) <= done.budget == int(0.4 * done.input_size)


def test_a_query_decides() -> None:
    parts = [f"def {name}(value):\n    result = {name}_rules(value)\n    return result\n\n\n" for name in NAMES]
    for name in ("token", "colour", "session"):
        done = compact("".join(parts), f"how is the {name} made?", ratio=0.2)
        assert f"def {name}(value):" in done.text and f"    result = {name}_rules(value)\n" in done.text


def test_words_are_found_in_their_forms_and_in_identifiers() -> None:
    lines = [f"    thing_{number} = other_{number}(value)\n" for number in range(100)]
    for line, query in {
        "    self.cancelRequest(name)\n": "how are requests cancelled",
        "    cache.evict(pages)\n": "evicting of caches",
        "    размер = длина(списка)\n": "какая длина",
    }.items():
        assert line in compact("".join([*lines[:50], line, *lines[50:]]), query, ratio=0.1).text


NAMES = ["token", "colour", "invoice", "session", "window", "cache", "layout", "weather", "orbit", "recipe", "chapter"]


def test_the_header_of_a_kept_line_is_kept() -> None:
    body = "".join(f"        step_{number} = compute(number_{number}, other)\n" for number in range(30))
    text = "".join(
        f"class {name.title()}:\n    def run_{name}(\n        self, number: int\n    ) -> None:\n{body}\n"
        for name in NAMES
    )
    wanted = "        needle = haystack.search(straw)\n"
    text = text.replace(body, body[: len(body) // 2] + wanted + body[len(body) // 2 :], 1)
    done = compact(text, "the needle in the haystack", ratio=0.1)
    assert wanted in done.text and "class Token:\n" in done.text and "    def run_token(\n" in done.text


def test_the_same_file_shown_twice_stays_once_and_late() -> None:
    shown = ConversationMessage("tool", CODE)
    talk = [ConversationMessage("user", "Fix the marker."), ConversationMessage("assistant", "Reading."), shown]
    done = compact([*talk, ConversationMessage("assistant", "Again."), shown, *talk[:2]], ratio=0.45)
    first, second = len(done.messages[2].content), len(done.messages[4].content)
    assert second > 5 * first


def test_errors_are_kept_among_ordinary_lines() -> None:
    log = [f"collected item {number} of the suite in order\n" for number in range(300)]
    log[150] = "ValueError: the widget has no handle\n"
    done = compact("".join(log), "", ratio=0.1)
    assert log[150] in done.text


def test_enormous_lines_leave_the_rest_its_place() -> None:
    lines = [f"value_{number} = compute({number})\n" for number in range(40)]
    enormous = "data = [" + "1234, " * 5000 + "]\n"
    done = compact("".join([*lines[:20], enormous, *lines[20:]]), "data values", ratio=0.05)
    assert enormous not in done.text and all(line in done.text for line in lines)
    assert compact("x" * 1000, ratio=0.5).text == "(filtered 1 lines)"
    assert compact("x" * 1000, ratio=0.5, markers=False).text == ""


def test_forced_lines_stay_over_the_budget_and_are_reported() -> None:
    kept = "<keepContext>\n" + "must stay, all of it\n" * 50 + "</keepContext>\n"
    done = compact("spare line\n" * 20 + kept + "spare line\n" * 20, "spare", ratio=0.1)
    assert kept in done.text and done.spent > done.budget and done.text.count("spare line") == 0
    unclosed = compact("spare line\n" * 50 + "<keepContext>\nto the end\n" + "spare line\n" * 5, ratio=0.05)
    assert unclosed.text.endswith("<keepContext>\nto the end\n" + "spare line\n" * 5)


def test_empty_and_blank_input() -> None:
    assert compact("", ratio=0.1) == Compacted((CompactedMessage("user", "", None, (), ()),), 0, 0, 0, 0)
    assert compact([], ratio=0.1).text == ""
    assert compact([ConversationMessage("assistant", "")] * 3, preserve_recent=0).text == "\n\n"
    assert len(compact("\n" * 1000, ratio=0.05).text) == 50 and compact("\n" * 20, ratio=0.9).text == "\n" * 20


def test_carriage_returns_stay_and_markers_end_as_the_lines_do() -> None:
    text = "".join(f"line number {number} of this text\r\n" for number in range(100))
    done = compact(text, ratio=0.3)
    assert done.text.count("\r\n") == done.text.count("\n") and "lines)\r\n" in done.text


@pytest.mark.parametrize("options", [{"ratio": 0.01}, {"ratio": 1.5}, {"ratio": float("nan")}, {"preserve_recent": -1}])
def test_what_is_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        compact("text", **options)  # type: ignore[arg-type]


def test_outlines_of_languages_fences_and_numbered_listings() -> None:
    python = "import os\n\nclass A:\n    def one(\n        self,\n    ):\n        return 1\n"
    found = outline(split_lines(python), "a.py")
    assert found.blocks == (DefinitionBlock(2, 2, 6), DefinitionBlock(3, 5, 6)) and found.imports == (0,)
    numbered = "".join(f"{number:6}\t{line}" for number, line in enumerate(split_lines(python), 10))
    assert outline(split_lines(numbered)) == found
    fenced = f"Look:\n```python\n{python}```\nThat is it.\n"
    assert outline(split_lines(fenced)).blocks == (DefinitionBlock(4, 4, 8), DefinitionBlock(5, 7, 8))
    script = "export class A {\n  one(): number {\n    return 1;\n  }\n}\nconst two = () => {\n  return 2;\n};\n"
    blocks = DefinitionBlock(0, 0, 4), DefinitionBlock(1, 1, 3), DefinitionBlock(5, 5, 7)
    assert outline(split_lines(script), "a.ts").blocks == blocks
    assert outline(split_lines("Only words.\nNo code at all.\n" * 10)).blocks == ()


@pytest.mark.parametrize("suffix", [".js", ".tsx", ".go", ".rs", ".java", ".c", ".cpp", ".rb", ".sh", ".css", ".html"])
def test_every_grammar_accepts_any_text(suffix: str) -> None:
    assert outline(split_lines(CODE + "\ud800 <a>\n"), f"a{suffix}").imports is not None


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_finite_and_one_a_line(seed: int) -> None:
    source = random.Random(seed)
    messages = [
        ConversationMessage(
            source.choice(["user", "assistant"]), "\n".join(source.choices(CODE.split("\n"), k=source.randrange(40)))
        )
        for _ in range(20)
    ]
    scores = LineScorer().score(messages, None)
    assert [len(row) for row in scores] == [len(split_lines(each.content)) for each in messages]
    assert all(0 <= value < float("inf") for row in scores for value in row)


def test_many_lines_take_little_time() -> None:
    messages = [ConversationMessage("tool", CODE.replace("lines", f"lines{number}")) for number in range(40)]
    number = sum(each.content.count("\n") for each in messages)
    compact(messages[:2])
    began = time.process_time()
    compact(messages, "where markers end", ratio=0.3)
    assert (time.process_time() - began) / number < 1e-4, "100,000 lines in 10 s of a slow core"


def test_the_package_function_needs_no_model() -> None:
    assert paceline.compact(CODE, "markers", ratio=0.2) == compact(CODE, "markers", ratio=0.2)


def test_the_command_prints_the_kept_lines(tmp_path: Path) -> None:
    file = tmp_path / "merge.py"
    file.write_text(CODE)

    def run(*options: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paceline", "compact", *options]
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)

    done = run(str(file), "-", "--query", "markers", "--ratio", "0.3", "--json", given="one line\n")
    values = json.loads(done.stdout)
    assert values["messages"][1]["content"] == "one line\n" and values["spent"] <= values["budget"]
    assert values["messages"][0]["dropped"][0].keys() == {"start", "end"}
    plain = run(str(file), "--ratio", "0.3", "--no-markers").stdout
    assert len(plain) <= 0.3 * len(CODE) and set(plain.split("\n")) <= {"", *CODE.split("\n")}
    refused = run(str(file), "--ratio", "3")
    assert refused.returncode == 1 and "0.05 to 1" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.c", "int x;\n#include <a>\n"),
        ("a.go", "package a\nfunc f() {\n x()\n"),
        ("", "int main() {\n}\n" + "#include <a.h>\n" * 5),
    ],
)
def test_nodes_that_end_with_their_line_feed(name: str, text: str) -> None:
    kept = compact([ConversationMessage("user", text, name or None)], "x", ratio=0.5, preserve_recent=0)
    assert all(line in text.split("\n") or "filtered" in line for line in kept.messages[0].content.split("\n"))


def test_blank_lines_take_no_time() -> None:
    began = time.perf_counter()
    compact([ConversationMessage("user", "\n" * 30_000 + "hello\n")], "x", preserve_recent=0)
    assert time.perf_counter() - began < 5
