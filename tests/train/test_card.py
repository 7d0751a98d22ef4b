"""The card says where the data are from in few lines, and fits into a drafter's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paceline.drafters.checkpoint import read_checkpoint
from paceline.train.card import card_text, keep_sources, read_sources, summarise
from paceline.train.run import DRAFTER_FILE
from paceline.train.samples import Sample
from tests.train.data import random_samples, tiny_run, write

TASKS = ("continue", "edit", "explain", "fix", "function", "tests", "tool")
LICENCES = ("MIT License", "BSD-3-Clause", "Apache Software License", "Apache-2.0 AND MIT", "ISC License (ISCL)")
HELD_OUT = ("bigcodebench-hard", "edits-dev", "mbpp-last-100", "humaneval", "flask", "requests", "rich")


def described(num_packages: int = 400) -> dict[str, Any]:
    """A sources.json of `write_prompts`."""
    names = [f"package-of-some-length-{number}" for number in range(num_packages)]
    report = {
        "prompts": 40000,
        "tasks": dict.fromkeys(TASKS, 5000),
        "sources": {**dict.fromkeys(names, 90), "mbpp": 3000, "synthetic": 7000, "traces": 200},
        "contamination": {
            "ngram": 13,
            "held_out_texts": dict.fromkeys(HELD_OUT, 100),
            "checked": 46000,
            "removed": 445,
            "removed_by_benchmark": dict.fromkeys(HELD_OUT, 50),
        },
    }
    packages = [
        {"name": name, "version": "1.2.3", "licence": LICENCES[number % len(LICENCES)], "use": "training"}
        for number, name in enumerate(names)
    ]
    return {"seed": 0, "files": {"prompts.jsonl": report}, "packages": packages, "refused": {"gpl": "copyleft"}}


def test_packages_and_licences_are_counted_together() -> None:
    found = summarise(described(), "prompts.jsonl")
    assert found["sources"] == {"400 packages": 36000, "synthetic": 7000, "mbpp": 3000, "traces": 200}
    assert found["licences"] == {
        "MIT": 7400,
        "BSD": 7200,
        "Apache": 7200,
        "Apache and MIT": 7200,
        "ISC": 7200,
        "none: made by rule": 7000,
        "CC-BY-4.0": 3000,
    }
    assert found["contamination"]["removed"] == 445
    assert summarise(found, "prompts.jsonl") == found


def test_sources_are_found_beside_prompts_and_samples(tmp_path: Path) -> None:
    for folder in ("prompts", "samples"):
        (tmp_path / folder).mkdir()
    (tmp_path / "prompts" / "sources.json").write_text(json.dumps(described()))
    keep_sources(tmp_path / "prompts" / "prompts.jsonl.gz", tmp_path / "samples")
    found = read_sources([tmp_path / "run", tmp_path / "samples"])
    assert found == summarise(described(), "prompts.jsonl") == read_sources([tmp_path / "prompts"])
    keep_sources(tmp_path / "samples" / "other.jsonl", tmp_path / "run")
    assert read_sources([tmp_path / "run"]) == found  # of what is a summary already
    keep_sources(tmp_path / "nothing" / "prompts.jsonl", tmp_path / "another")
    assert read_sources([tmp_path / "another"]) is None


def test_the_card_is_short_and_fits_into_the_file(tmp_path: Path) -> None:
    (tmp_path / "sources.json").write_text(json.dumps(described()))
    samples = [
        Sample(each.prompt_key, TASKS[number % len(TASKS)], each.tokens, each.spans, f"t={0.7 * (number % 2):g}")
        for number, each in enumerate(random_samples(140))
    ]
    samples += [Sample(each.prompt_key, each.task, each.tokens, ()) for each in random_samples(20, seed=9)]
    card = tiny_run(tmp_path, tokens=6000).train([write(tmp_path / "data.bin", samples)])
    assert sum(card["data"]["by_variant"].values()) == card["data"]["train"]
    text = (tmp_path / "card.md").read_text()
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) < 500
    said = ("digest `identity`", "temperature 0.7 ", "400 packages 36,000", "licences", "445 were removed", "CC-BY-4.0")
    assert all(each in text for each in (*said, "epochs", "learning rate 0.004", "20 dropped", "| function |"))
    kept = read_checkpoint(tmp_path / DRAFTER_FILE).card
    assert len(json.dumps(kept)) < 32 << 10
    assert kept["sources"]["licences"]["MIT"] == 7400 and kept["evaluation"] == card["evaluation"]
    assert "not checked" not in text and "contamination: not checked" in card_text({**card, "sources": None})
    assert (kept["tokens"], kept["epochs"]) == (card["tokens"], card["epochs"])
