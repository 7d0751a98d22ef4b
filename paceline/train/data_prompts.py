"""Prompts made of the data set's files: MBPP, Exercism, real edits, QuixBugs and agent traces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import Any

from paceline.train.contamination import HELD_OUT_MBPP, read_records
from paceline.train.package_prompts import Prompt, user

VALIDATION_MBPP = 50  # records before the last 100, for the prompts that measure a training run
VALIDATION_EDITS = 20  # the last of one repository, which is no package
VALIDATION_REPOSITORY = "Aider-AI/aider"
# of the sources that are no packages, as the data set's README says
LICENCES = {
    "aider": "Apache-2.0",
    "httpx": "BSD-3-Clause",
    "mbpp": "CC-BY-4.0",
    "polyglot": "MIT",
    "quixbugs": "MIT",
    "starlette": "BSD-3-Clause",
    "synthetic": "none: made by rule",
    "traces": "MIT",
    "trio": "MIT OR Apache-2.0",
}
# repositories that benchmarks are made of, and a benchmark among the traces
_NEVER = re.compile(
    r"psf[/_]+requests|textualize[/_]+rich|pallets[/_]+flask|humaneval|editeval|speed-?bench", re.IGNORECASE
)
_LONGEST = 9000  # characters of a prompt, about 2,400 tokens

_MBPP = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}",
    "{text}\nYour code should pass these tests:\n{tests}",
    '"""\n{text}\n{first}\n"""\n',
    "{text} Name the function `{name}`.",
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```\n{text}\n{first}\n```",
    "{text} Then explain your solution briefly.\n\nExample:\n```python\n{first}\n```",
    "Write tests with pytest for this function. {text}\n\n```python\n{code}\n```",
    "{text} Someone wrote this:\n\n```python\n{code}\n```\n\nImprove it: readable names, type hints and a docstring.",
)
_MBPP_TASKS = ("function",) * 6 + ("tests", "edit")
_EXERCISE = (
    "{text}\n\nWrite the solution in {file}, which now holds:\n```python\n{stub}\n```",
    "{text}\n\nUse this stub:\n\n```python\n{stub}\n```\n\nReturn the whole file {file}.",
)
_EXERCISE_TESTS = "{text}\n\nWrite pytest tests for {file}:\n```python\n{code}\n```"
_EDIT = (
    "{subject}\n\n{path}:\n```python\n{before}\n```\n\nReturn the whole changed file.",
    "Here is {path}:\n\n```python\n{before}\n```\n\n{subject}",
    "Make this change: {subject}\n\n```python\n{before}\n```\n\nAnswer with SEARCH/REPLACE blocks:\n"
    "<<<<<<< SEARCH\nold lines\n=======\nnew lines\n>>>>>>> REPLACE",
)
_MERGE = (
    'Merge the update into the file. In the update, comments such as "... existing code ..." stand for code of the file '
    "that stays as it is. Write the whole merged file.\n\nFile:\n```\n{before}\n```\n\nUpdate:\n```\n{update}\n```",
    "<instruction>{subject}</instruction>\n<code>{before}</code>\n<update>{update}</update>",
)
_BUG = (
    "This function has a bug on one line. Fix it.\n\n```python\n{before}\n```",
    "Find the defect in this program and write the corrected program.\n```python\n{before}\n```",
)


def data_prompts(data: Path, random: Random, validation: bool = False) -> Iterator[tuple[str, str, Prompt]]:
    """Task, source and prompt of all that the data set's files give; the files are those of the data set's README.

    `validation` gives the prompts of the MBPP records and edits that training leaves out. MBPP's last records, the edits
    of split "dev" and BigCodeBench are in neither. Raises InputError for a file that is not there.
    """
    yield from _mbpp(read_records(data / "prompts/mbpp.jsonl.gz"), random, validation)
    edits = [each for each in read_records(data / "edits/git_edits.jsonl.gz") if each["split"] == "train"]
    kept = [each["commit"] for each in edits if each["repo"] == VALIDATION_REPOSITORY][-VALIDATION_EDITS:]
    yield from _edits([each for each in edits if (each["commit"] in kept) == validation], random)
    if validation:
        return
    for record in read_records(data / "prompts/polyglot_python.jsonl.gz"):
        values = {"text": record["instructions"], "file": record["stub_name"]}
        for wording in _EXERCISE:
            yield "function", "polyglot", user(wording.format(**values, stub=record["stub"])[:_LONGEST])
        yield "tests", "polyglot", user(_EXERCISE_TESTS.format(**values, code=record["example"])[:_LONGEST])
    for record in read_records(data / "edits/quixbugs_python.jsonl"):
        for wording in _BUG:
            yield "fix", "quixbugs", user(wording.format(before=record["before"].strip()))
    for record in read_records(data / "edits/aider_llm_edits.jsonl.gz"):
        if len(record["before"]) + len(record["user"]) < _LONGEST and not record["user"].startswith("/"):
            for wording in random.sample(_EDIT, 2):
                yield "edit", "aider", user(wording.format(**{**record, "subject": record["user"]}))
    for messages in _traces(data / "traces"):
        yield "tool", "traces", {"messages": messages}


def mbpp_prompt(record: dict[str, Any], wording: str = _MBPP[0]) -> str:
    """An MBPP record as a prompt; the default wording is the one that evaluations use."""
    tests = [each.strip() for each in record["test_list"]]
    code = record["code"].replace("\r\n", "\n")
    called = re.search(r"(\w+)\(", tests[0].removeprefix("assert").replace("(", " ", tests[0].startswith("assert (")))
    name = called.group(1) if called else "solution"
    return wording.format(text=record["text"].strip(), tests="\n".join(tests), first=tests[0], name=name, code=code)


def _mbpp(records: list[dict[str, Any]], random: Random, validation: bool) -> Iterator[tuple[str, str, Prompt]]:
    usable = records[:-HELD_OUT_MBPP]
    for record in usable[-VALIDATION_MBPP:] if validation else usable[:-VALIDATION_MBPP]:
        chosen = [0, *random.sample(range(1, len(_MBPP)), 1 if validation else 4)]
        for index in chosen:
            yield _MBPP_TASKS[index], "mbpp", user(mbpp_prompt(record, _MBPP[index]))


def _edits(records: list[dict[str, Any]], random: Random) -> Iterator[tuple[str, str, Prompt]]:
    for record in records:
        if len(record["before"]) > _LONGEST or _NEVER.search(record["repo"]):
            continue
        subject = re.sub(r"^\w+(\([\w-]+\))?: |\s*\(#\d+\)", "", record["subject"]).strip()
        values = {"subject": subject, "path": record["path"], "before": record["before"].rstrip()}
        values["update"] = update_snippet(record["before"], record["after"])
        source = record["repo"].split("/")[-1]
        yield "edit", source, user(random.choice(_EDIT).format(**values))
        yield "edit", source, user(random.choice(_MERGE).format(**values))


def update_snippet(before: str, after: str, context: int = 3) -> str:
    """The changed lines of `after` with `context` lines around them, and "# ... existing code ..." for the others."""
    old, new = before.split("\n"), after.split("\n")
    keep: set[int] = set()
    for tag, _, _, first, last in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            keep |= set(range(max(0, first - context), min(len(new), last + context)))
    written: list[str] = []
    for index, line in enumerate(new):
        if index in keep:
            written.append(line)
        elif not written or not written[-1].endswith("... existing code ..."):
            written.append(f"{line[: len(line) - len(line.lstrip())]}# ... existing code ...")
    return "\n".join(written)


def _traces(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Beginnings of agents' conversations that end with a user message and are short enough."""
    files = ("mini_swe_agent_gemini3.jsonl.gz", "swe_smith_ft_xml_example.jsonl.gz")
    conversations = [record for name in files for record in read_records(folder / name)]
    for record in read_records(folder / "openhands_integration_prompts.jsonl.gz"):
        if len(record["prompt"]) <= _LONGEST:
            yield [{"role": "user", "content": record["prompt"]}]
    for record in conversations:
        if _NEVER.search(str(record.get("instance_id", ""))):
            continue
        messages = [{"role": each["role"], "content": each["content"]} for each in record["messages"]]
        for end in range(2, len(messages) + 1):
            if sum(len(each["content"]) for each in messages[:end]) > _LONGEST:
                break
            if messages[end - 1]["role"] == "user":
                yield messages[:end]
