"""The contamination check finds 13 shared words, not 12, in prompts and in outputs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import InputError
from paceline.train.contamination import NGRAM, HeldOut, load_held_out, read_records, remove_contaminated, words
from tests.train.prompt_files import mbpp_record, write_data

SECRET = [f"secret{index}" for index in range(20)]


def record(text: str, task: str = "function") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "task": task}


@pytest.fixture
def held_out() -> HeldOut:
    found = HeldOut()
    found.add("benchmark", " ".join(SECRET))
    return found


def test_thirteen_words_are_found_and_twelve_are_not(held_out: HeldOut) -> None:
    thirteen, twelve = " ".join(SECRET[3:16]), " ".join(SECRET[3:15])
    assert len(thirteen.split()) == NGRAM
    assert held_out.find(f"before {thirteen} after") == "benchmark"
    assert held_out.find(f"before {twelve} after") is None
    assert held_out.num_ngrams == len(SECRET) - NGRAM + 1


def test_case_and_punctuation_do_not_hide_a_hit(held_out: HeldOut) -> None:
    assert held_out.find("_".join(SECRET[:13]).upper()) == "benchmark"
    assert held_out.find("(\n".join(SECRET[:13])) == "benchmark"


def test_import_lines_are_no_words() -> None:
    code = "import numpy as np\n>>> from os import path\nfrom a.b import (c)\ndef important(x): return from_x"
    assert words(code) == ["def", "important", "x", "return", "from", "x"]


def test_hits_are_removed_and_counted(held_out: HeldOut) -> None:
    hit = " ".join(SECRET[:13])
    output = {**record("a clean prompt"), "output": hit}
    tool = {"messages": [*record("look")["messages"], {"role": "assistant", "content": None}], "task": "tool"}
    records = [record("clean"), record(hit, "edit"), output, tool, {"text": hit}]
    kept, found = remove_contaminated(records, held_out)
    assert kept == [records[0], tool]
    summary = found.summary()
    assert (summary["checked"], summary["removed"]) == (5, 3)
    assert summary["removed_by_benchmark"] == {"benchmark": 3}
    assert summary["removed_by_task"] == {"": 1, "edit": 1, "function": 1}
    assert summary["held_out_texts"] == {"benchmark": 1}


def test_the_data_set_holds_out_its_own_benchmarks(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    extra = tmp_path / "humaneval.jsonl"
    extra.write_text(json.dumps({"prompt": " ".join(SECRET), "nested": [{"test": "check"}]}) + "\n")
    folder = tmp_path / "requests"
    folder.mkdir()
    (folder / "api.py").write_text("def get(): " + " ".join(reversed(SECRET)))
    found = load_held_out(data, [extra, folder])
    assert found.texts == {
        "mbpp-last-100": 100,
        "bigcodebench-hard": 2,
        "edits-dev": 2,
        "humaneval": 1,
        "requests": 1,
    }
    assert found.find(mbpp_record(81)["text"]) == "mbpp-last-100"
    assert found.find(mbpp_record(80)["text"]) is None
    assert (
        found.find("\n".join(read_records(data / "edits/git_edits.jsonl.gz")[0]["after"].split("\n")[:9]))
        == "edits-dev"
    )
    assert found.find(" ".join(SECRET[4:])) == "humaneval"
    assert found.find(" ".join(reversed(SECRET))) == "requests"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with pytest.raises(InputError, match=r"there is no file .*absent\.jsonl"):
        load_held_out(data, [tmp_path / "absent.jsonl"])
    with pytest.raises(InputError, match=r"there is no file .*absent\.txt"):
        load_held_out(data, [tmp_path / "absent.txt"])
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"a": 1}\n{"a"')
    with pytest.raises(InputError, match="is not JSON"):
        read_records(damaged)


def test_sixty_thousand_prompts_take_less_than_a_minute(held_out: HeldOut) -> None:
    prompts = [record(" ".join(f"w{(number * index) % 997}" for index in range(200))) for number in range(3000)]
    start = time.process_time()
    kept, _ = remove_contaminated(prompts, held_out)
    assert len(kept) == 3000
    assert (time.process_time() - start) * 20 < 60
